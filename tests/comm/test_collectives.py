"""The exchange on real gloo ranks, against what each mode is defined to give."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

from otil_xdit.comm.collectives import ByKind
from otil_xdit.comm.groups import PatchGroup
from otil_xdit.errors import ExchangeTimeout
from otil_xdit.exchange.communicator import OtilCommunicator
from otil_xdit.method.config import OtilConfig, selectors
from otil_xdit.method.grid import TokenLayout
from otil_xdit.method.selection import TopKSelector
from otil_xdit.runtime.strategies import get_strategy
from tests.support.ranks import run_ranks

ROWS, COLS, TEXT = 4, 8, 8
TOKENS = ROWS * COLS + TEXT
SHAPE = (2, 3, TOKENS, 4)
"""[B, H, S, D] of one rank."""
LAYOUT = TokenLayout(ROWS, COLS, pixels=2, text="rear")


def values(rank: int, step: int, layer: str, image: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that differ between ranks, steps, layers and images, and change more in some places."""
    seed = rank * 100 + sum(layer.encode()) + 1000 * image
    base = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(seed))
    drift = torch.linspace(0, 1, TOKENS)[:, None] * (0.1 * step)
    return tuple(base + drift + 0.01 * step)


def make_run(**settings: object) -> OtilCommunicator:
    """Without codec and prediction: what is sent are values, and old ones stay as they are."""
    group = PatchGroup(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    plain = get_strategy("otil-paper").make_config({"timeout": 20.0, "select": "kv-cosine"})
    return OtilCommunicator(plain.replace(**settings), group)


def generate(
    run: OtilCommunicator, steps: int, image: int = 0, layers: tuple[str, ...] = ("a", "b")
) -> list[torch.Tensor]:
    """What every layer of every step is given, [steps * layers] of [2, B, H, N * S, D]."""
    run.begin()
    seen = []
    for step in range(steps):
        run.observe(latent_map(run.group.rank, step, image), LAYOUT)
        for layer in layers:
            seen.append(torch.stack(run.gather(layer, *values(run.group.rank, step, layer, image))).clone())
        run.clock.tick()
    run.end()
    return seen


def latent_map(rank: int, step: int, image: int) -> torch.Tensor:
    """The latent of which LAYOUT's image tokens are made, [1, 1, 2 * ROWS, 2 * COLS]."""
    tokens = values(rank, step, "latent", image)[0][:1, :, : ROWS * COLS].mean(1)
    return functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (ROWS, COLS)), 2)


def everybody(step: int, layer: str, own_step: int | None = None, image: int = 0) -> torch.Tensor:
    """All patches' values of `step`, this rank's own of `own_step`."""
    ranks = range(dist.get_world_size())
    steps = [own_step if rank == dist.get_rank() and own_step is not None else step for rank in ranks]
    return torch.cat(
        [torch.stack(values(rank, at, layer, image)) for rank, at in zip(ranks, steps, strict=True)], dim=3
    )


def check_sync() -> None:
    for step, seen in enumerate(generate(make_run(freshness="sync"), 3, layers=("a",))):
        assert torch.equal(seen, everybody(step, "a"))


def check_displaced_is_one_step_old() -> None:
    seen = generate(make_run(ratio=1.0, warmup_steps=2), 5, layers=("a",))
    for step in range(5):
        assert torch.equal(seen[step], everybody(step if step < 2 else step - 1, "a", own_step=step)), step


def check_refresh() -> None:
    seen = generate(make_run(ratio=1.0, warmup_steps=1, refresh=3), 7, layers=("a",))
    fresh = [step for step in range(7) if torch.equal(seen[step], everybody(step, "a"))]
    assert fresh == [0, 3, 6]


def check_frozen() -> None:
    seen = generate(make_run(freshness="frozen", warmup_steps=2), 5, layers=("a",))
    assert all(torch.equal(seen[step], everybody(1, "a", own_step=step)) for step in range(2, 5))


def check_selective(select: str) -> None:
    """A remote sub-block is either what it was or what its rank sent a step ago; k of them are new."""
    run = make_run(ratio=1 / 4, warmup_steps=1, select=select, block_size=8 if select == "latent-ssim" else 4)
    seen = generate(run, 6, layers=("a",))
    table = run.kv.place_of("a")[0].table
    blocks, _ = table.shape
    for step in range(2, 6):
        for rank in set(range(dist.get_world_size())) - {dist.get_rank()}:
            at = slice(rank * TOKENS, (rank + 1) * TOKENS)
            now, before = seen[step][:, :, :, at], seen[step - 1][:, :, :, at]
            sent = torch.stack(values(rank, step - 1, "a"))
            new = [bool((now[:, :, :, tokens] == sent[:, :, :, tokens]).all()) for tokens in table]
            old = [bool((now[:, :, :, tokens] == before[:, :, :, tokens]).all()) for tokens in table]
            assert sum(new) == max(1, blocks // 4), (step, new)
            assert all(is_new or is_old for is_new, is_old in zip(new, old, strict=True))


def check_staleness_bound() -> None:
    """With half of k polled, every token's age stays below the bound that polling promises."""
    run = make_run(ratio=1 / 4, warmup_steps=1, select="kv-cosine", polling=0.5, block_size=4)
    steps = 16
    seen = generate(run, steps, layers=("a",))
    blocks, _ = run.kv.place_of("a")[0].table.shape
    selector = TopKSelector(blocks, 1 / 4, 0.5, max_age=0, device=torch.device("cpu"))
    bound = -(-selector.total // selector.polled)
    other = (dist.get_rank() + 1) % dist.get_world_size()
    at = slice(other * TOKENS, (other + 1) * TOKENS)
    for step in range(bound + 1, steps):
        ages = [torch.stack(values(other, step - age, "a")) == seen[step][:, :, :, at] for age in range(1, bound + 1)]
        assert torch.stack(ages).all(dim=(1, 2, 3, 5)).any(dim=0).all(), step


def check_images_do_not_see_each_other() -> None:
    run = make_run(ratio=1 / 4, warmup_steps=1)
    first = generate(run, 5, image=1)
    generate(run, 3, image=2)
    again = generate(run, 5, image=1)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))


def check_layers_keep_apart() -> None:
    """A layer that is skipped at some steps, and one that starts late, get their own values."""
    run = make_run(ratio=1.0, warmup_steps=1)
    run.begin()
    for step in range(6):
        run.observe(None, TokenLayout())
        for layer in ("a", *(["b"] if step != 3 else []), *(["late"] if step >= 2 else [])):
            seen = torch.stack(run.gather(layer, *values(run.group.rank, step, layer)))
            previous = {"b": 2 if step == 4 else step - 1, "late": max(step - 1, 2)}.get(layer, step - 1)
            expected = step if step == 0 or (layer == "late" and step == 2) else previous
            assert torch.equal(seen, everybody(expected, layer, own_step=step)), (layer, step)
        run.clock.tick()
    run.end()


def count_bytes(**settings: object) -> tuple[float, ByKind]:
    run = make_run(warmup_steps=2, **settings)
    generate(run, 6)
    report = run.report()
    return report.kv_bytes_per_step, report.messages


def late_rank() -> str:
    """Rank 1 never answers; rank 0 must say so instead of waiting for ever."""
    # Connections of a group of their own: gloo closes them after a timeout, and the test's ranks still meet at the end.
    group = PatchGroup(dist.new_group([0, 1]), dist.get_rank(), 2)
    run = OtilCommunicator(OtilConfig(timeout=1.0, warmup_steps=1), group)
    run.begin()
    if dist.get_rank() == 1:
        time.sleep(4)
        return ""
    started = time.monotonic()
    with pytest.raises(ExchangeTimeout) as caught:
        run.gather("block.7.attn", *values(0, 0, "a"))
    assert time.monotonic() - started < 3.5
    return str(caught.value)


CHECKS = (
    check_sync,
    check_displaced_is_one_step_old,
    check_refresh,
    check_frozen,
    check_staleness_bound,
    check_images_do_not_see_each_other,
    check_layers_keep_apart,
    *(partial(check_selective, select) for select in selectors() if select != "kv-ssim"),
)


def run_checks() -> None:
    """All of them on the same ranks, since starting ranks takes longer than any check; a traceback names the one."""
    for check in CHECKS:
        check()


@pytest.mark.parametrize("world_size", [2, 3])
def test_modes(world_size: int) -> None:
    run_ranks(world_size, run_checks)


def count_all() -> dict[str, tuple[float, ByKind]]:
    settings = {
        "all": {"ratio": 1.0},
        "half": {"ratio": 1 / 2},
        "eighth": {"ratio": 1 / 8},
        "frozen": {"freshness": "frozen"},
        "sync": {"freshness": "sync"},
    }
    return {name: count_bytes(**given) for name, given in settings.items()}


def test_bytes_are_those_of_the_payloads() -> None:
    counted = run_ranks(2, count_all)[0]
    everything = 2 * torch.Size(SHAPE).numel() * 4 * 2  # keys and values, float32, two layers
    assert counted["sync"] == (everything, {"kv": {"warmup": 4, "steady": 8}})
    assert counted["all"] == (everything, {"kv": {"warmup": 4, "steady": 8}}), (
        "two whole slices do not wait for each other"
    )
    assert counted["eighth"][1] == {"kv": {"warmup": 4, "steady": 4}}, "both layers in one message"
    assert counted["frozen"] == (0, {"kv": {"warmup": 4, "steady": 0}})
    blocks = 2 * 4 + 2  # of 2 x 2 tokens: 4 x 8 of the image, and two runs of text
    for name, count in (("half", blocks // 2), ("eighth", 1)):
        indices = -(-4 * count // 16) * 16
        assert counted[name][0] == everything * count * 4 / TOKENS + 2 * indices, name


def test_a_rank_that_does_not_answer_is_an_error_with_its_place() -> None:
    message = run_ranks(2, late_rank)[0]
    assert "rank 0 of 2" in message and "block.7.attn" in message and "step 0" in message and "1 s" in message


def test_latent_selection_without_a_latent_is_refused() -> None:
    run_ranks(2, _latent_without_latent)


def _latent_without_latent() -> None:
    run = make_run(select="latent-cosine", warmup_steps=1)
    run.begin()
    run.gather("a", *values(run.group.rank, 0, "a"))
    run.clock.tick()
    with pytest.raises(ValueError, match="choose kv-cosine"):
        run.gather("a", *values(run.group.rank, 1, "a"))
