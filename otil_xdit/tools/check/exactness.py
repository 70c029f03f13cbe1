"""Part "exactness": images under `sync` against one process's, on the shipped models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from otil_xdit.catalog.bundled import BUNDLED, model_folder
from otil_xdit.catalog.folders import OWN, load_pipe
from otil_xdit.tools.check.rank import draw, draw_alone, on_rank_0, parallel, relative_error
from otil_xdit.tools.check.runner import Check, Finding
from otil_xdit.tools.common.tables import table

FLOAT32 = 1e-4
"""Largest relative error in float32: sums in another order, carried through all steps."""

BFLOAT16 = 2.0
"""How many times as far from float32's image `sync` may be as one process, both in bfloat16."""


def run(check: Check) -> Finding:
    """Compare every shipped model; in bfloat16 too on cards."""
    rows = []
    for model in BUNDLED:
        answer = check.ask(compare, model=model, steps=check.settings.steps, half=check.settings.cards > 0)[0]
        rows.append({"model": model, **answer})
    wrong = tuple(filter(None, map(judge, rows)))
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "model": lambda row: row["model"],
        "float32: sync to one process": lambda row: f"{row['float32']:.1e}",
        "bfloat16: sync to one process in float32": lambda row: _shown(row["bfloat16"]),
        "bfloat16: one process to itself in float32": lambda row: _shown(row["bfloat16_alone"]),
    }
    said = f"{len(rows)} models, float32 off by at most {max(row['float32'] for row in rows):.1e}"
    about = "Latents, root mean square of the difference over the reference's."
    return Finding(said, {"models": rows}, f"{about}\n\n{table(columns, rows)}", wrong)


def judge(row: dict[str, Any]) -> str:
    """Return what is wrong with a model's errors; empty for nothing."""
    if not row["float32"] <= FLOAT32:
        return f"{row['model']} in float32 is off by {row['float32']:.1e}, more than {FLOAT32:.0e}"
    if row["bfloat16"] is not None and not row["bfloat16"] <= BFLOAT16 * row["bfloat16_alone"]:
        return f"{row['model']} in bfloat16 is off by {row['bfloat16']:.1e}, one process by {row['bfloat16_alone']:.1e}"
    return ""


def compare(model: str, steps: int, half: bool) -> dict[str, Any]:
    """Draw an image by one process and by all; return the errors by dtype, from rank 0.

    Args:
        model: a shipped one.
        steps: of the image.
        half: in bfloat16 as well.
    """
    pipe = load_pipe(model_folder(model), OWN, None)
    with exact_float32():
        reference, found = _both(pipe, steps)
    halves = _both(pipe.to(torch.bfloat16), steps) if half else (None, None)
    if reference is None or found is None:
        return {}
    alone, together = (None if one is None else relative_error(one, reference) for one in halves)
    return {"float32": relative_error(found, reference), "bfloat16": together, "bfloat16_alone": alone}


def _both(pipe: Any, steps: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return one process's image and that of all ranks, on rank 0."""
    alone = draw_alone(pipe, steps)
    with parallel(pipe, "sync") as shared:
        together = on_rank_0(draw(shared, steps))
    return alone, together


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute float32 in float32 on cards, which round convolutions' factors to TF32 otherwise."""
    backends: tuple[Any, ...] = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def _shown(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"
