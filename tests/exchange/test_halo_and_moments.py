"""Halo rows and moments on real gloo ranks, against the whole map."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist

from otil_xdit.comm.collectives import CounterKey
from otil_xdit.comm.groups import PatchGroup
from otil_xdit.dryrun.job import ParallelDegrees
from otil_xdit.dryrun.recorder import Log, RecordedCollectives
from otil_xdit.dryrun.stand_ins import patch_group
from otil_xdit.exchange.communicator import OtilCommunicator
from otil_xdit.method.config import OtilConfig
from tests.support.ranks import run_ranks

ROWS = (3, 2, 4)
"""Rows of each rank, more and fewer than its neighbours'."""

PLAIN = {
    "halo": "fresh",
    "moments": "fresh",
    "codec": "raw",
    "extrapolation": "none",
    "fresh_share": 0.0,
    "timeout": 20.0,
}


def whole_map(step: int) -> torch.Tensor:
    """[2, 8, rows of everybody, 5]; changes by a tenth of itself at each step."""
    rows = sum(ROWS[: dist.get_world_size()])
    draw = torch.Generator().manual_seed(1)
    base, drift = torch.randn(2, 2, 8, rows, 5, generator=draw)
    return base + 0.1 * step * drift


def own_rows(x: torch.Tensor) -> slice:
    start = sum(ROWS[: dist.get_rank()])
    return slice(start, start + ROWS[dist.get_rank()])


def make_run(**settings: object) -> OtilCommunicator:
    group = PatchGroup(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    return OtilCommunicator(OtilConfig(**{**PLAIN, **settings}), group)


def widened(own: torch.Tensor, remote: torch.Tensor, above: int, below: int) -> torch.Tensor:
    """Own rows of one map between the neighbours' rows of another, zeros beyond the edges."""
    padded = torch.nn.functional.pad(remote, (0, 0, above, below))
    rows = own_rows(own)
    top, bottom = padded[:, :, rows.start : rows.start + above], padded[:, :, rows.stop + above :][:, :, :below]
    return torch.cat([top, own[:, :, rows], bottom], dim=2)


def halos(run: OtilCommunicator, above: int, below: int, steps: int = 5) -> list[torch.Tensor]:
    run.begin()
    seen = []
    for step in range(steps):
        x = whole_map(step)
        seen.append(run.halo("conv", x[:, :, own_rows(x)], above, below).clone())
        run.clock.tick()
    run.end()
    return seen


def check_halos() -> None:
    for above, below in ((1, 1), (1, 0), (0, 2), (2, 1)):
        for settings in ({"freshness": "sync"}, {"halo": "fresh"}):
            for step, seen in enumerate(halos(make_run(**settings), above, below)):
                assert torch.equal(seen, widened(whole_map(step), whole_map(step), above, below)), (settings, step)
        run = make_run(halo="displaced", warmup_steps=2)
        for _ in range(2):  # the second image must not see the first
            for step, seen in enumerate(halos(run, above, below)):
                remote = whole_map(step if step < 2 else step - 1)
                assert torch.equal(seen, widened(whole_map(step), remote, above, below)), step
        frozen = halos(make_run(freshness="frozen", warmup_steps=2), above, below)
        assert torch.equal(frozen[-1], widened(whole_map(4), whole_map(1), above, below))


def check_moved_on() -> None:
    """What moves evenly is known exactly from the two steps before, at a gain of 1."""
    moving = {"halo": "displaced", "moments": "displaced", "extrapolation": "fitted", "extrapolation_gain": 1.0}
    moving["warmup_steps"] = 1
    for codec, tolerance in (("raw", 1e-5), ("2bit", 0.1)):
        run = make_run(codec=codec, **moving)
        for _ in range(2):  # the second image must not go on from the first
            for step, seen in enumerate(halos(run, 1, 2)):
                remote = whole_map(max(step - 1, 0) if step < 2 else step)
                expected = widened(whole_map(step), remote, 1, 2)
                assert torch.allclose(seen, expected, atol=tolerance), (codec, step, (seen - expected).abs().max())
                own = own_rows(whole_map(step))
                kept = seen[:, :, 1 : 1 + own.stop - own.start]
                assert torch.equal(kept, whole_map(step)[:, :, own]), "own rows are neither moved nor coded"
        for step, (mean, _) in enumerate(moments(run)):
            if step >= 2:
                assert torch.allclose(mean, groups(whole_map(step))[1], atol=1e-5), step


def check_coded() -> None:
    """A row that is sent in 8 bits is off by half a step of its vector's largest number at most."""
    run = make_run(codec="int8", halo="displaced", warmup_steps=1)
    for step, seen in enumerate(halos(run, 1, 1)):
        stale = whole_map(max(step - 1, 0))
        expected = widened(whole_map(step), stale, 1, 1)
        bound = stale.abs().max() * 2 ** (1 / 6) / 127 / 2 * 1.01
        error = (seen - expected).abs().max()
        assert error <= (0.0 if step < 2 else bound), (step, error)
        assert step < 2 or error > 0, "rows were not coded"


def check_bytes() -> tuple[int, int]:
    run = make_run(warmup_steps=1)
    halos(run, 2, 1, steps=3)
    halo = run.report().sent_bytes["halo"]["steady"]
    moments(run, steps=3)
    return halo, run.report().sent_bytes["moments"]["steady"]


def moments(
    run: OtilCommunicator, steps: int = 5, maps: Callable[[int], torch.Tensor] = whole_map, total: int | None = None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    run.begin()
    run.clock.total = total
    share = torch.tensor(ROWS[: dist.get_world_size()]) / sum(ROWS[: dist.get_world_size()])
    seen = []
    for step in range(steps):
        x = maps(step)
        var, mean = groups(x[:, :, own_rows(x)])
        seen.append(run.moments("norm", mean, var, share))
        run.clock.tick()
    run.end()
    return seen


def groups(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Biased variance and mean of 4 groups, [2, 4] each."""
    return torch.var_mean(x.unflatten(1, (4, 2)), dim=(2, 3, 4), correction=0)


def check_moments() -> None:
    for settings in ({"freshness": "sync"}, {"moments": "fresh"}):
        for step, (mean, var) in enumerate(moments(make_run(**settings))):
            exact_var, exact_mean = groups(whole_map(step))
            assert torch.allclose(mean, exact_mean, atol=1e-6) and torch.allclose(var, exact_var, atol=1e-6)
    displaced = moments(make_run(moments="displaced", warmup_steps=2))
    for step in (2, 3, 4):
        stale, fresh = whole_map(step - 1), whole_map(step)
        _, all_mean = groups(stale)
        _, own_stale = groups(stale[:, :, own_rows(stale)])
        own_var, own_fresh = groups(fresh[:, :, own_rows(fresh)])
        mean, var = displaced[step]
        assert torch.allclose(mean, all_mean + own_fresh - own_stale, atol=1e-6)
        assert (var >= 0).all() and not torch.allclose(var, own_var)


def check_fitted() -> None:
    """Where this rank's part is all that moves, and where everything moves alike, it is known how the whole does."""
    settings = {"moments": "displaced", "extrapolation": "fitted", "warmup_steps": 2}
    jumps = torch.randn(7, 2, 8, 1, 1, generator=torch.Generator().manual_seed(5))

    def all_jump(step: int) -> torch.Tensor:
        return whole_map(0) + jumps[step]

    def one_jumps(step: int) -> torch.Tensor:
        x = whole_map(0)
        x[:, :, own_rows(x)] += jumps[step]
        return x

    run = make_run(**settings)
    for _ in range(2):  # the second image must not fit by the first
        for step, (mean, _) in enumerate(moments(run, 7, all_jump)):
            error = (mean - groups(all_jump(step))[1]).abs().max()
            assert error < 1e-5 if step != 2 else error > 1e-2, (step, error)  # nothing to fit by at the first
    # The first step that is displaced comes at the reception that would answer the shorter image's last one.
    halves = {**settings, "fresh_share": 0.5}
    run = make_run(**halves)
    moments(run, 10, total=10)
    pairs = zip(moments(run, 12, total=20), moments(make_run(**halves), 12, total=20), strict=True)
    assert all(torch.equal(one, other) for seen in pairs for one, other in zip(*seen, strict=True))
    # Every rank in turn, as each needs the others to stand still.
    for rank in range(dist.get_world_size()):
        mine = dist.get_rank() == rank
        seen = moments(make_run(**settings), 7, one_jumps if mine else lambda _: whole_map(0))
        for step, (mean, var) in enumerate(seen if mine else []):
            exact_var, exact_mean = groups(one_jumps(step))
            assert torch.allclose(mean, exact_mean, atol=1e-5) and torch.allclose(var, exact_var, atol=1e-4), step


def check_negative_variance() -> None:
    """Where the correction gives a negative variance, the rank's own stands in."""
    run = make_run(moments="displaced", warmup_steps=1)
    run.begin()
    share, one, rank = torch.tensor([0.5, 0.5]), torch.ones(1, 1), dist.get_rank()
    for mean in (0.0, 4.0 * rank, (0.5, 2.0)[rank]):
        whole, var = run.moments("norm", one * mean, one * 0.5, share)
        run.clock.tick()
    run.end()
    # Stale means 0 and 4, stale mean squares 0.5 and 16.5; fresh own mean squares 0.75 and 4.5.
    square = 8.5 + (0.75 - 0.5, 4.5 - 16.5)[rank]
    assert whole.item() == (2.5, 0.0)[rank]
    assert var.item() == (square - 2.5**2, 0.5)[rank]


def joined(run: OtilCommunicator, x: torch.Tensor, above: int, below: int) -> tuple[torch.Tensor, ...] | None:
    """Moments of the whole map `x` and the rows beyond this rank's, asked together; zeros for rows beyond the edges."""
    share = torch.tensor(ROWS[: dist.get_world_size()]) / sum(ROWS[: dist.get_world_size()])
    own = x[:, :, own_rows(x)]
    var, mean = groups(own.float())
    found = run.norm_halo(("norm", "conv"), mean, var, share, own, above, below)
    if found is None:
        return None
    mean, var, (top, bottom) = found
    assert (top is None, bottom is None) == (dist.get_rank() == 0, dist.get_rank() == dist.get_world_size() - 1)
    top = own.new_zeros(*own.shape[:2], above, own.shape[3]) if top is None else top
    bottom = own.new_zeros(*own.shape[:2], below, own.shape[3]) if bottom is None else bottom
    return mean, var, torch.cat([top, own, bottom], dim=2)


def check_joined() -> None:
    """One wait gives what two give, for rows of any type, to the bit."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        for above, below in ((1, 1), (2, 1), (0, 2)):
            run = make_run(freshness="sync")
            run.begin()
            for step in range(3):
                x = whole_map(step).to(dtype)
                mean, var, seen = joined(run, x, above, below)
                exact_var, exact_mean = groups(x.float())
                assert torch.allclose(mean, exact_mean, atol=1e-6) and torch.allclose(var, exact_var, atol=1e-6)
                assert torch.equal(seen, widened(x, x, above, below)), (dtype, above, below, step)
                run.clock.tick()
            run.end()


def check_joined_then_displaced() -> None:
    """What the last joined step brought is what the first displaced one reads: of moments, and of the rows put."""
    for small in ({"halo": "displaced"}, {"moments": "displaced"}, {"halo": "displaced", "moments": "displaced"}):
        run = make_run(warmup_steps=2, **small)
        run.begin()
        for step in range(2):
            _, _, seen = joined(run, whole_map(step), 1, 1)
            own = 7 * whole_map(step)[:, :, own_rows(seen)]
            rows = (None if dist.get_rank() == 0 else 7 * seen[:, :, :1], 7 * seen[:, :, -1:])
            run.halo("conv", own, 1, 1, rows if dist.get_rank() < dist.get_world_size() - 1 else (rows[0], None))
            run.clock.tick()
        assert joined(run, whole_map(2), 1, 1) is None
        x = 7 * whole_map(2)
        remote = 7 * whole_map(1 if "halo" in small else 2)
        assert torch.equal(run.halo("conv", x[:, :, own_rows(x)], 1, 1), widened(x, remote, 1, 1))
        stale, fresh = (whole_map(step) for step in (1, 2))
        _, all_mean = groups(stale if "moments" in small else fresh)
        _, own_stale = groups(stale[:, :, own_rows(stale)])
        own_var, own_mean = groups(fresh[:, :, own_rows(fresh)])
        share = torch.tensor(ROWS[: dist.get_world_size()]) / sum(ROWS[: dist.get_world_size()])
        mean, _ = run.moments("norm", own_mean, own_var, share)
        moved = own_mean - own_stale if "moments" in small else 0
        assert torch.allclose(mean, all_mean + moved, atol=1e-6)
        run.end()


JOINED = (CounterKey("halo"), CounterKey("moments"), CounterKey("halo", "warmup"))


def count_joined() -> list[tuple[int, int]]:
    run = make_run(warmup_steps=1)
    run.begin()
    for step in range(3):
        joined(run, whole_map(step).half(), 1, 1)
        own = whole_map(step)[:, :, own_rows(whole_map(step))].half()
        run.halo("conv", own, 1, 1, (None, None))
        run.clock.tick()
    run.end()
    traffic = run.collectives.traffic
    return [(traffic.sent[key], traffic.messages[key]) for key in JOINED]


@pytest.mark.parametrize("ranks", [2, 3])
def test_moments_and_rows_for_one_wait(ranks: int) -> None:
    run_ranks(ranks, check_joined)


@pytest.mark.parametrize("ranks", [2, 3])
def test_displaced_steps_go_on_from_joined_ones(ranks: int) -> None:
    run_ranks(ranks, check_joined_then_displaced)


def test_two_ranks_send_moments_and_rows_in_one_message() -> None:
    row, moments = 2 * 8 * 5 * 2, 2 * 2 * 4 * 4  # [2, 8, 1, 5] float16; mean and variance of [2, 4] float32
    expected = [(2 * row, 2), (2 * moments, 0), (row, 1)]
    assert run_ranks(2, count_joined) == [expected] * 2
    upper, middle, _ = run_ranks(3, count_joined)
    assert upper == [(2 * row, 2), (2 * moments, 2), (row, 1)]
    assert middle == [(4 * row, 4), (2 * moments, 2), (2 * row, 2)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_halos(ranks: int) -> None:
    run_ranks(ranks, check_halos)


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_is_a_step_old_is_moved_on(ranks: int) -> None:
    run_ranks(ranks, check_moved_on)


def test_rows_that_nobody_waits_for_are_sent_in_8_bits() -> None:
    run_ranks(2, check_coded)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_ranks_own_moments_count_as_much_as_they_tell_of_the_whole(ranks: int) -> None:
    run_ranks(ranks, check_fitted)


@pytest.mark.parametrize("ranks", [2, 3])
def test_moments(ranks: int) -> None:
    run_ranks(ranks, check_moments)


def test_negative_variance_falls_back_to_own() -> None:
    run_ranks(2, check_negative_variance)


def test_halo_and_moments_are_counted_where_they_are_sent() -> None:
    row = 2 * 8 * 5 * 4  # [2, 8, 1, 5] float32
    halo = [halo for halo, _ in run_ranks(3, check_bytes)]
    # Two steps after warm-up: `above` = 2 rows to the next rank, `below` = 1 to the previous.
    assert halo == [2 * 2 * row, 2 * 3 * row, 2 * 1 * row]


@pytest.mark.parametrize("batch", [1, 2])
def test_a_padded_map_keeps_its_memory_format(batch: int) -> None:
    group = patch_group(ParallelDegrees(patches=2), 0)
    run = OtilCommunicator(OtilConfig(), group, partial(RecordedCollectives, log=Log()))
    x = torch.randn(batch, 4, 6, 5)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        padded = run.halo("c", x.contiguous(memory_format=memory_format), 1, 1)
        assert padded.is_contiguous(memory_format=memory_format)
        assert torch.equal(padded[:, :, 1:-1], x)
