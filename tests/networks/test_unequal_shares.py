"""Patches of DiTs with unequal shares of the tokens: exact under `sync`, under every strategy the same on all ranks."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from diffusers import FluxTransformer2DModel

from otil_xdit.catalog.architectures import ARCHITECTURES
from otil_xdit.networks.dit.token_cut import TokenCut
from otil_xdit.xdit.cpu import enable_cpu_ranks

enable_cpu_ranks()

from otil_xdit.xdit.plugin.measured_shares import _block_of, _median_seconds  # noqa: E402
from tests.networks.test_dit_exactness import CONTROL, TOLERANCE  # noqa: E402
from tests.support.dits import CASES  # noqa: E402
from tests.support.torchrun import lines_of  # noqa: E402

TELLING = ("flux, 7 text tokens", "z-image, prompts of 40 and 8 tokens", "hunyuan-video, 27 tokens", "ltx-2, 27 tokens")
"""Text copied, in the sequence and joined; three sequences; keys that xDiT gathers by itself."""
EQUAL = {
    "sd3": "equally many rows",
    "pixart-alpha": "equally many rows",
    "hunyuandit": "equally many rows",
    "cogvideox": "equally many rows",
    "lumina2": "in a way of its own",
}
"""Whose tokens cannot be cut unequally, and why."""
OTHERS = tuple(
    name
    for name, case in CASES.items()
    if name not in TELLING and name.partition(",")[0] not in {*EQUAL, "pixart-sigma", "sd3.5-medium", "latte", "sana"}
    if case.wrapper is None and name != "consisid"
)
COMPOSITIONS = {2: ["2,1,1"], 3: ["3,1,1"], 4: ["4,1,1", "2,2,1", "2,1,2"]}


@cache
def lines(ranks: int, cases: tuple[str, ...], exchanges: tuple[str, ...]) -> list[dict[str, Any]]:
    arguments = ["--cases", *cases, "--exchange", *exchanges, "--degrees", *COMPOSITIONS[ranks]]
    return lines_of(ranks, "dit_exactness.py", *arguments)


def check(found: list[dict[str, Any]]) -> None:
    """Fail unless what exchanges is exact, and what does not is not."""
    assert found
    for line in found:
        assert line["stopped"] is None, line
        if "none" in line["exchange"]:
            assert line["max_abs_error"] > CONTROL, line
        else:
            assert line["max_abs_error"] <= TOLERANCE, line


def test_unequal_shares_are_exact() -> None:
    check(lines(2, TELLING, ("unequal", "unequal, none")))


@pytest.mark.slow
def test_so_are_those_of_all_others() -> None:
    check(lines(2, OTHERS, ("unequal", "unequal, none", "python, unequal", "python, unequal, none")))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", (3, 4))
def test_and_those_of_more_ranks(ranks: int) -> None:
    check(lines(ranks, (*TELLING, *OTHERS), ("unequal", "python, unequal")))


@pytest.mark.slow
def test_rows_of_pipelines_are_refused_by_name() -> None:
    for line in lines(2, tuple(EQUAL), ("unequal",)):
        assert "--patch_shares" in line["stopped"] and EQUAL[line["case"]] in line["stopped"], line


@pytest.mark.slow
def test_every_strategy_is_deterministic_and_auto_follows_the_speed() -> None:
    exact, naive = {}, {}
    for line in lines_of(2, "unequal_dits.py"):
        (name, strategy), ranks = line["case"], line["ranks"]
        if strategy == "measured":
            assert all(seconds > 0 for seconds in ranks)
            continue
        assert all(rank["repeats"] and rank["alike"] for rank in ranks), line
        tokens = [rank["tokens"] for rank in ranks]
        assert tokens == list(TokenCut(2, 1, (2, 1) if strategy == "auto" else (3, 2)).sizes(sum(tokens))), line
        error = max(rank["error"] for rank in ranks)
        if strategy in ("sync", "auto"):
            exact[name] = error
            assert error <= 1e-5, line
        elif strategy == "naive":
            naive[name] = error
        else:
            assert 1e-4 < error < naive[name], line
    assert exact and naive.keys() == exact.keys()
    assert min(naive.values()) > CONTROL


def test_what_is_timed_is_a_block_of_the_network() -> None:
    sizes = {"num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4}
    network = FluxTransformer2DModel(
        in_channels=16, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6), **sizes
    )
    called: list[str] = []
    for path, module in network.named_modules():
        module.register_forward_hook(lambda *_, path=path: called.append(path))
    assert _median_seconds(_block_of(network, network.device), network.device) > 0
    layers = {path for path in called if path.startswith("transformer_blocks.0.")}
    assert "transformer_blocks.0.attn.to_q" in layers and layers == set(called)


def test_which_architectures_may_have_unequal_shares() -> None:
    assert not [kind for kind, facts in ARCHITECTURES.items() if facts.call == "rows" and not facts.why_equal_shares]
    assert not ARCHITECTURES["FluxTransformer2DModel"].why_equal_shares
    assert ARCHITECTURES["HunyuanVideoTransformer3DModel"].why_equal_compiled
    assert not ARCHITECTURES["WanTransformer3DModel"].why_equal_compiled
