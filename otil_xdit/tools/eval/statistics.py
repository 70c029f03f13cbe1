"""How uneven a network's keys and values are, and how well a velocity predicts them (`otil-xdit eval --stats`).

It says which equivalent network of `otil_xdit.tools.eval.equivalents` a model resembles.

Shapes: B batch, H heads, S tokens, d features of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import torch

from otil_xdit.method.predictor import MOST_GAIN
from otil_xdit.tools.common.tables import markdown


@dataclass(frozen=True)
class TensorStatistics:
    """The keys, or the values, of one layer, over all steps of an image.

    Attributes:
        channel_spread: standard deviation of the natural logarithm of the channels' root mean squares; the sigma of
            channels that are log-normal.
        largest_channel: the largest channel's root mean square over the median one.
        head_spread: the largest head's root mean square over the smallest one's.
        residual_kurtosis: of what a velocity leaves of the changes from step to step: 3 for a normal distribution,
            more where few numbers carry most of it; mean over the steps.
        channel_kurtosis: the same with each channel divided by its root mean square.
        predicted: share of the changes' energy that the velocity of the step before predicts, at the best gain.
    """

    channel_spread: float
    largest_channel: float
    head_spread: float
    residual_kurtosis: float
    channel_kurtosis: float
    predicted: float


@dataclass(frozen=True)
class LayerStatistics:
    """One self-attention.

    Attributes:
        name: of its module, and which of the step's calls of it, where there are several.
        tokens, heads, size: S, H and d of its keys.
        keys, values: their figures.
    """

    name: str
    tokens: int
    heads: int
    size: int
    keys: TensorStatistics
    values: TensorStatistics


class Tracked:
    """The keys, or the values, of one layer, as they come step by step."""

    def __init__(self) -> None:
        self._squares: torch.Tensor | None = None
        self._last: torch.Tensor | None = None
        self._velocity: torch.Tensor | None = None
        self._kurtosis: list[float] = []
        self._by_channel: list[float] = []
        self._change = self._left = 0.0

    def add(self, values: torch.Tensor) -> None:
        """Take the tensor of one step, [B, H, S, d]."""
        now = values.detach().to("cpu", torch.float32)
        squares = now.double().square().mean(dim=(0, 2))
        self._squares = squares if self._squares is None else self._squares + squares
        if self._last is not None and self._last.shape == now.shape:
            change = now - self._last
            if self._velocity is not None:
                self._add_residual(change, self._velocity)
            self._velocity = change
        self._last = now

    def _add_residual(self, change: torch.Tensor, velocity: torch.Tensor) -> None:
        gain = (change * velocity).sum() / velocity.square().sum().clamp_min(1e-30)
        residual = change - gain.clamp(0, MOST_GAIN) * velocity
        self._change += float(change.square().sum())
        self._left += float(residual.square().sum())
        self._kurtosis.append(_kurtosis(residual))
        sizes = residual.square().mean(dim=(0, 2), keepdim=True).sqrt()
        self._by_channel.append(_kurtosis(residual / sizes.clamp_min(1e-30)))

    def statistics(self) -> TensorStatistics:
        """Return the figures; NaN where there were too few steps."""
        assert self._squares is not None, "a layer that is tracked has been called"
        channels, heads = self._squares.flatten().sqrt(), self._squares.mean(dim=1).sqrt()
        # A channel that is always 0 carries nothing.
        channels = channels[channels > 0] if bool((channels > 0).any()) else channels + 1
        return TensorStatistics(
            channel_spread=float(channels.log().std(unbiased=False)),
            largest_channel=float(channels.max() / channels.median()),
            head_spread=float(heads.max() / heads.min().clamp_min(1e-30)),
            residual_kurtosis=_mean(self._kurtosis),
            channel_kurtosis=_mean(self._by_channel),
            predicted=1 - self._left / self._change if self._change else float("nan"),
        )


def _kurtosis(values: torch.Tensor) -> float:
    """Return the fourth moment over the square of the second, 3 for a normal distribution of mean 0."""
    squares = values.double().square()
    return float(squares.square().mean() / squares.mean().square().clamp_min(1e-300))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def summary(layers: list[LayerStatistics]) -> str:
    """Return a table with the median layer's figures and the largest ones, of keys and of values."""
    names = list(TensorStatistics.__dataclass_fields__)
    rows = []
    for kind in ("keys", "values"):
        figures = {name: [getattr(getattr(layer, kind), name) for layer in layers] for name in names}
        rows.append([f"{kind}, median layer", *(f"{median(found):.2f}" for found in figures.values())])
        rows.append([f"{kind}, largest", *(f"{max(found):.2f}" for found in figures.values())])
    return markdown([f"{len(layers)} layers", *(name.replace("_", " ") for name in names)], rows)
