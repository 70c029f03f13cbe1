"""Part "repeats": the same images twice, on all ranks bit for bit the same."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import torch
import torch.distributed as dist

from otil_xdit.catalog.bundled import model_folder
from otil_xdit.catalog.folders import OWN, load_pipe
from otil_xdit.tools.check.rank import draw, parallel
from otil_xdit.tools.check.runner import Check, Finding

MODEL = "tiny-sd"

SHARE = 0.7
"""Of the part's time, for images; the rest is for loading."""


def run(check: Check) -> Finding:
    """Draw images under `otil` twice, as many as were asked for and fit into the time."""
    settings = check.settings
    seconds = SHARE * check.seconds
    answers = check.ask(draw_twice, images=settings.images, steps=settings.steps, seconds=seconds)
    rounds = [digests for one in answers for digests in one["digests"]]
    drawn = len(rounds[0])
    different = [seed for seed in range(drawn) if len({digests[seed] for digests in rounds}) > 1]
    wrong = (f"images of seeds {', '.join(map(str, different))} differ",) if different else ()
    fewer = "" if drawn == settings.images else f" (of {settings.images}: more did not fit into the time)"
    said = f"{drawn - len(different)} of {drawn} images{fewer} the same twice and on {settings.ranks} ranks"
    data = {"model": MODEL, "images": drawn, "asked": settings.images, "different": different}
    return Finding(said, data, f"{MODEL} under `otil`, {settings.steps} steps: {said}.", wrong)


def draw_twice(images: int, steps: int, seconds: float) -> dict[str, Any]:
    """Draw images of seeds 0, 1, ... in two rounds; return the digests of each round.

    Args:
        images: of a round, at most.
        steps: of each.
        seconds: for all of them; one image is timed first.
    """
    pipe = load_pipe(model_folder(MODEL), OWN, None)
    with parallel(pipe, "otil") as shared:
        draw(shared, steps)  # the first one makes buffers and compiles
        started = time.perf_counter()
        draw(shared, steps)
        fitting = int(seconds / (2 * (time.perf_counter() - started)))
        counts = [max(1, min(images, fitting))]
        dist.broadcast_object_list(counts)
        return {"digests": [[digest(draw(shared, steps, seed)) for seed in range(counts[0])] for _ in range(2)]}


def digest(latents: torch.Tensor | None) -> str:
    """Return a checksum of an image."""
    assert latents is not None, "every rank has a U-Net's image"
    return hashlib.sha256(latents.contiguous().numpy().tobytes()).hexdigest()[:16]
