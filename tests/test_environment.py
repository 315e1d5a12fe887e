"""Which rank a process is: told by torchrun, by Slurm's srun, or by nobody."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from headrace import training
from headrace.training.environment import adopt_slurm, first_node
from headrace.training.preset import ConfigError

TRAIN = Path(training.__file__).parent / "train.py"


def test_tasks_of_srun_become_ranks() -> None:
    environment = {
        "SLURM_JOB_ID": "123456",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "7",
        "SLURM_NTASKS": "7",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": "gpu[03-05,9],login1",
        "SLURM_STEP_TASKS_PER_NODE": "4,3",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
    }
    adopt_slurm(environment)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    assert [environment[name] for name in names] == ["5", "7", "1", "3", "gpu03"]
    assert 20000 <= int(environment["MASTER_PORT"]) < 40000


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "RANK": "3"},
    ],
)
def test_one_task_and_torchruns_workers_stay_what_they_are(environment: dict[str, str]) -> None:
    before = dict(environment)
    adopt_slurm(environment)
    assert environment == before


def test_a_process_beside_the_tasks_is_refused() -> None:
    for more in ({}, {"SLURM_PROCID": "0"}):
        with pytest.raises(ConfigError, match=r"Slurm has 8 tasks .* start it with srun"):
            adopt_slurm({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", **more})


@pytest.mark.parametrize(
    ("nodes", "first"), [("a", "a"), ("a,b", "a"), ("n[7]", "n7"), ("n-1-[001-004],m", "n-1-001")]
)
def test_the_first_machine_of_a_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def started(data: Path, out: Path, **variables: str) -> subprocess.Popen[str]:
    line = (
        f"--method simclr --preset cifar --backbone test_resnet --data.train {data} "
        f"--run.out {out} --data.batch-size 16 --data.engine reference --run.steps 2 "
        f"--run.device cpu"
    )
    return subprocess.Popen(
        [sys.executable, str(TRAIN), *line.split()],
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_two_tasks_of_srun_train_one_run(data: Path, tmp_path: Path) -> None:
    port = str(29000 + os.getpid() % 900)
    tasks = [
        started(
            data,
            tmp_path / "run",
            SLURM_PROCID=str(task),
            SLURM_LOCALID=str(task),
            SLURM_NTASKS="2",
            MASTER_PORT=port,
        )
        for task in range(2)
    ]
    said = [task.communicate(timeout=240)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert "on 2 x cpu" in said[0]
    assert "finished" in said[0]
    assert "finished" not in said[1]


def test_a_rank_that_knows_no_meeting_place_says_so(data: Path, tmp_path: Path) -> None:
    lone = started(data, tmp_path / "run", RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")
    said = lone.communicate(timeout=120)[0]
    assert lone.returncode == 2
    assert "MASTER_ADDR and MASTER_PORT do not say where the ranks meet" in said
    assert "Traceback" not in said
