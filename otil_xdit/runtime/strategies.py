"""The registry of parallel strategies: what ``--parallel NAME`` may name.

Another package brings its own by an entry point in the group ``xfuser.parallel_strategies`` whose name is the
strategy's and whose object is a `Strategy` (or a function that returns one); `register_strategy` does the same at run
time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, NamedTuple

from otil_xdit.comm.groups import PatchGroup
from otil_xdit.exchange.communicator import OtilCommunicator
from otil_xdit.exchange.protocol import Communicator
from otil_xdit.method.config import OtilConfig
from otil_xdit.method.window import AUTO

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "xfuser.parallel_strategies"


@dataclass(frozen=True)
class Strategy:
    """A way to run one image on several ranks.

    Attributes:
        name: what ``--parallel`` takes.
        summary: one line for ``--help``.
        make_config: builds the strategy's settings from those that the user gave (names as in `OtilConfig`, only the
            given ones; without any it returns the strategy's own). Raises `ValueError` for what it cannot do; called
            before any process group exists.
        connect: builds the communicator of one pipeline from the settings and the ranks that hold its patches.
    """

    name: str
    summary: str
    make_config: Callable[[Mapping[str, Any]], Any]
    connect: Callable[[Any, PatchGroup], Communicator] = OtilCommunicator

    degree_args: ClassVar[tuple[str, ...]] = ("--patch_degree",)
    """Flags that multiply the number of processes, for a launcher that knows only xDiT's own (see ``patches/``)."""

    @property
    def requires_cfg_parallel(self) -> bool:
        """True where the passes with and without the prompt run on different ranks, as its settings say.

        ``--use_cfg_parallel`` is then taken as given.
        """
        return bool(getattr(self.make_config({}), "requires_cfg_parallel", False))

    def install(self) -> None:
        """Hook the plugin into xfuser; what a loader of the entry-point group calls before it parses flags."""
        from otil_xdit import register

        register()


class NoEffect(NamedTuple):
    """Settings that a user may give and that change nothing under some strategies, and why."""

    settings: tuple[str, ...]
    strategies: tuple[str, ...]
    reason: str


_FIXED_POINTS = ("distrifusion", "compact-1bit", "compact-2bit", "sync", "naive", "hybridiff")
_NOT_DISPLACED = ("compact-1bit", "compact-2bit", "sync", "naive", "hybridiff")
_ONE_STAGE = ("otil", "otil-paper", "distrifusion", "compact-1bit", "compact-2bit", "sync", "naive")
_SELECTION = ("block_size", "select", "score_reference", "polling", "max_age", "seed")
_WINDOW = ("window", "window_steps", "window_slope", "window_span", "window_cap")

NO_EFFECT = (
    NoEffect(_SELECTION, _FIXED_POINTS, "every sub-block is sent"),
    NoEffect(("extrapolation_gain", "velocity_damping"), ("otil-paper", *_FIXED_POINTS), "nothing is extrapolated"),
    NoEffect(("fresh_share", "tolerance"), ("otil-paper", *_FIXED_POINTS), "the strategy says which steps wait"),
    NoEffect(("quality",), ("otil-paper", *_FIXED_POINTS), "the strategy says what is sent"),
    NoEffect(("halo", "moments"), _NOT_DISPLACED, "they are never displaced"),
    NoEffect(("warmup_steps", "kv_cache_dtype", "check"), ("sync", "hybridiff"), "nothing is kept from step to step"),
    NoEffect(("refresh",), ("sync", "hybridiff", "naive"), "steps after warm-up are all alike"),
    NoEffect(_WINDOW, ("sync",), "steps are all alike"),
    NoEffect(("window_guidance",), _ONE_STAGE, "both predictions are computed at every step"),
)
"""What has no effect where; a setting that a strategy fixes (`_preset`) has none either, and needs no row."""


def without_effect(strategy: str) -> set[str]:
    """Return the settings that change nothing under a strategy of this project."""
    return {setting for row in NO_EFFECT if strategy in row.strategies for setting in row.settings}


def _preset(
    name: str,
    summary: str,
    fixed: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Strategy:
    """Return a named point of `OtilConfig`.

    It warns about a setting that has no effect: one of `without_effect`, or another value than a fixed one.

    Args:
        fixed: the settings that make it that strategy.
        defaults: its own defaults where they are not those of `OtilConfig`.
    """
    fixed, defaults = {"requires_cfg_parallel": False, **(fixed or {})}, defaults or {}
    unread = without_effect(name)

    def make_config(given: Mapping[str, Any]) -> OtilConfig:
        for setting in sorted(given):
            if setting in unread or fixed.get(setting, given[setting]) != given[setting]:
                logger.warning("--otil_%s has no effect with --parallel %s", setting, name)
        chosen = {setting: value for setting, value in given.items() if setting not in unread}
        return OtilConfig.of_quality(chosen.pop("quality", None), **{**defaults, **chosen, **fixed})

    return Strategy(name, summary, make_config)


_NOT_PREDICTED: dict[str, Any] = {
    "extrapolation": "none",
    "coordinates": "none",
    "tolerance": 0.0,
    "warmup_codec": "raw",
}
_ALL_VALUES: dict[str, Any] = {"ratio": 1.0, "codec": "raw"}
_ALL_STALE: dict[str, Any] = {"freshness": "displaced", "fresh_share": 0.0, "halo": "displaced", "moments": "displaced"}

OTIL = _preset(
    "otil", "this project's best: a few bits of what the others cannot predict, displaced once shapes settle"
)
OTIL_PAPER = _preset(
    "otil-paper",
    "Otil as published: displaced patches; each step sends only the sub-blocks that changed most",
    fixed={**_ALL_STALE, **_NOT_PREDICTED, "codec": "raw", "score_reference": "previous"},
    defaults={"ratio": 0.125, "select": "latent-cosine", "polling": 0.5, "warmup_steps": 4},
)
DISTRIFUSION = _preset(
    "distrifusion",
    "DistriFusion as published: displaced patches; each step sends everything, a step late",
    fixed={**_ALL_STALE, **_NOT_PREDICTED, **_ALL_VALUES},
    defaults={"warmup_steps": 4},
)
COMPACT_1BIT, COMPACT_2BIT = (
    _preset(
        f"compact-{codec}",
        f"CompactFusion's point: each step waits for {codec[0]}-bit residuals of everything",
        fixed={**_NOT_PREDICTED, "freshness": "fresh", "ratio": 1.0, "codec": codec},
    )
    for codec in ("1bit", "2bit")
)
SYNC = _preset(
    "sync",
    "every step waits for everybody: exact",
    fixed={**_NOT_PREDICTED, **_ALL_VALUES, "freshness": "sync"},
)
NAIVE = _preset(
    "naive",
    "nothing is exchanged after warm-up: a lower bound",
    fixed={**_NOT_PREDICTED, **_ALL_VALUES, "freshness": "frozen"},
)

HYBRIDIFF = _preset(
    "hybridiff",
    "Hybridiff: one half of the ranks computes with the prompt, one without; in a window each half of the network",
    fixed={**_NOT_PREDICTED, **_ALL_VALUES, "freshness": "sync", "requires_cfg_parallel": True},
    defaults={"window": AUTO},
)

REGISTERED = {
    strategy.name: strategy
    for strategy in (OTIL, OTIL_PAPER, DISTRIFUSION, COMPACT_1BIT, COMPACT_2BIT, HYBRIDIFF, SYNC, NAIVE)
}
"""Strategies by name, but for those of entry points; `register_strategy` adds to them."""


def register_strategy(strategy: Strategy, replace: bool = False) -> Strategy:
    """Make ``--parallel strategy.name`` known.

    Raises:
        ValueError: when another strategy has the name and `replace` is not given.
    """
    known = REGISTERED.get(strategy.name)
    if known is not None and known != strategy and not replace:
        raise ValueError(f"a parallel strategy named {strategy.name!r} is registered already")
    REGISTERED[strategy.name] = strategy
    return strategy


def strategies() -> dict[str, Strategy]:
    """Return every known strategy by name: registered ones first, then those of entry points.

    An entry point that cannot be loaded is named in a warning and left out.
    """
    found = dict(REGISTERED)
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        strategy = None if entry.name in found else _loaded(entry)
        if strategy is not None:
            found[entry.name] = strategy
    return found


@cache
def _loaded(entry: EntryPoint) -> Strategy | None:
    """Return what the entry point names, or None; it is tried, and warned about, once."""
    try:
        loaded = entry.load()
        strategy = loaded if isinstance(loaded, Strategy) else loaded()
        if not isinstance(strategy, Strategy) or strategy.name != entry.name:
            raise TypeError(f"it gives {strategy!r} instead of a Strategy of that name")
    except Exception as error:
        logger.warning("parallel strategy %r of %s cannot be loaded: %s", entry.name, entry.value, error)
        return None
    return strategy


def get_strategy(name: str) -> Strategy:
    """Return the strategy of that name.

    Raises:
        ValueError: naming the known ones.
    """
    found = strategies()
    if name not in found:
        raise ValueError(f"--parallel {name}: no such strategy; choose from {', '.join(found)}")
    return found[name]
