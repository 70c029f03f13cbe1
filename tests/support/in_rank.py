"""What the scripts that a torchrun runs have in common: naming a failure, and leaving xDiT's groups."""

from __future__ import annotations

import gc
import traceback
from pathlib import Path


def described(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    message = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {message} ({Path(last.filename).name}:{last.lineno})"


def leave_groups() -> None:
    """The next composition makes its own groups; xDiT makes none while it has some."""
    from xfuser.core.distributed.parallel_state import destroy_model_parallel, model_parallel_is_initialized

    gc.collect()
    if model_parallel_is_initialized():
        destroy_model_parallel()
