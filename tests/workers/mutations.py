"""Small faults put into the method and the exchanges, one at a time: which of them the fast tests find.

    python tests/workers/mutations.py [--only WORDS] [--list]

Each fault is written into a copy of the package, and the test files that concern it are run there until the first test
fails. What fails, or is not done in time, has found the fault. The table goes to stdout; exit code 1 where less than
90% are found. A fault that no longer fits the source stops the run before the first test.

Each run is forked from a process that has imported torch and the like, and so are its ranks.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FOUND_AT_LEAST = 0.9
PATIENCE = 300.0
"""Seconds that the tests of one fault may take; they take a few."""


class Fault(NamedTuple):
    """One change of the source.

    Attributes:
        name: what is wrong then.
        module: below `otil_xdit`.
        before, after: text, which stands there once, and what takes its place.
        tests: files or tests below `tests`, the most likely first.
    """

    name: str
    module: str
    before: str
    after: str
    tests: tuple[str, ...]


def faults_of(module: str, tests: tuple[str, ...], *changes: tuple[str, str, str]) -> list[Fault]:
    return [Fault(name, module, before, after, tests) for name, before, after in changes]


SELECTION = faults_of(
    "method/selection.py",
    ("method/test_selection.py", "method/test_block_selector.py"),
    ("more than the ratio allows", "math.floor(total * ratio + 1e-9)", "math.ceil(total * ratio - 1e-9)"),
    ("none at a small ratio", "max(1, math.floor(", "max(0, math.floor("),
    ("too few are polled", "math.ceil(self.count * polling - 1e-9)", "math.floor(self.count * polling)"),
    ("too few are polled for the bound", "math.ceil(total / max_age)", "math.floor(total / max_age)"),
    ("the place counts as much as the age", "age * self.total + self._order", "age + self._order"),
    ("a polled one is taken twice", "scores.scatter(1, oldest, -math.inf)", "scores"),
    ("what the score took stays old", ".scatter_(1, selected, 0)", ".scatter_(1, oldest, 0)"),
    ("ages stay from image to image", "        self._age.zero_()\n", "        pass\n"),
    ("one selection for all steps", "is None or geometry.selected_at != self._clock.step", "is None"),
    ("all ranks draw alike", "manual_seed(self._config.seed + self._rank)", "manual_seed(self._config.seed)"),
    ("token 0 counts as text", "positions[:, 0] < 0", "positions[:, 0] <= 0"),
    ("sub-blocks in tokens", "self._config.block_size // layout.pixels", "self._config.block_size"),
    ("the latent is compared with itself", "self._previous_latent, self._latent = self._latent,",
     "self._previous_latent, self._latent = latent,"),
    ("text is sent first", "torch.finfo(scores.dtype).min", "torch.finfo(scores.dtype).max"),
)  # fmt: skip

SCORES = faults_of(
    "method/scores.py",
    ("method/test_scores.py", "method/test_block_selector.py"),
    ("norms for squared norms", "dim=-1).square_().flatten(1, -2)", "dim=-1).flatten(1, -2)"),
    ("similarity for change", "change = 1 - dot /", "change = dot /"),
)

PREDICTOR = faults_of(
    "method/predictor.py",
    ("method/test_predictor.py", "exchange/test_kv.py"),
    ("the velocity of several steps for one", ".div_(1 if age is None else age[:, None, None, :, None])", ""),
    ("the change of the velocity for the velocity", "(velocity, faster.add_(before))", "(velocity, faster)"),
    ("ages begin at 2", "self._age[layer].fill_(1)", "self._age[layer].fill_(2)"),
    ("gains up to 2.5", "MOST_GAIN = 1.25", "MOST_GAIN = 2.5"),
    ("rank 0's values for this rank's", "self.value[run, self._rank], velocity, gains",
     "self.value[run, 0], velocity, gains"),
    ("rank 0's velocity for this rank's", 'self._in_float32("velocity", self.velocity[layer, self._rank])',
     'self._in_float32("velocity", self.velocity[layer, 0])'),
    ("small velocities have no gain", "square.clamp_min_(1e-30)", "square.clamp_min_(1e-3)"),
    ("the velocity forgets the gain", "velocity.mul_(moved * kept).addcmul_(levels,",
     "velocity.mul_(kept).addcmul_(levels,"),
    ("the velocity gets all of a correction", "addcmul_(levels, scales * share)", "addcmul_(levels, scales)"),
    ("what was sent is damped, too", "(sent * (1 - self._damping)).add_(self._damping)",
     "torch.full_like(sent, self._damping)"),
    ("what was not sent has the gain of what was", "torch.lerp(of_others, of_sent,", "torch.lerp(of_sent, of_sent,"),
    ("what was sent grows old", "age.mul_(1 - sent).add_(1)", "age.add_(1)"),
    ("rank 0's prediction for this rank's",
     "self._moved(self.value[run, self._rank], velocity, gains.view(*gains.shape, 1, 1, 1), out)",
     "self._moved(self.value[run, 0], velocity, gains.view(*gains.shape, 1, 1, 1), out)"),
    ("values of the image before", "if self._known[layer] else known.zero_()", "if True else known"),
    ("a new image knows the last one", "self._known = [False] * len(self._known)", "pass"),
    ("values sent do not move the others", "        value.addcmul_(velocity, moved)\n        change",
     "        change"),
    ("velocities in 16 bits", "torch.float8_e5m2 if is_short", "value if is_short"),
)  # fmt: skip

CODEC = faults_of(
    "method/codec.py",
    ("method/test_codec.py", "method/test_predictor.py"),
    ("coarser scales", "OCTAVE = 6", "OCTAVE = 4"),
    ("8 bits cut off", "upwards=self.bits == 8", "upwards=False"),
    ("the norm for the root mean square", ".div_(width**0.5)", ""),
    ("codes are rounded up", ".add_(middle).clamp_", ".add_(middle + 0.5).clamp_"),
    ("the highest code is never used", "clamp_(0, highest + 0.5)", "clamp_(0, highest - 0.5)"),
    ("bits overlap", "joined * (8 - self.bits), out=shifted", "joined * self.bits, out=shifted"),
    ("large scales are cut off", "clamp_(-ZERO, 255 - ZERO)", "clamp_(-ZERO, 191 - ZERO)"),
    ("small scales are cut off", "ZERO = 128", "ZERO = 64"),
    ("another border", "(_GAUSSIAN[2][0] + _GAUSSIAN[2][1]) / 2", "_GAUSSIAN[2][0]"),
    ("a worse level of 1 bit", "(0.7979,)", "(1.0,)"),
    ("codes in the other order", "torch.arange(0, 8, bits)", "torch.arange(8 - bits, -1, -bits)"),
    ("what was not sent moves (any codec)", "everywhere.zero_().view(-1, width)", "everywhere.view(-1, width)"),
    ("what was not sent has the last scales", "scales.zero_().view(-1)", "scales.view(-1)"),
    ("scales of the wrong vectors", "index_copy_(0, rows, scales_of(scale_bytes).reshape(-1))",
     "index_copy_(0, rows, scales_of(scale_bytes).flip(-1).reshape(-1))"),
)  # fmt: skip

ADAPTIVE = faults_of(
    "method/adaptive_codec.py",
    ("method/test_adaptive_codec.py", "method/test_predictor.py"),
    ("no middle", "addcmul(plan.middle,", "addcmul(0 * plan.middle,"),
    ("low codes wrap round", "_zero(parts.device), plan.highest", "-plan.highest, plan.highest"),
    ("features' bytes take all codes", "-(-parts * fixed // 2))", "1)"),
    ("keys and values share sizes", "return 2 if vectors % 2 == 0 else 1", "return 1"),
    ("a byte less of an odd number", "(both + part) // parts", "both // parts"),
    ("what was not sent has the last scales", "scales.zero_().view(-1)", "scales.view(-1)"),
)

BIT_PLAN = faults_of(
    "method/bit_plan.py",
    ("method/test_bit_plan.py", "method/test_adaptive_codec.py"),
    ("4 bits seem to gain more", "(2, 4, 0.0540)", "(2, 4, 0.54)"),
    ("gains of amplitudes for variances", "round(OCTAVE / 2 * math.log2(gain))", "round(OCTAVE * math.log2(gain))"),
    ("the weight is not a root", ".clamp_min_(1).sqrt()", ".clamp_min_(1)"),
    ("levels off the middle", "highest[:, None] * -0.5", "highest[:, None] * -0.4"),
    ("the last bit is not spent", "cumsum(dim=-1) <= left", "cumsum(dim=-1) < left"),
    ("a level too many", "right=True).sub_(1)", "right=True)"),
    ("codes in the wrong half of a byte", "ends.bitwise_and_(7)", "ends.bitwise_and_(3)"),
    ("codes of different lengths overlap", "for lane in (1, 2, 3))", "for lane in (1, 2))"),
    ("steps of another number of bits", "1: 1.5958, 2: 0.9957", "1: 0.9957, 2: 1.5958"),
)

HALO = faults_of(
    "exchange/halo.py",
    ("exchange/test_halo_and_moments.py",),
    ("the rank before gets too many rows", "else x[:, :, : self._below]", "else x[:, :, : self._above]"),
    ("the rank after gets the wrong rows", "x[:, :, x.shape[2] - self._above :]",
     "x[:, :, x.shape[2] - self._above - 1 : x.shape[2] - 1]"),
    ("a gain of one less", "above, 1 + self._gain, out=moved_above", "above, self._gain, out=moved_above"),
    ("rows move before two are known", "if not self._gain or self._receptions < 2", "if not self._gain"),
    ("above and below change places", 'self._received[direction == "next"]', 'self._received[direction != "next"]'),
    ("the last rows are not kept",
     "self._received, self._received_before = self._received_before, self._received\n", "pass\n"),
    ("rows that are known are no step", "        self.apply_pending()\n        self._begin_reception()\n"
     "        self.num_calls += 1\n        if is_fused(x):\n            return self._padded_by_kernel(x, precomputed",
     "        self.apply_pending()\n        self.num_calls += 1\n        if is_fused(x):\n"
     "            return self._padded_by_kernel(x, precomputed"),
    ("frozen rows move", 'self._extrapolated() if mode == "displaced" else self._received', "self._extrapolated()"),
)  # fmt: skip

SMALL = faults_of(
    "exchange/small_layers.py",
    ("exchange/test_halo_and_moments.py",),
    ("raw rows are coded", 'self._config.codec != "raw"', 'self._config.codec == "raw"'),
    ("rows move without extrapolation", '0.0 if config.extrapolation == "none" else config.extrapolation_gain',
     "config.extrapolation_gain"),
)  # fmt: skip

CONV = faults_of(
    "networks/unet/conv.py",
    ("networks/test_unet_layers.py",),
    ("too many rows at stride 2", "dilation * (kernel - 1) + 1 - stride - padding",
     "dilation * (kernel - 1) - padding"),
    ("no zeros below the image", "self.padding[0] > below", "self.padding[0] > below + 9"),
    ("rows without columns", "only_columns = (0, self.padding[1])", "only_columns = (0, self.padding[0])"),
)  # fmt: skip

NORM = faults_of(
    "networks/unet/group_norm.py",
    ("networks/test_unet_layers.py",),
    ("the variance is unbiased", "(values - mean).square_().mean(2)",
     "(values - mean).square_().sum(2) / (values.shape[2] - 1)"),
    ("another epsilon", "weight, bias, eps=norm.eps)", "weight, bias)"),
)  # fmt: skip

MOMENTS = faults_of(
    "exchange/moments.py",
    ("exchange/test_halo_and_moments.py",),
    ("a negative variance becomes 0", "torch.where(variance < weights.zero, var, variance)", "variance.clamp_min(0)"),
    ("without a gain the share counts", "if extrapolate and self._gain else weights.one",
     "if extrapolate and self._gain else weights.own"),
    ("the weight goes above 1", "(error.factor(), weights.own, weights.one)", "(error.factor(), weights.own)"),
    ("the weight goes below the share", "(error.factor(), weights.own, weights.one)",
     "(error.factor(), max=weights.one)"),
    ("the last answer is not waited for", "if self._receptions != self._assumed_at + 1:",
     "if self._receptions != self._assumed_at:"),
    ("moments move too far", "clamp_(0, self._gain)", "clamp_(0, 2)"),
    ("moments stay", "clamp_(0, self._gain)", "clamp_(0, 0)"),
    ("variances move below 0", "        assumed.squares.clamp_min_(0)\n", ""),
    ("the last image's errors are fitted", "        super().begin()\n        self._assumed_at = _NEVER\n",
     "        super().begin()\n"),
    ("this rank's moments stay old", "            self._last.of[self._own].copy_(self._sent)\n", ""),
    ("joined moments are no step",
     "        self._begin_reception()\n        self.num_calls += 1\n        if self._collectives.group",
     "        self.num_calls += 1\n        if self._collectives.group"),
)  # fmt: skip

KNOWN = faults_of(
    "exchange/known_moments.py",
    ("exchange/test_halo_and_moments.py",),
    ("ranks' means do not differ", "torch.addcmul(variances, apart, apart)", "variances.clone()"),
    ("variances for mean squares", "self.squares.addcmul_(self.means, self.means)", "pass"),
    ("a fit of itself", "(self._both * self.by,", "(self._both * self.fitted,"),
)

GAIN_TREND = faults_of(
    "method/gain_trend.py",
    ("exchange/test_gain_trend.py",),
    ("the first layer decides alone", "/ (1 + trend[2])", "/ trend[2].clamp(min=0.01)"),
    ("the other way round", "fitted - expected", "expected - fitted"),
    ("gains without a bound", ".clamp_(0, MOST_GAIN)", ""),
    ("nothing fades", "    trend.mul_(FADING)\n", ""),
    ("steps are added up", "self.sums.zero_()", "pass"),
    ("the last image's step goes on", "        self._step = None\n\n    @property", "        pass\n\n    @property"),
)

RESIDUALS = faults_of(
    "exchange/kv_residuals.py",
    ("exchange/test_gain_trend.py",),
    ("gains do not follow", "told = follow(trend, expected)", "pass"),
    ("nothing is added", "            add(trend, self.fitted[layer], expected)\n", "            pass\n"),
    ("displaced gains follow, too", "awaited_at is not None and predictor", "predictor"),
    ("all that was found is expected", "torch.lerp(gains, self.fitted[layer], SHARE,",
     "torch.lerp(gains, self.fitted[layer], 1,"),
)  # fmt: skip

FAULTS = [
    *SELECTION,
    *SCORES,
    *PREDICTOR,
    *GAIN_TREND,
    *RESIDUALS,
    *CODEC,
    *ADAPTIVE,
    *BIT_PLAN,
    *HALO,
    *SMALL,
    *CONV,
    *NORM,
    *MOMENTS,
    *KNOWN,
]


def main() -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[""], help="faults whose module or name holds one of these words")
    parser.add_argument("--list", action="store_true", help="say which there are, and try none")
    arguments = parser.parse_args()
    chosen = [fault for fault in FAULTS if any(words in named(fault) for words in arguments.only)]
    check(chosen)
    if arguments.list:
        print("\n".join(map(named, chosen)))
        return 0
    preload()
    print("| module | fault | found by | seconds |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        copy_tree(copy)
        for tests in dict.fromkeys(fault.tests for fault in chosen):
            failed, _ = run_tests(copy, tests)
            if failed:
                raise SystemExit(f"without a fault {failed} fails already")
        missed = [fault for fault in chosen if not is_found(copy, fault)]
    share = 1 - len(missed) / len(chosen)
    print(f"\n{len(chosen) - len(missed)} of {len(chosen)} found ({share:.0%})")
    return int(share < FOUND_AT_LEAST)


def named(fault: Fault) -> str:
    return f"{fault.module}: {fault.name}"


def check(faults: list[Fault]) -> None:
    """Stop where a fault does not fit the source, or a test file is not there."""
    for fault in faults:
        count = (ROOT / "otil_xdit" / fault.module).read_text().count(fault.before)
        if count != 1:
            raise SystemExit(f"{named(fault)}: the text to change stands there {count} times")
        for test in fault.tests:
            if not (ROOT / "tests" / test).exists():
                raise SystemExit(f"{named(fault)}: there is no tests/{test}")


def copy_tree(copy: Path) -> None:
    """Copy what tests need."""
    left_out = shutil.ignore_patterns("__pycache__", "*.safetensors", ".hypothesis")
    for name in ("otil_xdit", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=left_out)
    shutil.copy(ROOT / "pyproject.toml", copy)


def is_found(copy: Path, fault: Fault) -> bool:
    """Try one fault, and print its row."""
    place = copy / "otil_xdit" / fault.module
    right = place.read_text()
    place.write_text(right.replace(fault.before, fault.after))
    started = time.perf_counter()
    try:
        failed, _ = run_tests(copy, fault.tests)
    finally:
        place.write_text(right)
    seconds = time.perf_counter() - started
    print(f"| {fault.module} | {fault.name} | {failed or '**nothing**'} | {seconds:.0f} |", flush=True)
    return bool(failed)


# ---- a run of tests --------------------------------------------------------------------------------------------------


def preload() -> None:
    """Import what tests import, but the package and its tests."""
    import diffusers  # noqa: F401
    import hypothesis.strategies  # noqa: F401
    import psutil  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torch.distributed  # noqa: F401

    torch.set_num_threads(1)


def run_tests(copy: Path, tests: tuple[str, ...]) -> tuple[str, float]:
    """Return the first test that fails in a process forked for it, or ""; and the seconds."""
    started = time.perf_counter()
    with tempfile.NamedTemporaryFile() as said:
        pid = os.fork()
        if not pid:
            code = 1
            try:
                os.setsid()
                code = in_fork(copy, tests, Path(said.name))
            finally:  # an exception must not go on to what the parent still uses
                os._exit(code)
        ended = wait_for(pid, started + PATIENCE)
        failed = Path(said.name).read_text()
    if ended is None:
        failed = "what takes too long"
    elif ended and not failed:
        failed = "what cannot be collected"
    return failed, time.perf_counter() - started


def wait_for(pid: int, deadline: float) -> int | None:
    """Return a child's status; None where it had to be killed, with all that it has started."""
    while time.perf_counter() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def in_fork(copy: Path, tests: tuple[str, ...], said: Path) -> int:
    """Run the tests in this process, and say which one fails."""
    import pytest

    class FirstFailure:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed and not said.read_text():
                said.write_text(report.nodeid.removeprefix("tests/"))

    os.chdir(copy)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    sys.path[:] = [str(copy), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
    sys.dont_write_bytecode = True
    fork_servers_from_here()
    files = [str(Path("tests") / test) for test in tests]
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *files], plugins=[FirstFailure()]))


def fork_servers_from_here() -> None:
    """Have the tests' fork servers be forks of this process, which has imported nearly everything already."""
    from tests.support import fork_server

    to_servers: list[socket.socket] = []

    class Forked:
        def __init__(self, work: Callable[[], None]) -> None:
            self._pid = os.fork()
            if not self._pid:
                work()
                os._exit(0)

        def wait(self, timeout: float) -> None:
            os.waitpid(self._pid, 0)

    def start(self: fork_server.ForkServer, preload: bool = True) -> None:
        self._requests, theirs = socket.socketpair()
        to_servers.append(self._requests)

        def serve() -> None:
            os.setsid()
            for requests in to_servers:  # a server ends when nobody can ask it any more
                requests.close()
            work = fork_server.serve(theirs)
            if work is not None:
                work()

        self._process = Forked(serve)
        theirs.close()

    fork_server.ForkServer.__init__ = start


if __name__ == "__main__":
    sys.exit(main())
