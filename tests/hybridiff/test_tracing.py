"""Looking at a network's call: what blocks cost, who reads whose output, and the cut."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from otil_xdit.errors import NotInStages
from otil_xdit.hybridiff.forward_hooks import ForwardHooks
from otil_xdit.hybridiff.tracing import CPU_ATTENTION, Cut, Tracer
from otil_xdit.networks.unet.levels import blocks_of
from tests.support.unets import Trial, build_unet


def traced(units: list[nn.Module], call) -> Tracer:
    tracer = Tracer()
    hooks = ForwardHooks(units, lambda number, forward, inputs: tracer.unit(number, partial(forward, inputs)))
    try:
        with torch.no_grad(), tracer:
            call()
    finally:
        hooks.release()
    return tracer


def linear(width: int = 8) -> nn.Module:
    return nn.Linear(width, width)


def test_a_chain_needs_the_last_output_alone() -> None:
    units = [linear() for _ in range(4)]

    def call() -> None:
        x = torch.randn(2, 8)
        for unit in units:
            x = unit(x) * 2

    trace = traced(units, call)
    assert trace.order == [0, 1, 2, 3]
    assert trace.flops == [2 * 2 * 8 * 8] * 4
    cut = Cut.of(trace, [*trace.flops, trace.glue])
    assert cut.place == 2
    assert cut.boundary == ((1, 0),)


def test_skip_connections_are_found_whatever_is_made_of_them() -> None:
    units = [linear(), linear(), nn.Linear(16, 8), nn.Linear(16, 8)]

    def call() -> None:
        first = units[0](torch.randn(2, 8))
        scaled = first.neg()  # made between units, before the cut, read behind it
        second = units[1](first)
        third = units[2](torch.cat((second, second), 1))
        units[3](torch.cat((third, scaled.view(2, 8)), 1))

    cut = Cut.of(traced(units, call), [1, 1, 1, 3, 0])
    assert cut.place == 3
    assert cut.boundary == ((0, 0), (2, 0))


def test_outputs_that_nobody_reads_later_do_not_travel() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = linear(), linear()

        def forward(self, x):
            return self.one(x), self.other(x)

    units = [Two(), linear(), linear(), linear()]

    def call() -> None:
        image, text = units[0](torch.randn(2, 8))
        image = units[1](image)
        image = units[2](image + text)
        units[3](image + 1)

    trace = traced(units, call)
    by_place = {
        place: Cut.of(trace, [int(unit in (place - 1, place)) for unit in range(4)] + [0]) for place in (1, 2, 3)
    }
    assert by_place[1].boundary == ((0, 0), (0, 1))
    assert by_place[2].boundary == ((0, 1), (1, 0))
    assert by_place[3].boundary == ((2, 0),)


def test_a_change_in_place_between_units_counts() -> None:
    units = [linear(), linear(), linear()]

    def call() -> None:
        first = units[0](torch.randn(2, 8))
        total = torch.zeros(2, 8)
        total += first
        units[2](units[1](torch.ones(2, 8)) + total)

    trace = traced(units, call)
    assert (0, 0) in Cut.of(trace, [0, 1, 0, 0]).boundary


def test_the_cut_makes_the_longer_segment_shortest() -> None:
    trace = traced(units := [linear() for _ in range(5)], lambda: [unit(torch.ones(1, 8)) for unit in units])
    cut = Cut.of(trace, [1, 1, 1, 9, 1, 100])
    assert cut.place == 3, "3 and 10 rather than 12 and 1"
    assert (cut.flops, cut.glue) == ((3, 10), 100), "what is outside the units is everybody's"


def test_a_network_of_one_block_or_one_that_repeats_a_block_is_refused() -> None:
    units = [linear()]
    trace = traced(units, lambda: units[0](torch.ones(1, 8)))
    with pytest.raises(NotInStages, match="has 1 blocks"):
        Cut.of(trace, [*trace.flops, trace.glue])
    with pytest.raises(NotInStages, match="more than once"):
        traced(units, lambda: units[0](units[0](torch.ones(1, 8))))


@pytest.mark.parametrize("case", ["sd1.5", "sdxl"])
def test_a_unets_blocks_are_all_of_it_and_its_skips_are_found(case: str) -> None:
    unet: UNet2DConditionModel = build_unet(case)
    trial = Trial.parse(f"{case}/1,1,1/32x32/2/plain/sync")
    arguments = next(trial.calls(unet))
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        unet(**arguments)
    blocks = blocks_of(unet)
    trace = traced(blocks, lambda: unet(**arguments))
    assert sum(trace.flops) + trace.glue == counter.get_total_flops()
    assert sorted(trace.order) == list(range(len(blocks)))
    assert trace.glue < 0.1 * counter.get_total_flops(), "little is left between blocks"
    cut = Cut.of(trace, [*trace.flops, trace.glue])
    skips = sum(len(block.resnets) for block in unet.down_blocks) + len(unet.down_blocks) - 1
    assert 1 < len(cut.boundary) <= 1 + skips
    assert (cut.place - 1, 0) in cut.boundary
    assert max(cut.flops) < 0.75 * counter.get_total_flops()
