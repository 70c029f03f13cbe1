"""torchrun, saying one line where a rank has failed: ``python -m otil_xdit.xdit.launcher.agent``, with its flags.

torchrun ends with 1 and a traceback of its own, whatever a rank said and whatever it ended with.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from otil_xdit.xdit.launcher.orphans import PARENT, end_with_parent

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable in which torchrun names the file for a rank's error."""

STOP_SECONDS = 40.0
"""What torchrun may take to end its ranks: it kills them when they are still there after 30 s."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun.

    Returns:
        The exit code of the first rank that failed, as a shell gives it.
    """
    end_with_parent(STOP_SECONDS)
    os.environ[PARENT] = str(os.getpid())  # of the ranks
    run = importlib.import_module("torch.distributed.run")
    errors = importlib.import_module("torch.distributed.elastic.multiprocessing.errors")
    signals = importlib.import_module("torch.distributed.elastic.multiprocessing.api")
    logging.disable(logging.ERROR)  # torchrun's tables of failures; ranks write to stderr themselves
    try:
        run.run(run.parse_args(arguments))
    except errors.ChildFailedError as error:
        line, code = first_failure(error.failures)
        print(f"xfuser: error: {line}", file=sys.stderr)
        return code
    except signals.SignalException as error:
        return 128 + int(error.sigval)  # who sent the signal knows
    except (RuntimeError, OSError, ValueError) as error:
        print(f"xfuser: error: torchrun: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def leave_error(error: BaseException) -> bool:
    """Leave a rank's error where torchrun looks for it.

    Returns:
        Whether there is such a place.
    """
    path = os.environ.get(ERROR_FILE)
    if not path:
        return False
    extra = {"timestamp": str(int(time.time())), "at": time.time()}
    with open(path, "w") as file:
        json.dump({"message": {"message": one_line(error), "extraInfo": extra}}, file)
    return True


def one_line(error: BaseException) -> str:
    """Return what to say of an error; the class only where the message alone does not say what it is about."""
    text = " ".join(str(error).split())
    return text if type(error).__name__ in ("FlagError", "ValueError") and text else f"{type(error).__name__}: {text}"


def first_failure(failures: Mapping[int, Any]) -> tuple[str, int]:
    """Return the line and the exit code of the rank that failed first.

    Args:
        failures: torch's `ProcessFailure` by rank.
    """
    told = {rank: _told(failure) for rank, failure in failures.items()}

    def order(rank: int) -> tuple[bool, bool, float, int]:
        said = told[rank]
        was_stopped = failures[rank].exitcode == -signal.SIGTERM  # by torchrun, after another's failure
        return said is None, was_stopped, said[1] if said else 0.0, rank

    rank = min(failures, key=order)
    failure, said = failures[rank], told[rank]
    code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    if said is not None:
        return said[0], code
    if failure.exitcode < 0:
        return f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", code
    return f"rank {rank} ended with exit code {failure.exitcode}; what it said stands above", code


def _told(failure: Any) -> tuple[str, float] | None:
    """Return what a rank left with `leave_error`, and when; None where it left nothing."""
    message = (getattr(failure, "error_file_data", None) or {}).get("message")
    if not isinstance(message, dict) or "at" not in message.get("extraInfo", {}):
        return None
    return message["message"], message["extraInfo"]["at"]


if __name__ == "__main__":
    sys.exit(main())
