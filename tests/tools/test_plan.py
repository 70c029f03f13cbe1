"""`otil-xdit plan`: the model by hand, links, the fit, the advice, and the tool."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from otil_xdit.dryrun import requests
from otil_xdit.dryrun.flops import flops_of
from otil_xdit.dryrun.job import Job, ParallelDegrees
from otil_xdit.dryrun.networks import find_network
from otil_xdit.dryrun.recorder import Message
from otil_xdit.dryrun.requests import requests_of
from otil_xdit.dryrun.step_modes import modes_of
from otil_xdit.dryrun.traffic import RunTraffic, Traffic
from otil_xdit.method.config import OtilConfig
from otil_xdit.runtime.strategies import get_strategy
from otil_xdit.tools import main as tools
from otil_xdit.tools.common.cards import CARDS, Card, find_card
from otil_xdit.tools.common.links import LINKS, Link, parse_link
from otil_xdit.tools.common.variants import parse_variant
from otil_xdit.tools.plan import options as ways
from otil_xdit.tools.plan.advice import advise, bar_of
from otil_xdit.tools.plan.fit import Comparison, compare, fit, least_squares, orders, read_machine
from otil_xdit.tools.plan.latency import Load, Machine, share_of, step_time
from otil_xdit.tools.plan.observations import IN_FLIGHT, read_bench
from otil_xdit.tools.plan.options import Option

BUDGETS = json.loads((Path(__file__).parents[1] / "budgets" / "launches.json").read_text())["budgets"]
"""What steps on fake CUDA tensors launch and move (docs/results/launches.md)."""

STEP_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "sync": ("sync", {}),
    "distrifusion": ("distrifusion", {"warmup_steps": 1}),
    "otil waiting": ("otil", {"warmup_steps": 1, "fresh_share": 1.0}),
    "otil displaced": ("otil", {"warmup_steps": 1, "fresh_share": 0.0}),
}
"""As tests/support/fake_cuda/rank.py has them, which needs a process of its own."""

# ---- bytes ---------------------------------------------------------------------------------------------------------


def test_sdxl_by_hand_at_a_size_that_no_memory_would_hold() -> None:
    """SDXL at 3840: 10 layers of 240 x 240 tokens with 640 features, 60 of 120 x 120 with 1280; 2 patches, 16 bits."""
    job = Job(find_network("SDXL"), 3840, 3840, 2, torch.float16, 77)
    run = Traffic(job, ParallelDegrees(cfg=2, patches=2)).of_run(get_strategy("distrifusion").make_config({}), 15)
    numbers = 2 * (10 * 240**2 * 640 + 60 * 120**2 * 1280)
    assert run.modes == ("warm-up",) * 4 + ("displaced",) * 11
    assert run.steps["displaced"].bytes_of("kv") == 2 * numbers // 2
    assert run.steps["displaced"].bytes_of("output") == 2 * 4 * 240 * 480
    waited = [message.kind for message in run.steps["displaced"].log if message.awaited]
    assert waited == ["output"], "everything else is a step late"


def test_ulysses_sends_queries_keys_values_and_output() -> None:
    """FLUX at 512 on 2 ranks: 57 layers of (1024 + 512) / 2 tokens with 3072 features, in bfloat16."""
    job = Job(find_network("FLUX"), 512, 512, 1, torch.bfloat16, 512)
    run = Traffic(job, ParallelDegrees(ulysses=2)).of_run(get_strategy("sync").make_config({}), 3)
    assert run.steps["sync"].bytes_of("ulysses") == 57 * 4 * 768 * 3072 * 2
    assert run.steps["sync"].bytes_of("kv") == 0 and run.buffer_bytes == 0


def test_what_a_rank_puts_on_the_wire() -> None:
    def wire(pattern: Any, ranks: int) -> float:
        return Message("kv", pattern, 100, ranks, 0).wire_bytes

    assert (wire("all-gather", 4), wire("neighbours", 4), wire("all-to-all", 4)) == (300, 100, 75)


def test_modes_are_those_of_the_schedule() -> None:
    config = OtilConfig(warmup_steps=1, refresh=4)
    assert modes_of(config, 12) == ("warm-up", *("fresh",) * 3, "sync", *("fresh",) * 3, "sync", *("displaced",) * 3)
    with pytest.raises(ValueError, match=r"tolerance is 0.1: .*give 0"):
        modes_of(OtilConfig(tolerance=0.1), 12)


def test_a_window_is_where_the_settings_say_or_where_it_was_found() -> None:
    staged = parse_variant("hybridiff:window=4:7").config
    whole = ("warm-up", "warm-up", "sync", "sync")
    assert modes_of(staged, 9) == (*whole, "staged", "staged", "staged, last", "sync", "sync")
    assert modes_of(parse_variant("hybridiff:window=4:5").config, 6) == (*whole, "staged, last", "sync")
    looked_for = OtilConfig(window="auto", window_steps=3)
    assert modes_of(looked_for, 9).index("displaced") == 6, "the published cap of 15 makes room for 3 steps of 9"
    assert modes_of(looked_for, 60).count("displaced") == modes_of(looked_for, 60, False).count("displaced") == 3
    assert (
        modes_of(looked_for, 60).index("displaced") == 15 and modes_of(looked_for, 60, False).index("displaced") == 40
    )
    assert modes_of(looked_for, 9, True, (4, 7)) == (*whole, *("displaced",) * 3, "sync", "sync")
    with pytest.raises(ValueError, match="window is '4:7', which a run of 6 steps has no room for"):
        modes_of(staged, 6)


def test_the_boundary_of_a_dit_by_hand() -> None:
    """tiny-dit on two halves: between blocks there are 256 tokens of the image and the text's, and the longer segment
    has at least half of the operations."""
    network = find_network("tiny-dit")
    run = Traffic(Job(network, 128, 128, 2, torch.float32, network.text), ParallelDegrees(cfg=2)).of_run(
        parse_variant("hybridiff:window=4:7").config, 9
    )
    step, last = run.steps["staged"], run.steps["staged, last"]
    assert step.bytes_of("stages") == 4 * network.module.inner_dim * (256 + network.text)
    assert last.bytes_of("stages") == 0 and run.sent_bytes["stages"]["steady"] == 2 * step.bytes_of("stages")
    sizes = network.module.config
    prompt = 4 * (network.text * sizes.joint_attention_dim + sizes.pooled_projection_dim)
    assert run.buffer_bytes == 2 * step.bytes_of("stages") + prompt
    assert [message.kind for message in step.log if not message.awaited] == ["stages"]
    assert 0.5 <= step.share < 0.6 and run.steps["sync"].share == 1
    half = Option("hybridiff", ParallelDegrees(cfg=2), run, 0.5)
    assert half.loads["staged"].share == step.share / 2 and half.loads["staged"].travelling_bytes > 0
    assert half.flags == ["--parallel", "hybridiff"]


def test_a_segment_asks_for_a_part_of_what_the_network_asks_for() -> None:
    """Both segments together, and the first and last convolutions and the output, which each has."""
    job = Job(find_network("tiny-sd"), 128, 128, 2, torch.float32, 77)
    config = parse_variant("hybridiff:window=4:7").config
    first, second = (Traffic(job, ParallelDegrees(2, 1, 2), cfg_rank=half).of_run(config, 9) for half in (0, 1))
    whole = first.steps["sync"]
    for kind in ("kv", "moments"):
        parts = [run.steps["staged"].bytes_of(kind) for run in (first, second)]
        assert min(parts) > 0 and sum(parts) >= whole.bytes_of(kind)
    assert sum(run.steps["staged"].bytes_of("kv") for run in (first, second)) == whole.bytes_of("kv")
    assert all(run.steps["staged"].bytes_of("output") == whole.bytes_of("output") for run in (first, second))
    assert second.steps["staged"].bytes_of("stages") == 0 < first.steps["staged"].bytes_of("stages")
    assert first.steps["staged"].requests < whole.requests


@pytest.mark.parametrize("model", ["tiny-sd", "tiny-dit"])
def test_what_is_left_out_on_meta_changes_nothing(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = find_network(model)
    job = Job(network, 128, 128, 2, torch.float16, network.text)

    def counted() -> list[tuple[dict[str, int], dict[str, int], int]]:
        traffic = Traffic(job, ParallelDegrees(patches=2))
        variants = ("otil:kv_cache_dtype=float8,codec=int4", "otil-paper", "distrifusion")
        runs = [traffic.of_run(parse_variant(text).config, 12) for text in variants]
        return [(run.sent_bytes, run.messages, run.buffer_bytes) for run in runs]

    without = counted()
    monkeypatch.setattr(requests, "ShapesOnly", nullcontext)
    assert counted() == without


# ---- time ----------------------------------------------------------------------------------------------------------


def test_the_time_of_a_step_by_hand() -> None:
    link = Link("", rate=100.0, latency=0.1, swapping=2.0)
    costs = {"per_ask": 0.003, "per_message": 0.01, "per_byte": 0.001, "per_layer": 0.05, "per_number": 0.0001}
    machine = Machine(link, 1.5, **costs, contention=0.1)
    load = Load(
        2, 0.5, asks=9, messages=7, layers=2, numbers=1000, waited=(10, 20), swapped=(10,), travels=2,
        travelling_bytes=160,
    )  # fmt: skip
    found = step_time(load, machine, 0.8)
    assert found.computing == pytest.approx(0.8 * 0.5 * 1.5)
    travelling = 2 * 0.1 + 160 / 100
    by_counts = 9 * 0.003 + 7 * 0.01 + 160 * 0.001 + 2 * 0.05 + 1000 * 0.0001
    assert found.handling == pytest.approx(by_counts + 0.1 * travelling)
    assert found.waiting == pytest.approx(0.1 + 10 / 100 + 0.1 + 20 / 100 + 2 * (0.1 + 10 / 100))
    assert found.late == pytest.approx(travelling - 0.6 - 0.637)
    assert found.total == pytest.approx(0.6 + 0.637 + 0.9 + 0.563)
    crowded = step_time(load, Machine(machine.link, cores=1), 0.8)
    assert crowded.computing == pytest.approx(0.8), "two ranks on one core"


def test_a_card_is_no_faster_than_the_host_launches_and_its_memory_moves() -> None:
    card = Card("", "", peak=1e12, memory_rate=1e9, launch=1e-3, source="")
    load = Load(4, 0.25, travels=1, travelling_bytes=0.5, launches=50, moved=10_000_000)
    found = step_time(load, Machine(Link("", rate=10.0, latency=0.0), card=card), 0.14)
    assert found.computing == pytest.approx(0.035) and found.launching == pytest.approx(0.050 - 0.035)
    assert found.moving == pytest.approx(0.010) and found.late == 0
    assert found.total == pytest.approx(0.060)
    busy = step_time(load, Machine(Link("", rate=10.0, latency=0.0), card=card), 0.4)
    assert busy.launching == 0 and busy.total == pytest.approx(0.110)


@pytest.mark.parametrize(
    ("model", "label", "degrees"),
    [
        ("SDXL", "otil waiting", ParallelDegrees(patches=2)),
        ("SD3", "otil displaced", ParallelDegrees(patches=2)),
        *(
            pytest.param(model, label, ParallelDegrees(patches=ranks), marks=pytest.mark.slow)
            for model in ("SDXL", "SD3", "FLUX")
            for label in STEP_SETTINGS
            for ranks in (2, 4)
        ),
        *(
            pytest.param("SDXL", label, ParallelDegrees(cfg=2, patches=2), marks=pytest.mark.slow)
            for label in STEP_SETTINGS
        ),
    ],
)
def test_launches_are_those_of_fake_cuda(model: str, label: str, degrees: ParallelDegrees) -> None:
    """Within 2%: a pipeline's own operators, and xDiT's few besides its joins, are not counted."""
    network = find_network(model)
    # tests/support/fake_cuda/pipelines.py has so few tokens of text.
    job = Job(network, 1024, 1024, network.batch, torch.float16, {"SD3": 77}.get(model, network.text))
    name, settings = STEP_SETTINGS[label]
    traffic = Traffic(job, degrees, counts_launches=True)
    step = list(traffic.of_run(get_strategy(name).make_config(settings), 4).steps.values())[-1]
    shared = f"{degrees.patches} ranks" if degrees.cfg == 1 else f"cfg {degrees.cfg} x patch {degrees.patches}"
    budget = BUDGETS[f"{model}, {label}, {shared}"]
    assert step.launches.count == pytest.approx(budget["launches"], rel=0.02)
    assert step.launches.nbytes == pytest.approx(budget["own_bytes"], rel=0.02)


def test_sdxl_takes_as_long_as_the_host_launches() -> None:
    """On cfg 2 x patch 2 an H100 computes its share of SDXL's step sooner than the host launches it; a 4090 later."""
    job, degrees = Job(find_network("SDXL"), 1024, 1024, 2, torch.float16, 77), ParallelDegrees(cfg=2, patches=2)
    run = Traffic(job, degrees, counts_launches=True).of_run(get_strategy("otil").make_config({"warmup_steps": 1}), 5)
    fast, slow = (CARDS[name] for name in ("H100", "4090"))
    option, alone = Option("otil", degrees, run, share_of(job, degrees)), flops_of(job) / fast.reached
    for mode, step in run.steps.items():
        host = step.launches.count * fast.launch
        on_fast = option.timed(Machine(LINKS["nvlink"], card=fast), alone).times[mode]
        assert on_fast.total > on_fast.computing + on_fast.launching == pytest.approx(host) and on_fast.launching > 0
        on_slow = option.timed(Machine(LINKS["pcie4-x16"], card=slow), 0.140).times[mode]
        assert on_slow.computing == pytest.approx(0.035) and on_slow.launching == 0
        assert on_slow.moving == step.launches.nbytes / slow.memory_rate > 0.001
        assert on_slow.total >= 0.036, f"{mode}: it is not the 35 ms that a quarter of the network takes"


def test_the_tallest_patch_is_the_slowest() -> None:
    job = Job(find_network("tiny-sd"), 128, 128, 2, torch.float32, 77)
    # 32 rows of the latent are 4 at the lowest resolution: 2, 1 and 1 for three ranks.
    assert share_of(job, ParallelDegrees(patches=3)) == pytest.approx(1 / 2)
    assert share_of(job, ParallelDegrees(cfg=2, patches=2)) == pytest.approx(1 / 4)


def test_messages_that_were_measured() -> None:
    link = Link("", 1e3, 0.1, ((100.0, 0.5), (200.0, 0.7), (400.0, 2.0)))
    sizes = (0, 100, 150, 400, 600)
    assert [link.seconds(size) for size in sizes] == pytest.approx([0.5, 0.5, 0.6, 2.0, 3.0])


@pytest.mark.parametrize(
    ("text", "rate", "latency"),
    [("12GB/s,20us", 12e9, 20e-6), ("1gbit/s", 125e6, 0.0), ("20MB/s, 1.5ms", 20e6, 1.5e-3), ("1e3 mb/s", None, None)],
)
def test_links(text: str, rate: float | None, latency: float | None) -> None:
    if rate is None:
        with pytest.raises(ValueError, match="--link 1e3 mb/s: give nvlink, .*RATE"):
            parse_link(text)
    else:
        link = parse_link(text)
        assert (link.rate, link.latency) == (pytest.approx(rate), pytest.approx(latency))


def test_unequal_cards_get_shares_by_their_rates() -> None:
    job = Job(find_network("FLUX"), 1024, 1024, 1, torch.bfloat16, 512)
    fast, slow = CARDS["4090"].reached, CARDS["3090"].reached
    shared, halved = ways.degrees_of(2, job, None, None, "auto", (fast, slow))
    assert halved.shares == () and halved.speeds == (slow / fast,)
    assert share_of(job, halved) == pytest.approx(0.5 * fast / slow), "two ranks share the heads evenly"
    assert shared.shares == (23, 10) and shared.cut.sizes(4096) == (2855, 1241)
    assert share_of(job, shared) == pytest.approx(1241 / 4096 * fast / slow), "the slower one takes longest"
    (equal,) = ways.degrees_of(2, job, None, 1, (), (fast, slow))
    assert equal.shares == () and share_of(job, equal) == pytest.approx(0.5 * fast / slow)
    (alike,) = ways.degrees_of(2, job, None, 1, "auto", (fast, fast))
    assert alike.shares == () and share_of(job, alike) == 0.5


def test_what_cards_of_two_capabilities_refuse_is_not_an_option() -> None:
    degrees = [ParallelDegrees(patches=2)]
    job = Job(find_network("tiny-sd"), 128, 128, 2, torch.float32, 77)
    labels = {
        differ: {one.label for one in ways.options_of(job, degrees, 3, cards_differ=differ)[0]} for differ in (0, 1)
    }
    assert labels[0] - labels[1] == {"otil", "otil draft", "otil high", "compact-1bit", "compact-2bit"}
    assert {"sync", "distrifusion", "naive"} <= labels[1]


def test_the_longest_of_unequal_shares_is_what_all_send() -> None:
    job = Job(find_network("FLUX"), 512, 512, 1, torch.bfloat16, 512)
    made = requests_of(job, ParallelDegrees(1, 1, 2, (3, 1)), 1).requests
    keys = [args[1] for method, args in made if method == "gather"]
    assert {key.shape[2] for key in keys} == {768 + 384}
    with pytest.raises(ValueError, match="patch_shares is not possible: xDiT's pipeline gives every rank equally many"):
        requests_of(replace(job, network=find_network("SD3.5")), ParallelDegrees(1, 1, 2, (3, 1)), 0)


PARTS = {
    "3090": (82, 512, 1.695, 384, 19.5),
    "4090": (128, 512, 2.52, 384, 21.0),
    "5090": (170, 512, 2.407, 512, 28.0),
    "A6000": (84, 1024, 1.8, 384, 16.0),
    "L40S": (142, 1024, 2.49, 384, 18.0),
    "A100": (108, 2048, 1.41, 5120, 3.186),
    "H100": (132, 4096, 1.83, 5120, 5.234),
    "H200": (132, 4096, 1.83, 6144, 6.25),
    "RTX-PRO-6000": (188, 1024, 2.617, 512, 28.0),
}
"""Of a card: multiprocessors; operations of one in a cycle, of its tensor cores in 16 bits that are added up in 32
(half of the chip's on GeForce); GHz; the memory's bits, and Gbit/s of each."""


def test_a_cards_figures_are_what_its_parts_add_up_to() -> None:
    """The L20's rate is held back, so nothing follows from its parts."""
    assert set(CARDS) - set(PARTS) == {"L20"}
    for name, (processors, operations, clock, bits, rate) in PARTS.items():
        assert CARDS[name].peak == pytest.approx(processors * operations * clock * 1e9, rel=0.005), name
        assert CARDS[name].memory_rate == pytest.approx(bits * rate * 1e9 / 8, rel=0.005), name


def test_cards_are_found_as_people_write_them() -> None:
    assert find_card("RTX 4090") is find_card("4090") is CARDS["4090"]
    assert find_card("rtx-pro-6000") is find_card("RTX PRO 6000") is CARDS["RTX-PRO-6000"]
    assert find_card("l40s").peak == 362.05e12 and all(card.source for card in CARDS.values())


def test_named_links_are_in_the_order_of_their_rates() -> None:
    rates = [LINKS[name].rate for name in ("nvlink", "pcie4-x16", "pcie4-x8-host", "10gbe", "1gbe")]
    assert rates == sorted(rates, reverse=True)


# ---- fit -----------------------------------------------------------------------------------------------------------


def test_least_squares_stays_above_zero() -> None:
    rows = torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]], dtype=torch.float64)
    assert least_squares(rows, rows @ torch.tensor([2.0, 0.5], dtype=torch.float64)) == pytest.approx([2.0, 0.5])
    # Unbounded, the second would be -0.5; the best without it is the mean.
    falling = rows @ torch.tensor([4.0, -0.5], dtype=torch.float64)
    assert least_squares(rows, falling) == pytest.approx([3.0, 0.0])


SAMPLES = ((1024.0, 1e-3), (65536.0, 4e-3), (1048576.0, 0.07))
COSTS = {
    "per_ask": 2e-4,
    "per_message": 4e-4,
    "per_byte": 3e-9,
    "per_layer": 5e-3,
    "per_number": 2e-8,
    "contention": 0.2,
}
MACHINE = Machine(Link("", 20e6, 1e-3, SAMPLES, 2.0), 1.3, **COSTS, cores=2)
ALONE = 0.08
DEGREES = {"patch": 1, "cfg": 1, "ulysses": 1, "ring": 1, "pipefusion": 1}
STRATEGIES = ("sync", "distrifusion", "otil", "naive", "cfg")


def bench(folder: Path, name: str, model: str, link: Link | None, terms: Machine = MACHINE) -> Path:
    """What a bench would write of a machine with `terms` on 2 ranks, over `link` or a loopback that takes no time."""
    known = {"model": model, "width": 1, "size": 128, "latent": [32, 32], "batch": 1, "guidance": 7.5, "steps": 12}
    known |= {"dtype": "float32", "sampler": "own", "waited_seconds": None, "report": None, "skipped": None}
    alone = {"strategy": "one process", "settings": None, "ranks": 1, "degrees": DEGREES}
    runs = [{**known, **alone, "seconds": [12 * ALONE], "step_seconds": [[ALONE] * 12]}]
    network = find_network(model)
    job = Job(network, 128, 128, 2, torch.float32, network.text)
    machine = Machine(link or Link("", math.inf, 0.0), *terms.terms, cores=2)
    for text in STRATEGIES:
        way = "cfg" if text == "cfg" else "patch"
        config = parse_variant("sync" if text == "cfg" else text).config
        degrees = ParallelDegrees(cfg=2) if text == "cfg" else ParallelDegrees(patches=2)
        traffic = Traffic(job, degrees).of_run(config, 12)
        option = Option(text, degrees, traffic, share_of(job, degrees))
        steps = [step_time(option.loads[mode], machine, ALONE).total for mode in traffic.modes]
        settings = None if text == "cfg" else parse_variant(text).settings
        one = {"strategy": text, "settings": settings, "ranks": 2, "degrees": {**DEGREES, way: 2}}
        runs.append({**known, **one, "seconds": [sum(steps)], "step_seconds": [steps]})
    runs.append({**runs[-1], "strategy": "ring", "degrees": {**DEGREES, "ring": 2}})
    # A smaller message that took longer than a larger one is noise.
    shaped = None if link is None else {"rate_bytes": link.rate / IN_FLIGHT, "samples": [(512, 2e-3), *link.samples]}
    path = folder / name
    path.write_text(json.dumps({"machine": {"cores": 2}, "link": shaped, "runs": runs}))
    return path


def test_the_fit_finds_the_machine_that_made_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two networks, which layers and values are told apart by; and a link over which some steps end with their
    messages, which say nothing of the terms."""
    files = [bench(tmp_path, "1.json", "tiny-sd", MACHINE.link), bench(tmp_path, "2.json", "tiny-dit", None)]
    observations = [one for path in files for one in read_bench(str(path))[0]]
    assert any(
        step_time(load, one.placed(MACHINE), ALONE).late > 0
        for one in observations
        for load in one.option.loads.values()
    )
    assert fit(observations).terms == pytest.approx(MACHINE.terms, rel=1e-6)
    out = tmp_path / "machine.json"
    assert tools.main(["plan", "--fit", *map(str, files), "--out", str(out)]) == 0
    machine, fitted = read_machine(str(out))
    assert machine.terms == pytest.approx(MACHINE.terms, rel=1e-6)
    assert len(fitted) == 2 * len(STRATEGIES)

    other = bench(tmp_path, "3.json", "tiny-dit", MACHINE.link)
    capsys.readouterr()
    assert tools.main(["plan", "--check", str(other), str(files[0]), "--machine", str(out)]) == 0
    said = capsys.readouterr().out
    count, pairs = len(STRATEGIES), math.comb(len(STRATEGIES), 2)
    assert f"within 20% in {count} of {count} runs" in said
    assert f"{count} runs are those that the terms were fitted to" in said
    assert re.search(r"tiny-dit, .*: (\d+) of \1 pairs", said) and f": {pairs + 1} of" not in said
    assert "ring: not in the model" in said


def test_bytes_that_keep_a_rank_busy_for_longer_than_the_link(tmp_path: Path) -> None:
    """Only DistriFusion's steps tell what such bytes cost. Taken for late at first, because nothing is known of it
    yet, they would stay late, and be predicted too fast."""
    copying = replace(MACHINE, per_byte=1e-7)
    path = bench(tmp_path, "1.json", "tiny-sd", MACHINE.link, copying)
    written = json.loads(path.read_text())
    runs = [run for run in written["runs"] if run["strategy"] != "otil"]
    path.write_text(json.dumps({**written, "runs": runs}))
    observations, _ = read_bench(str(path))
    machine = fit(observations)
    errors = {found.observation.option.label: found.error for found in compare(observations, machine, [])}
    assert errors == pytest.approx(dict.fromkeys(("sync", "distrifusion", "naive", "cfg"), 0.0), abs=1e-6)


def test_strategies_that_the_model_cannot_tell_apart_are_not_in_order(tmp_path: Path) -> None:
    observations, _ = read_bench(str(bench(tmp_path, "1.json", "tiny-dit", MACHINE.link)))
    by_label = {one.option.label: Comparison(one, one.step, False) for one in observations}
    sync, otil = by_label["sync"], by_label["otil"]
    assert list(orders([sync, otil]).values()) == [(1, 1)]
    assert list(orders([sync, replace(otil, predicted=sync.predicted)]).values()) == [(0, 1)]
    assert list(orders([otil, replace(sync, predicted=otil.predicted)]).values()) == [(0, 1)]


def test_a_link_gives_every_rank_the_payloads_of_all_others(tmp_path: Path) -> None:
    path = bench(tmp_path, "1.json", "tiny-dit", MACHINE.link)
    four = json.loads(path.read_text())
    runs = [run for run in four["runs"] if run["strategy"] in ("one process", "sync")]
    path.write_text(
        json.dumps({**four, "runs": [runs[0], {**runs[1], "ranks": 4, "degrees": {**DEGREES, "patch": 4}}]})
    )
    ((observation,), left) = read_bench(str(path))
    assert observation.link.samples[-1] == (3 * SAMPLES[-1][0], SAMPLES[-1][1]) and not left


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}")
    with pytest.raises(ValueError, match=r"wrong.json is not what otil-xdit bench writes \(KeyError: 'runs'\)"):
        read_bench(str(wrong))
    with pytest.raises(ValueError, match=r"--machine .*wrong.json is not what --fit writes"):
        read_machine(str(wrong))


# ---- advice --------------------------------------------------------------------------------------------------------


def options(**seconds: float) -> list[Option]:
    run = RunTraffic((), {}, 0, {})
    return [Option(name.replace("_", " "), ParallelDegrees(patches=2), run, 0.5, {}, s) for name, s in seconds.items()]


@pytest.mark.parametrize(
    ("bar", "seconds", "label"),
    [
        (
            "distrifusion",
            {"sync": 2.0, "distrifusion": 1.1, "otil": 1.0, "otil_draft": 0.9, "naive": 0.5},
            "otil draft",
        ),
        ("otil", {"sync": 2.0, "distrifusion": 1.1, "otil": 1.0, "otil_draft": 0.9}, "otil"),
        ("otil", {"sync": 1.01, "otil": 1.0}, "sync"),
        ("sync", {"sync": 2.0, "otil": 1.0}, "sync"),
        ("60", {"sync": 2.0, "otil": 1.0, "otil_high": 1.5}, "otil high"),
        ("naive", {"sync": 2.0, "naive": 0.5}, "naive"),
    ],
)
def test_the_fastest_that_is_near_enough(bar: str, seconds: dict[str, float], label: str) -> None:
    assert advise(options(**seconds), True, bar_of(bar)).option.label == label


@pytest.mark.parametrize(("is_unet", "label"), [(True, "otil draft"), (False, "otil")])
def test_a_dit_is_judged_by_a_dits_figures(is_unet: bool, label: str) -> None:
    given = options(sync=2.0, otil=1.0, otil_draft=0.9)
    assert advise(given, is_unet, bar_of("45")).option.label == label


def test_what_was_not_compared_is_not_advised() -> None:
    assert advise(options(sync=2.0, otil=1.0, hybridiff=0.1), True, "naive").option.label == "otil"
    with pytest.raises(ValueError, match="--near hybridiff: give a strategy"):
        bar_of("hybridiff")


# ---- the tool ------------------------------------------------------------------------------------------------------


def degrees_of(option: dict[str, Any]) -> tuple[int, ...]:
    """Return an option's degrees, as the plan's JSON has them: CFG, Ulysses, patches."""
    return tuple(option["degrees"][name] for name in ("cfg", "ulysses", "patches"))


def test_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    line = "plan --model tiny-dit --size 128 --gpus 4 --link 1gbe --step_time 0.1 --dtype float32 --steps 10"
    assert tools.main(line.split()) == 0
    said = capsys.readouterr().out
    assert re.search(r"\n    xfuser --model tiny-dit .*--parallel otil .*--height 128 --width 128", said)
    assert tools.main([*line.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    by_degrees = {degrees_of(option) for option in found["options"]}
    assert by_degrees == {(1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1)}
    best = found["advice"]
    modes = best["steps"].values()
    assert sum(mode["count"] for mode in modes) == 10
    assert best["seconds"] == pytest.approx(sum(mode["count"] * mode["seconds"]["total"] for mode in modes))
    assert best["seconds"] <= min(one["seconds"] for one in found["options"] if one["strategy"] == "sync")
    staged = [degrees_of(one) for one in found["options"] if one["strategy"] == "hybridiff"]
    assert staged == [(2, 1, 2), (2, 2, 1)], "wherever the two passes are on different ranks"


def test_what_has_no_room_for_its_window_is_left_out_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    line = "plan --model tiny-dit --size 128 --gpus 2 --link 1gbe --step_time 0.1 --steps 4 --json"
    assert tools.main(line.split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert "hybridiff" not in {option["strategy"] for option in found["options"]}
    (left,) = found["left_out"]
    assert left["cfg"] == 2 and left["reason"].startswith("hybridiff: window_steps is 5; in a run of 4 steps")


def test_without_a_second_pass_there_are_no_halves(capsys: pytest.CaptureFixture[str]) -> None:
    """Two images in one pass can be halved, but their predictions are not those with and without the prompt."""
    line = "plan --model tiny-dit --size 128 --gpus 4 --link 1gbe --step_time 0.1 --images 2 --json"
    kinds = []
    for more in ([], ["--no_guidance"]):
        assert tools.main([*line.split(), *more]) == 0
        options = json.loads(capsys.readouterr().out)["options"]
        kinds.append({kind for option in options for kind in (option["strategy"], *option["sent_bytes"])})
    assert kinds[0] - kinds[1] >= {"hybridiff", "discrepancy", "stages"}


def test_without_a_step_time_bytes_are_printed_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tools.main("plan --model tiny-sd --size 128 --gpus 2 --link nvlink --cfg_degree 1 --ulysses_degree 1".split())
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert re.search(r"\| sync +\| patch 2 +\| every +\| +15 \| ", printed.out) and "Predicted" not in printed.out
    assert "give --step_time SECONDS (measured" in printed.err.splitlines()[-1]


def test_flops_are_counted() -> None:
    """Twice as many images are twice as many operations."""
    job = Job(find_network("SD1.5"), 512, 512, 2, torch.float16, 77)
    one = flops_of(job)
    assert flops_of(Job(job.network, 512, 512, 4, torch.float16, 77)) == 2 * one > 1e12


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--gpus 2", "--model is missing; give SD1.5, SDXL, .*FLUX"),
        ("--model nothing --gpus 2", "nothing: no such model; choose from .*published networks are SD1.5, SDXL"),
        ("--model tiny-sd", "--gpus is missing; give a whole number from 2 up"),
        ("--model tiny-sd --gpus 1", "--gpus 1: give a whole number from 2 up"),
        ("--model tiny-sd --gpus 2 --size 129", "--size 129 is not possible with tiny-sd; give a multiple of 4"),
        ("--model tiny-sd --gpus 2 --size 128 --height 64", "--size 128 and --height or --width contradict"),
        ("--model tiny-sd --gpus 2 --link fast", "--link fast: give nvlink, pcie4-x16"),
        ("--model tiny-sd --gpus 2 --step_time -1", "--step_time -1; give a number above 0"),
        ("--model tiny-sd --gpus 2 --step_time 1 --flops 1", "--step_time 1 and --flops 1; give one of them"),
        ("--model FLUX --gpus 2 --cfg_degree 2", "--cfg_degree 2: FLUX has no second pass without the prompt; give 1"),
        ("--model tiny-sd --gpus 3 --cfg_degree 2", "--gpus 3 cannot be shared out with --cfg_degree 2; give degrees"),
        ("--model tiny-sd --gpus 2 --near best", "--near best: give a strategy .* or decibels"),
        ("--model tiny-sd --gpus 64 --size 128", "ranks cannot share; give at least"),
        ("--model SDXL --gpus 2 --card 1080", "--card 1080: give 3090, 4090, .*RTX-PRO-6000; of another card --flops"),
        ("--model SDXL --gpus 2 --card 4090 --machine m.json", "--card 4090 and --machine m.json contradict"),
        ("--model SDXL --gpus 2 --card 4090,3090,3090", "4090,3090,3090 has 3 cards for 2 ranks; give one or all"),
        ("--model SDXL --gpus 2 --card 4090 --patch_shares auto", "--patch_shares auto: give --card with one card for"),
        ("--model SDXL --gpus 2 --card 4090 --dtype float32", "--card 4090, --dtype float32: give float16 or"),
        (
            "--model SDXL --gpus 2 --patch_shares 0,2",
            "--patch_shares: '0,2'; give a whole number from 1 to 1000000 for each patch",
        ),
        ("--model tiny-dit --gpus 2 --patch_shares 3,2,1", "with --patch_shares 3,2,1; give a share for each patch"),
        ("--fit bench.json", "--fit writes what it finds; give --out FILE"),
        ("--check bench.json", "--check predicts with a machine's terms; give --machine FILE"),
    ],
)
def test_wrong_arguments_are_one_line(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tools.main(["plan", *line.split()])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2
    assert re.search(message, said), said


@pytest.mark.parametrize(
    "line", ["--card 1080", "--card 4090,3090,3090", "--link fast", "--gpus 1", "--patch_shares -3,2", "--flops 0"]
)
def test_what_the_flags_alone_tell_is_said_before_diffusers_is_imported(line: str) -> None:
    """Which takes seconds."""
    program = (
        "import sys\nfrom otil_xdit.tools.main import main\n"
        f"try:\n    main(['plan', '--model', 'SDXL', '--gpus', '2', *{line.split()}])\n"
        "except SystemExit as ended:\n    assert ended.code == 2 and 'diffusers' not in sys.modules\n"
        "else:\n    raise AssertionError('nothing is refused')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and ": error: " in done.stderr, done.stderr
