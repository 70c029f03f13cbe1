"""`otil-xdit memory`: its figures are those of real ranks and of a count by hand."""

from __future__ import annotations

import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from otil_xdit.comm.groups import PatchGroup
from otil_xdit.dryrun.communicators import COMMUNICATOR_BYTES, communicators_of
from otil_xdit.dryrun.job import ParallelDegrees
from otil_xdit.dryrun.memory import memory_of
from otil_xdit.dryrun.memory_estimate import estimate_memory, log_memory_estimate
from otil_xdit.dryrun.networks import attention_layers, find_network
from otil_xdit.exchange.communicator import OtilCommunicator
from otil_xdit.method.config import OtilConfig
from otil_xdit.method.grid import TokenLayout
from otil_xdit.networks.dit.token_cut import TokenCut
from otil_xdit.runtime.strategies import get_strategy
from otil_xdit.tools import main as tools
from otil_xdit.tools.common.variants import parse_variant
from tests.support.ranks import run_ranks

BATCH, RANKS = 2, 2
TINY_SD = ((16, 32, 1, 32, 5), (8, 16, 2, 48, 5), (4, 8, 4, 64, 5), (2, 4, 8, 64, 1))
"""Of one of two ranks at 128 pixels: rows, columns, latent pixels of a token, features, number of layers."""

CONFIGS = {
    "distrifusion": get_strategy("distrifusion").make_config({}),
    **{how: OtilConfig(kv_cache_dtype=how) for how in ("auto", "bfloat16", "float8")},
    "half of it, by change": OtilConfig(ratio=0.5, select="kv-cosine", score_reference="previous"),
}


def in_call_order() -> list[tuple[int, int, int, int, int]]:
    """The way down has two layers of a level, the way up three; between them is the one of the lowest."""
    *levels, lowest = TINY_SD
    return [
        *(level for level in levels for _ in range(2)),
        lowest,
        *(level for level in levels[::-1] for _ in range(3)),
    ]


def kept_by_real_ranks(config: OtilConfig) -> int:
    """What a run reports that calls every layer of tiny-sd at each of so many steps that every mode occurs."""
    # A step that does not wait takes the most: all layers of a stack at once.
    run = OtilCommunicator(
        config.replace(timeout=20.0, fresh_share=0.0),
        PatchGroup(dist.group.WORLD, dist.get_rank(), dist.get_world_size()),
    )
    run.begin()
    for _ in range(config.warmup_steps + 2):
        for number, (rows, cols, pixels, width, _) in enumerate(in_call_order()):
            run.observe(None, TokenLayout(rows, cols, pixels))
            values = torch.ones(BATCH, 2, rows * cols, width // 2)
            run.gather(str(number), values, values)
        run.clock.tick()
    run.end()
    return run.report().buffer_bytes


def all_kept_by_real_ranks() -> dict[str, int]:
    return {name: kept_by_real_ranks(config) for name, config in CONFIGS.items()}


def test_the_figures_are_those_of_a_run() -> None:
    layers = attention_layers(find_network("tiny-sd"), 128, 128, TokenCut(RANKS), text=77)
    expected = Counter()
    for rows, cols, pixels, width, count in TINY_SD:
        expected[(rows * cols, width, TokenLayout(rows, cols, pixels))] += count
    assert Counter((layer.tokens, layer.width, layer.layout) for layer in layers) == expected
    real = run_ranks(RANKS, all_kept_by_real_ranks)
    for name, config in CONFIGS.items():
        found = memory_of(layers, RANKS, BATCH, torch.float32, config)
        assert [one[name] for one in real] == [found.total + sum(found.scratch.values())] * RANKS, name


def test_a_count_by_hand() -> None:
    """SDXL at 1024: 10 layers of 64 x 64 tokens with 640 features, 60 of 32 x 32 with 1280; FLUX: 57 of 4608, 3072."""
    sdxl = attention_layers(find_network("SDXL"), 1024, 1024, TokenCut(4), text=77)
    assert Counter((layer.tokens * 4, layer.width) for layer in sdxl) == {(4096, 640): 10, (1024, 1280): 60}
    flux = attention_layers(find_network("FLUX"), 1024, 1024, TokenCut(4), text=512)
    assert Counter((layer.tokens * 4, layer.width) for layer in flux) == {(4608, 3072): 57}
    found = memory_of(flux, 4, 1, torch.bfloat16, OtilConfig(kv_cache_dtype="float8", ratio=1.0))
    numbers = 57 * 2 * 4608 * 3072
    assert (found.values, found.velocities) == (2 * numbers, numbers)


@pytest.mark.parametrize("model", ["tiny-dit", "tiny-sd"])
def test_the_log_line_knows_every_strategy(model: str, caplog: pytest.LogCaptureFixture) -> None:
    """A pipeline's network is only looked at, so one without weights will do."""
    network = find_network(model)
    part = {"unet": network.module} if network.is_unet else {"transformer": network.module}
    pipe = SimpleNamespace(**part, vae_scale_factor=network.vae)
    with caplog.at_level("INFO", logger="otil_xdit"):
        for text in ("sync", "otil", "otil:tolerance=0.1", "hybridiff"):
            log_memory_estimate(pipe, parse_variant(text).config, 2, 1, 2)
    said = [record.getMessage() for record in caplog.records]
    megabytes = [float(re.search(r"about ([\d.]+) MB .* 128 x 128 pixels", line)[1]) for line in said]
    assert 0 < megabytes[0] < megabytes[3] < megabytes[1] == megabytes[2], "Hybridiff keeps a boundary, otil all keys"


def test_the_log_line_counts_what_the_table_counts() -> None:
    network, config = find_network("tiny-dit"), get_strategy("otil").make_config({})
    text_tokens = 333  # of SD3.5's record
    found = memory_of(
        attention_layers(network, 128, 128, TokenCut(RANKS), text_tokens), RANKS, BATCH, torch.float32, config
    )
    pipe = SimpleNamespace(transformer=network.module, vae_scale_factor=network.vae)
    size, estimate = estimate_memory(pipe, config, RANKS, 1, 1)
    assert size == (128, 128) and estimate == found.total + sum(found.scratch.values())


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    line = "memory --models tiny-dit SD1.5 --size 512 --ranks 2 --text_tokens 77 --dtype float32"
    line += " --kv_cache_dtype float8"
    assert tools.main(line.split()) == 0
    lines = [line.strip("| ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    rows, decodes = rows[:6], rows[8:10]
    assert [row[:3] for row in rows[2:]] == [
        [model, "2", preset] for model in ("tiny-dit", "SD1.5") for preset in ("distrifusion", "otil, float8")
    ]
    # SD1.5 at 512: 5 layers each of 64 x 64 tokens with 320 features, 32 x 32 with 640, 16 x 16 with 1280; 1 of 8 x 8.
    numbers = 2 * 2 * (5 * (4096 * 320 + 1024 * 640 + 256 * 1280) + 64 * 1280)
    assert float(rows[4][5]) == round(4 * numbers / 1e6, 1) and float(rows[5][5]) == round(2 * numbers / 1e6, 1)
    assert [row[0] for row in decodes] == ["1", "2"]
    assert 1 / 2 < float(decodes[1][1]) / float(decodes[0][1]) < 2 / 3, "a VAE's rows are shared"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--models nothing", "nothing: no such model; choose from .*published networks are SD1.5, SDXL, .*FLUX"),
        ("--models SDXL --size 1001", "--size 1001 is not possible with SDXL; give a multiple of 8"),
        ("--models SDXL --size 64 --ranks 8", "--size 64 on 8 ranks with SDXL.*fewer ranks"),
        ("--models SD3 --ranks 3", "--size 1024 on 3 ranks with SD3.*64 rows of tokens cannot be shared evenly"),
        ("--ranks 1", "--ranks 1: give a whole number from 2 up"),
        ("--batch 0", "--batch 0: give a whole number from 1 up"),
    ],
)
def test_wrong_arguments_are_one_line(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tools.main(["memory", *line.split()])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2
    assert re.search(message, said), said


def test_the_communicators_of_a_rank() -> None:
    """Two, bulk and urgent, where the same ranks hold rows and image; what xDiT has for Ulysses besides."""
    assert communicators_of(ParallelDegrees(patches=4)) == ("keys and values", "rows, moments, the output")
    assert len(communicators_of(ParallelDegrees(cfg=2, patches=2))) == 4
    assert communicators_of(ParallelDegrees(ulysses=2)) == ("rows, moments, the output", "Ulysses")
    assert COMMUNICATOR_BYTES == 4 * 2 * 10_485_760
