"""What a step may ask of the device: ceilings that are kept, and what they are to come down to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.fake_cuda.launches import Launches
from tests.support.fake_cuda.rank import Scene

FILE = Path(__file__).parents[2] / "budgets" / "launches.json"

MODELS = ("SDXL", "FLUX", "SD3")
STRATEGIES = (
    "sync",
    "distrifusion",
    "otil warm-up",
    "otil waiting",
    "otil displaced",
    "otil refresh",
    "otil 2bit waiting",
    "otil 2bit displaced",
)
PARTS = {"2 ranks": (2, 0, 1), "4 ranks": (4, 1, 1), "cfg 2 x patch 2": (4, 0, 2)}
"""How ranks share an image: their number, the one that is counted (with two neighbours where there is one), and the
degree of CFG parallelism, which SDXL alone is counted with."""

STEPS = 4
"""Warm-up, the first step after it, and two more: moments are fitted from the third on."""

TARGET_RATIOS = {"sync": 1.15, "distrifusion": 1.2, **dict.fromkeys(STRATEGIES[2:], 1.25)}
"""Launches over those of the plain network."""

TARGET_BYTES = 12.0
"""Bytes moved beyond the network's for each number of the keys and values that are held."""

TARGET_AWAITED = 3
"""Messages that a displaced step waits for."""


@dataclass(frozen=True)
class Figures:
    """What one step asked for.

    Attributes:
        launches: number of kernels.
        own_bytes: moved beyond what the network's layers move.
        held: numbers of all ranks' keys and values.
        awaited, displaced: messages that were waited for at once, and that travelled while something was computed.
    """

    launches: int
    own_bytes: int
    held: int
    awaited: int
    displaced: int

    @classmethod
    def of(cls, step: Launches) -> Figures:
        counts = step.count_of("awaited"), step.count_of("displaced")
        return cls(step.total, step.own_bytes, step.held, *counts)

    @property
    def bytes_per_number(self) -> float:
        return self.own_bytes / self.held if self.held else 0.0


def scenes(models: tuple[str, ...] = MODELS) -> Iterator[Scene]:
    """Yield everything that has a budget, and the plain network of each model."""
    for model in models:
        yield Scene(model, "plain", 1)
        for parts in PARTS.values():
            yield from (scene_of(model, strategy, *parts) for strategy in STRATEGIES if is_counted(model, parts[2]))


def scene_of(model: str, strategy: str, ranks: int, rank: int, cfg: int) -> Scene:
    return Scene(model, strategy, ranks, rank, cfg=cfg)


def is_counted(model: str, cfg: int) -> bool:
    """Tell whether a model's steps are counted with that degree of CFG parallelism."""
    return cfg == 1 or model == "SDXL"


def key_of(scene: Scene) -> str:
    """Return what the budget of a scene is called."""
    if scene.strategy == "plain":
        return f"{scene.pipeline}, plain"
    parts = scene.world_size, scene.rank, scene.cfg
    shared = next((name for name, known in PARTS.items() if known == parts), str(scene))
    return f"{scene.pipeline}, {scene.strategy}, {shared}"


def budgets() -> dict[str, dict[str, Any]]:
    """Return the ceilings by `key_of`."""
    found: dict[str, dict[str, Any]] = json.loads(FILE.read_text())["budgets"]
    return found


def excesses(scene: Scene, found: Figures) -> list[str]:
    """Return in what a step is beyond its budget, where it has one."""
    budget = budgets().get(key_of(scene), vars(found))
    return [
        f"{key_of(scene)}: {name} is {value}, and the budget {budget[name]}"
        for name, value in vars(found).items()
        if name != "held" and value > budget[name]
    ]
