"""Part "kernels": the method's fused kernels against its eager code, on the same images."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from otil_xdit.catalog.bundled import BUNDLED, model_folder
from otil_xdit.catalog.folders import OWN, load_pipe
from otil_xdit.tools.check.exactness import exact_float32
from otil_xdit.tools.check.rank import draw, draw_alone, on_rank_0, parallel, relative_error
from otil_xdit.tools.check.runner import Check, Finding, Skipped
from otil_xdit.tools.common.tables import table

KERNELS = "otil_xdit.method.kernels"
SWITCH = "is_fused"
"""The function of `KERNELS` that says whether a tensor has kernels; its users ask it for every tensor."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

SHARES = {"float32": 0.2, "bfloat16": 1.0}
"""How far kernels may move an image, as a share of how far the method itself moves it. In bfloat16 both are rounding,
as far as images of few steps go."""


def why_absent(cards: int) -> str | None:
    """Return why no kernel runs on a machine; None where some do."""
    if not cards:
        return "kernels run on CUDA cards, and there is none"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if find_spec(KERNELS) is None or not hasattr(import_module(KERNELS), SWITCH):
        return f"this version has no {KERNELS}.{SWITCH}"
    return None


def run(check: Check) -> Finding:
    """Draw images of all shipped models under `otil` both ways."""
    reason = why_absent(check.settings.cards)
    if reason is not None:
        raise Skipped(reason)
    rows = [
        {"model": model, "dtype": dtype, **check.ask(compare, model=model, dtype=dtype, steps=check.settings.steps)[0]}
        for model in BUNDLED
        for dtype in DTYPES
    ]
    wrong = tuple(
        f"{row['model']} in {row['dtype']}: kernels move the image by {row['kernels']:.1e}, the method by "
        f"{row['method']:.1e}"
        for row in rows
        if not row["kernels"] <= SHARES[row["dtype"]] * row["method"]
    )
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "model": lambda row: row["model"],
        "dtype": lambda row: row["dtype"],
        "kernels to eager": lambda row: f"{row['kernels']:.1e}",
        "eager to one process": lambda row: f"{row['method']:.1e}",
    }
    worst = max(row["kernels"] / row["method"] for row in rows)
    return Finding(
        f"kernels move images by at most {worst:.0%} of what the method does",
        {"images": rows},
        f"Latents under `otil`, relative error.\n\n{table(columns, rows)}",
        wrong,
    )


def compare(model: str, dtype: str, steps: int) -> dict[str, Any]:
    """Draw an image by one process, by all with kernels, and by all without; return the errors, from rank 0."""
    pipe = load_pipe(model_folder(model), OWN, None).to(DTYPES[dtype])
    with exact_float32():
        alone = draw_alone(pipe, steps)
        fused = _drawn(pipe, steps)
        with eager():
            reference = _drawn(pipe, steps)
    if alone is None or fused is None or reference is None:
        return {}
    return {"kernels": relative_error(fused, reference), "method": relative_error(reference, alone)}


def _drawn(pipe: Any, steps: int) -> torch.Tensor | None:
    with parallel(pipe, "otil") as shared:
        return on_rank_0(draw(shared, steps))


@contextmanager
def eager() -> Iterator[None]:
    """Let all modules compute without kernels."""
    switch = getattr(import_module(KERNELS), SWITCH)
    users = [module for module in list(sys.modules.values()) if getattr(module, SWITCH, None) is switch]
    try:
        for module in users:
            setattr(module, SWITCH, _never)
        yield
    finally:
        for module in users:
            setattr(module, SWITCH, switch)


def _never(tensor: torch.Tensor) -> bool:
    return False
