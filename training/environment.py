"""What a launcher tells the processes that it starts, read without torch: torchrun's variables, or
Slurm's, which are put into torchrun's words."""

import os
import re
from collections.abc import Mapping, MutableMapping

from headrace.training.preset import ConfigError, require

_FIRST_PORT, _PORTS = 20000, 20000


def rank_from_environment() -> int:
    """The rank that a launcher gave, before anything is joined; 0 for a process by itself."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def is_launched() -> bool:
    """Whether a launcher started this process, as one of several or alone."""
    return "LOCAL_RANK" in os.environ


def adopt_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """Adds torchrun's variables where `srun` started several tasks and no torchrun is between.

    Raises ConfigError where Slurm gave a job several tasks and this process is none of them: it
    would train alone while the others' devices are paid for.
    """
    if "RANK" in environment:
        return
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    if not tasks.isdecimal() or int(tasks) < 2:
        return
    # A batch script and salloc's shell know the job's tasks too, and are in no step of srun.
    in_step = "SLURM_STEP_ID" in environment or "SLURM_JOB_ID" not in environment
    require(
        in_step and "SLURM_PROCID" in environment,
        f"Slurm has {tasks} tasks for this job, and this process is none of them: start it with "
        f"srun, so that each becomes a rank (one alone: srun --ntasks 1)",
    )
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
    several_nodes = int(environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES", 1)))
    job = int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = tasks
    environment["LOCAL_RANK"] = environment.get("SLURM_LOCALID", environment["SLURM_PROCID"])
    environment["LOCAL_WORLD_SIZE"] = str(_tasks_on_this_node(environment, int(tasks)))
    address = first_node(nodes) if several_nodes > 1 else "127.0.0.1"
    environment.setdefault("MASTER_ADDR", address)
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + job % _PORTS))


def first_node(nodes: str) -> str:
    """The first name of Slurm's list: "gpu03" of "gpu[03-05,9],login1". Raises ConfigError for what
    is no such list."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?", nodes)
    if found is None:
        raise ConfigError(
            f"SLURM_JOB_NODELIST is {nodes!r} and names no machine: set MASTER_ADDR to that of "
            f"rank 0"
        )
    return found[1] + (found[2] or "")


def _tasks_on_this_node(environment: Mapping[str, str], tasks: int) -> int:
    """Out of "4(x2),3": four on each of the first two nodes, three on the next."""
    text = environment.get(
        "SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", str(tasks))
    )
    counts: list[int] = []
    for count, repeated in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(repeated or 1)
    node = int(environment.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else tasks
