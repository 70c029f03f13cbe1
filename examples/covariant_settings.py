"""What settings that compare or round keys and values make of an equivalent network: a table of one process.

python examples/covariant_settings.py tiny-sd rotated:1 outliers:32

The model draws an image, as it is and changed. For the steps in the middle, every score says which half of each layer's
sub-blocks changed most, from the keys and values in the layer's coordinates and as the layer gives them: the share that
it names for both networks (0.5 is chance). Below: the error of rounding them, relative, in the coordinates' metric.
"""

from __future__ import annotations

import math
import sys
from statistics import fmean
from typing import Any

import torch

from otil_xdit.catalog.bundled import model_folder
from otil_xdit.catalog.folders import OWN, load_pipe
from otil_xdit.method.coordinates import Coordinates
from otil_xdit.method.grid import Segment, block_table
from otil_xdit.method.scores import CHANGE_SCORES
from otil_xdit.method.scratch import ScratchBuffers
from otil_xdit.networks.attention_weights import attention_weights
from otil_xdit.runtime.network_hooks import networks_of
from otil_xdit.tools.common.tables import markdown
from otil_xdit.tools.eval.attention_observer import AttentionObserver
from otil_xdit.tools.eval.equivalents import parse_equivalent

STEPS, COMPARED, SIDE = 8, (3, 4, 5, 6), 2
SCRATCH = ScratchBuffers(torch.device("cpu"))
STORED = {"bfloat16": torch.bfloat16, "float8": torch.float8_e5m2}

States = dict[str, list[torch.Tensor]]
"""Keys and values of each layer at the compared steps, [2, B, S, C]."""


class Seen(AttentionObserver):
    """Keeps keys and values instead of counting."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.states: States = {}

    def _see(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        if self._modules and query.shape[-2] == key.shape[-2]:
            both = torch.stack([key, value]).transpose(2, 3).flatten(3)
            self.states.setdefault(self._modules[-1], []).append(both.float().clone())


def drawn(model: str, changed: str | None) -> tuple[States, States]:
    """Keys and values of a model's layers: in coordinates, and as the layers give them."""
    pipe = load_pipe(model_folder(model), OWN, None)
    (network,) = networks_of(pipe).values()
    if changed is not None:
        parse_equivalent(changed).apply(network)
    seen = Seen(pipe)
    call = {"height": 128, "width": 128, "num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "latent"}
    with seen.watching(), torch.no_grad():
        pipe("a large red circle", generator=torch.Generator().manual_seed(0), **call)
    known = attention_weights(network)
    coded: States = {}
    for name, states in seen.states.items():
        coordinates = Coordinates.of_weights(known[name])
        assert coordinates is not None, f"the weights of {name} give none"
        for values in states:
            out = torch.empty(1, *values.shape)
            coordinates.into(values[None], out, SCRATCH)
            coded.setdefault(name, []).append(out[0])
    return coded, seen.states


def overlap(one: States, other: States, score: str) -> float:
    """The share of sub-blocks that two networks' layers have in common in the half that changed most."""
    shares = []
    for name, states in one.items():
        tokens = states[0].shape[2]
        side = math.isqrt(tokens)
        table = block_table([Segment(side, tokens // side)], SIDE)
        for step in COMPARED:
            half = [
                set(CHANGE_SCORES[score](kept[step], kept[step - 1], table).topk(len(table) // 2).indices.tolist())
                for kept in (states, other[name])
            ]
            shares.append(len(half[0] & half[1]) / len(half[0]))
    return fmean(shares)


def rounding(states: States, dtype: torch.dtype) -> float:
    """The relative error of storing the compared steps in a dtype, mean over layers."""
    errors = []
    for kept in states.values():
        for step in COMPARED:
            errors.append(float((kept[step].to(dtype).float() - kept[step]).norm() / kept[step].norm()))
    return fmean(errors)


def main() -> None:
    model, *variants = sys.argv[1:]
    torch.set_num_threads(1)
    shipped = drawn(model, None)
    others = {name: drawn(model, name) for name in variants}
    titles = [f"{name}, {where}" for name in variants for where in ("in coordinates", "as the layer gives them")]
    rows = [
        [
            f"`kv-{score}`",
            *(f"{overlap(shipped[at], others[name][at], score):.2f}" for name in variants for at in (0, 1)),
        ]
        for score in CHANGE_SCORES
    ]
    print(markdown(["sub-blocks in common", *titles], rows))
    print()
    rows = [
        [name, f"{rounding(shipped[0], dtype):.5f}", *(f"{rounding(others[one][0], dtype):.5f}" for one in variants)]
        for name, dtype in STORED.items()
    ]
    print(markdown(["error of rounding, in coordinates", "shipped", *variants], rows))


if __name__ == "__main__":
    main()
