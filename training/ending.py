"""How an entry point ends: with an exit code, and a sentence where the input was at fault."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from headrace.shards.errors import UserError
from headrace.shards.terminal import print_any_name
from headrace.training.environment import is_launched, rank_from_environment

_HEAD_START_SECONDS = 3.0


def run_and_exit(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run `main` on the command line. A UserError becomes `error: ...` and exit code 2.

    Under torchrun rank 0 speaks first; torchrun then ends the others before they say it again. An
    error that another rank has alone is said by that rank.
    """
    print_any_name()
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        code, message = 2, str(error)
    except BrokenPipeError:  # `| head` has seen enough; Python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if {"-h", "--help"}.intersection(sys.argv):
            sys.exit(0)
        code, message = 1, "what read the output has ended, and so does this"
    except OSError as error:
        code, message = 1, str(error)  # a full disk, a vanished mount
    except (RuntimeError, TypeError) as error:
        if "MPS" in str(error) and "float64" in str(error):
            code = 2
            message = "this needs float64, which Apple's GPUs have not: take --run.device cpu"
        elif _lost_a_rank(error):
            code, message = 1, "another rank has ended; its own message says why"
            time.sleep(_HEAD_START_SECONDS)
        else:
            raise
    except KeyboardInterrupt:
        code, message = 130, "stopped"
    else:
        sys.exit(code)
    rank = rank_from_environment()
    if rank != 0:
        time.sleep(_HEAD_START_SECONDS)
        message = f"{message} (rank {rank})"
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)  # noqa: T201
    if is_launched():
        os._exit(code)  # a process group without its other ranks would wait at its end
    sys.exit(code)


def _lost_a_rank(error: Exception) -> bool:
    """gloo and NCCL raise where the other side of a collective went away."""
    text = str(error)
    return "gloo" in text or "NCCL" in text or "Connection closed by peer" in text
