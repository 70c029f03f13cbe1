"""The selection study of Otil (CVPR 2026, supplement, section 4): does change in the latent tell change in the image?

Between consecutive steps the regions of the latent are ranked by a change score, and so are the regions of the decoded
predictions. The k that changed most in the image are what a good selection would find; the area under the ROC curve
of the latent's score says how well it finds them: 1 always, 0.5 by chance.

Shapes: n steps, so n - 1 pairs of steps; I images; K regions of T tokens; S tokens, which are latent pixels or
pixels, of D channels.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import torch
from trajectories import (
    Trajectory,
    generate,
    latent_side,
    load,
    read_prompts,
    sampler_of,
)

from otil_xdit.method.grid import Segment, block_table
from otil_xdit.method.scores import CHANGE_SCORES
from otil_xdit.method.selection import blocks_to_send

METRICS = (*CHANGE_SCORES, "random")

SOURCES = {"latent": "the latent that the network is called with", "clean": "the clean latent that it predicts"}
"""Where the score is computed that is put to the test; the first is what a selector of Otil sees."""

TRUTHS = {"same": "the same metric", "l2": "L2"}
"""By what the regions of the image are ranked. `random` has no ranking of its own there: L2 in both."""

FEW_REGIONS = 8
"""Below that a note is made: one image's AUC has few values to take."""

_Key = tuple[str, int, float, str, str]
"""Metric, block, ratio, source, truth."""


@dataclass(frozen=True)
class Settings:
    """What to measure: `guidance` as in diffusers, `size` in pixels a side, `blocks` in latent pixels a side."""

    models: tuple[str, ...] = ("tiny-sd", "tiny-sdxl", "tiny-dit")
    sampler: str = "own"
    steps: int = 15
    prompts: int = 8
    seeds: int = 1
    guidance: float = 4.0
    size: int = 128
    blocks: tuple[int, ...] = (4, 8, 16)
    ratios: tuple[float, ...] = (1 / 2, 1 / 4, 1 / 8)
    metrics: tuple[str, ...] = METRICS

    def check(self) -> None:
        """Refuse what cannot be run, before anything is loaded.

        Raises:
            ValueError: naming the flag, its value and what would be accepted.
        """
        for flag, least in (("steps", 2), ("seeds", 1), ("size", 1)):
            if getattr(self, flag) < least:
                raise ValueError(f"--{flag} is {getattr(self, flag)}; give a whole number from {least} up")
        if any(block < 1 for block in self.blocks):
            raise ValueError(f"--blocks is {list(self.blocks)}; give whole numbers from 1 up")
        if any(not 0 < ratio < 1 for ratio in self.ratios):
            raise ValueError(f"--ratios is {list(self.ratios)}; give shares above 0 and below 1, such as 1/4")
        for metric in self.metrics:
            if metric not in METRICS:
                raise ValueError(f"--metrics {metric}: no such metric; choose from {', '.join(METRICS)}")
        read_prompts(self.prompts)
        for model in self.models:
            sampler_of(model, self.sampler)
            side = latent_side(model, self.size)
            possible, notes = cells(self, side, side)
            if not possible:
                raise ValueError(f"--size {self.size}: nothing can be measured on {model}: {'; '.join(notes)}")

    def notes(self) -> list[str]:
        """What is left out, or measured on few regions; one line each."""
        sides = {latent_side(model, self.size) for model in self.models}
        return [f"{side} x {side} latent: {note}" for side in sorted(sides) for note in cells(self, side, side)[1]]


@dataclass(frozen=True)
class Row:
    """One cell of the study.

    Attributes:
        regions: K; `positives` of them are to be found.
        source, truth: keys of `SOURCES` and `TRUTHS`.
        auc: mean over images and pairs of steps.
        error: standard error of that mean over the images; 0 for one image.
        by_step: mean over the images for each pair of steps, n - 1 numbers.
    """

    model: str
    metric: str
    block: int
    ratio: float
    source: str
    truth: str
    regions: int
    positives: int
    images: int
    auc: float
    error: float
    by_step: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def roc_auc(scores: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """Probability that a positive has a larger score than a negative, ties counting half (Mann-Whitney U).

    Args:
        scores: [..., K].
        positive: bool [..., K]; at least one true and one false in each row.

    Returns:
        float64 [...].
    """
    scores = scores.contiguous()
    ordered = scores.sort(dim=-1).values
    below = torch.searchsorted(ordered, scores)
    up_to = torch.searchsorted(ordered, scores, right=True)
    rank = (below + up_to + 1).double() / 2
    count = positive.sum(dim=-1).double()
    least = count * (count + 1) / 2
    return ((rank * positive).sum(dim=-1) - least) / (count * (positive.shape[-1] - count))


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Where the `count` largest of each row of [..., K] are, the first of equal ones; bool."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def regions(rows: int, cols: int, block: int, scale: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `block` x `block` regions of a latent of `rows` x `cols`, and the same places in the image.

    Returns:
        int64 [K, block**2] latent pixels and [K, (block * scale)**2] pixels, both in row order within a region.

    Raises:
        ValueError: when the latent is smaller than a region.
    """
    if min(rows, cols) < block:
        raise ValueError(f"regions of {block} x {block} do not fit a latent of {rows} x {cols}")
    latent = block_table([Segment(rows, cols)], block)
    return latent, block_table([Segment(rows * scale, cols * scale)], block * scale)


def changes(maps: torch.Tensor, table: torch.Tensor, metric: str) -> torch.Tensor:
    """Change of every region from each step to the next; [n, D, rows, cols] to float32 [n - 1, K]."""
    tokens = maps.flatten(2).transpose(1, 2)
    score = CHANGE_SCORES[metric]
    return torch.stack([score(fresh, previous, table) for previous, fresh in zip(tokens, tokens[1:], strict=False)])


def cells(settings: Settings, rows: int, cols: int) -> tuple[list[tuple[str, int, list[float]]], list[str]]:
    """What can be measured on a latent of `rows` x `cols`, and notes on what cannot.

    A region must fit, a ratio must leave at least one region to be found, and the metric must mean something for the
    region (`ChangeScore.least_side`).

    Returns:
        (metric, block, ratios) of what can, and the notes.
    """
    possible, notes = [], []
    for block in settings.blocks:
        if min(rows, cols) < block:
            notes.append(f"block {block} is left out: the latent has {rows} x {cols}")
            continue
        count = len(block_table([Segment(rows, cols)], block))
        ratios = [ratio for ratio in settings.ratios if count > 1 and count * ratio >= 1]
        if count < FEW_REGIONS:
            left_out = ", ".join(fraction(ratio) for ratio in settings.ratios if ratio not in ratios)
            notes.append(f"block {block} has only {count} regions" + (f"; left out: ratio {left_out}" * bool(left_out)))
        for metric in settings.metrics:
            least = CHANGE_SCORES[metric].least_side if metric in CHANGE_SCORES else 1
            if block < least:
                notes.append(f"block {block} is left out for {metric}, which needs {least}")
            elif ratios:
                possible.append((metric, block, ratios))
    return possible, notes


def fraction(ratio: float) -> str:
    """``1/4`` for 0.25."""
    return str(Fraction(ratio).limit_denominator(1000))


class Measurement:
    """AUCs of one model, image by image.

    Args:
        settings: what to measure.
        model: its name in the rows.
    """

    def __init__(self, settings: Settings, model: str) -> None:
        self._settings, self._model = settings, model
        self._found: dict[_Key, list[torch.Tensor]] = {}
        self._regions: dict[int, int] = {}
        self._generator = torch.Generator().manual_seed(0)

    def add(self, seen: Trajectory) -> None:
        """Measure one image."""
        rows, cols = seen.latents.shape[2:]
        scale = seen.pixels.shape[2] // rows
        tables: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for metric, block, ratios in cells(self._settings, rows, cols)[0]:
            if block not in tables:
                tables[block] = regions(rows, cols, block, scale)
                self._regions[block] = len(tables[block][0])
            self._add_cell(seen, metric, block, ratios, *tables[block])

    def rows(self) -> list[Row]:
        """The cells so far."""
        return [self._row(key, torch.stack(found)) for key, found in self._found.items()]

    def _add_cell(
        self,
        seen: Trajectory,
        metric: str,
        block: int,
        ratios: Sequence[float],
        latent_table: torch.Tensor,
        pixel_table: torch.Tensor,
    ) -> None:
        by_l2 = changes(seen.pixels, pixel_table, "l2")
        by_metric = by_l2 if metric == "random" else changes(seen.pixels, pixel_table, metric)
        for source, maps in (("latent", seen.latents), ("clean", seen.clean)):
            if metric == "random":
                scores = torch.rand(len(maps) - 1, len(latent_table), generator=self._generator)
            else:
                scores = changes(maps, latent_table, metric)
            for truth, ranking in (("same", by_metric), ("l2", by_l2)):
                for ratio in ratios:
                    wanted = largest(ranking, blocks_to_send(len(latent_table), ratio))
                    self._found.setdefault((metric, block, ratio, source, truth), []).append(roc_auc(scores, wanted))

    def _row(self, key: _Key, found: torch.Tensor) -> Row:
        """From AUCs [I, n - 1]."""
        metric, block, ratio, source, truth = key
        means = found.mean(dim=1).tolist()
        return Row(
            model=self._model,
            metric=metric,
            block=block,
            ratio=ratio,
            source=source,
            truth=truth,
            regions=self._regions[block],
            positives=blocks_to_send(self._regions[block], ratio),
            images=len(means),
            auc=statistics.fmean(means),
            error=statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else 0.0,
            by_step=tuple(found.mean(dim=0).tolist()),
        )


def run_study(settings: Settings, say: Callable[[str], None]) -> list[Row]:
    """Generate all images of all models and measure them.

    Args:
        settings: checked (`Settings.check`).
        say: told about progress, a line at a time.
    """
    calls = [(prompt, seed) for prompt in read_prompts(settings.prompts) for seed in range(settings.seeds)]
    rows: list[Row] = []
    for model in settings.models:
        pipe, measurement = load(model, settings.sampler), Measurement(settings, model)
        for number, (prompt, seed) in enumerate(calls, start=1):
            say(f"{model}: image {number} of {len(calls)}")
            measurement.add(generate(pipe, prompt, seed, settings.steps, settings.guidance, settings.size))
        rows += measurement.rows()
    return rows


def select(rows: Iterable[Row], **wanted: object) -> list[Row]:
    """The rows whose attributes have these values."""
    return [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]


def distinct(rows: Iterable[Row], name: str) -> list[Any]:
    """The values of an attribute: metrics in the order of `METRICS`, others in that in which they come."""
    found = list(dict.fromkeys(getattr(row, name) for row in rows))
    return sorted(found, key=METRICS.index) if name == "metric" else found
