"""`OtilConfig`: every setting of the patch exchange, validated before any process group exists."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from otil_xdit.method.checks import _check_choice, _check_integer, _check_number
from otil_xdit.method.codec import CODECS
from otil_xdit.method.scores import CHANGE_SCORES, check_score
from otil_xdit.method.window import AUTO, NONE, WindowSettings

Freshness = Literal["sync", "fresh", "displaced", "frozen"]
"""What a rank knows of the others after warm-up: this step's exact values, what is sent of this step's, what was sent
until the step before, or the last warm-up step's."""

ScoreReference = Literal["prediction", "previous"]
"""What a layer's keys and values are compared with: what the others predict, or the step before."""

Extrapolation = Literal["none", "constant", "fitted"]
"""Whether copies move on along their velocity, and how far: not, by a constant share, or as far as own values did."""

KvCacheDtype = Literal["auto", "bfloat16", "float8"]
"""How a rank keeps its copies: in the layer's own type, in bfloat16, or with velocities in 8 bits besides."""

SmallFreshness = Literal["fresh", "displaced"]
"""Whether a U-Net's halo rows and moments are those of this step or, like keys and values, of the one before."""

HeldGuidance = Literal["held", "none"]
"""What stands for e_c - e_u where only e_c is computed: what it was at the last step that computed both, or nothing."""

NO_GUIDANCE = "--parallel hybridiff and --otil_window auto compare the predictions with and without the prompt"
"""Why they need classifier-free guidance."""

MAX_BLOCK = 64


def selectors() -> tuple[str, ...]:
    """Return what `OtilConfig.select` takes: what is compared to find the sub-blocks that changed most, and how."""
    return *(f"{source}-{score}" for source in ("latent", "kv") for score in CHANGE_SCORES), "random"


_SHORTEST_WAIT = 1e-3
"""Seconds; collectives count in milliseconds, and take 0 for no deadline at all."""


@dataclass(frozen=True)
class OtilConfig:
    """Settings of the exchange between the patches of one image; the defaults are the strategy ``otil``.

    Attributes:
        freshness: ``sync`` gathers every step's keys and values before they are used (exact); ``fresh`` waits for this
            step's payloads (CompactFusion, NeurIPS 2025); ``displaced`` uses those of the previous step while the new
            ones travel (DistriFusion, CVPR 2024); ``frozen`` exchanges nothing after warm-up.
        fresh_share: under ``displaced`` the share of a generation's steps, counted from the first, that are exchanged
            as under ``fresh``, in [0, 1], and the first 8 at least unless it is 0: while the large shapes settle, an
            old value does most harm.
        ratio: share k/K of a patch's sub-blocks that a rank sends each step after warm-up, in (0, 1]. ``1`` sends all.
        codec: how it sends them. Halo rows that nobody waits for are sent as they are under ``raw``, else in 8 bits.
        extrapolation: how copies are carried to the next step (`otil_xdit.method.predictor.Predictor`).
        extrapolation_gain: the constant of ``extrapolation="constant"``, in [0, 1]; also that of halo rows and moments
        that are a step old,
            unless ``extrapolation="none"``.
        velocity_damping: what is left after a step of the velocity of a token that was not sent, in [0, 1].
        block_size: side b of a b x b sub-block, in latent pixels.
        select: which change picks the sub-blocks (Otil, CVPR 2026, compares the latent by cosine similarity).
        score_reference: what ``kv-`` scores compare with; the latent is always compared with that of the step before.
        polling: share of the k sub-blocks that is taken in turn instead of by change, in [0, 1].
        max_age: bound on the steps that a sub-block stays unsent, kept by taking the oldest in turn; 0 for none.
        warmup_steps: number of initial synchronous steps, at least 1; all tokens are sent.
        warmup_codec: how. ``raw`` makes these steps exact; ``int8`` is a quarter of float32's bytes.
        refresh: after warm-up every `refresh`-th step is synchronous too; 0 for never.
        tolerance: a layer whose prediction missed by more than this in the last step, relative to its values, waits
            for this step's payloads as under ``fresh``; 0 for no such check. Makes the host wait for the device.
        halo: ``fresh`` lets a convolution wait for its neighbours' rows of this step; ``displaced`` takes those of the
            step before (DistriFusion). Read where `freshness` is ``displaced``; U-Nets only.
        moments: the same for the moments of a GroupNorm.
        window: outside it every step is synchronous, and in it `freshness` says how patches are exchanged from the
            first step on: ``none`` for no such thing, ``auto`` to find it (`otil_xdit.method.window`), or
            ``"FIRST:END"``.
        window_steps: how many steps one that is found lasts.
        window_slope, window_span, window_cap: when it begins: where the discrepancy fell by less than this a step over
            so many steps, or else at that step. None for Hybridiff's: of SDXL for U-Nets, of SD3 for DiTs, the cap
            lowered where the steps leave no room.
        window_guidance: what stands for the guidance where it is not computed (`otil_xdit.hybridiff.guidance`).
        stages: 2 for two stages in the window (`otil_xdit.hybridiff.stages`), which need CFG parallelism.
        kv_cache_dtype: what the copies of all patches are stored in.
        check: compare a digest of the copies on all ranks at every layer and step; for debugging, slow.
        timeout: seconds that a rank waits for the others in one collective.
        seed: seeds the ``random`` selector.

    Raises:
        ValueError: naming the setting, its value and what would be accepted.
    """

    freshness: Freshness = "displaced"
    fresh_share: float = 0.5
    ratio: float = 0.875
    codec: str = "2bit"
    extrapolation: Extrapolation = "fitted"
    extrapolation_gain: float = 0.75
    velocity_damping: float = 0.75
    block_size: int = 4
    select: str = "kv-l2"
    score_reference: ScoreReference = "prediction"
    polling: float = 0.0
    max_age: int = 0
    warmup_steps: int = 2
    warmup_codec: str = "int8"
    refresh: int = 0
    tolerance: float = 0.0
    halo: SmallFreshness = "displaced"
    moments: SmallFreshness = "displaced"
    window: str = NONE
    window_steps: int = WindowSettings.steps
    window_slope: float | None = None
    window_span: int | None = None
    window_cap: int | None = None
    window_guidance: HeldGuidance = "held"
    stages: Literal[1, 2] = 1
    kv_cache_dtype: KvCacheDtype = "auto"
    check: bool = False
    timeout: float = 300.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(self, name), get_args(choices))
        for name in ("codec", "warmup_codec"):
            _check_choice(name, getattr(self, name), tuple(CODECS))
        _check_choice("select", self.select, selectors())
        _check_number("ratio", self.ratio, above=0.0, up_to=1.0)
        for name in ("fresh_share", "extrapolation_gain", "velocity_damping", "polling"):
            _check_number(name, getattr(self, name), above=None, up_to=1.0)
        _check_number("tolerance", self.tolerance, above=None, up_to=math.inf)
        _check_integer("block_size", self.block_size, low=1, high=MAX_BLOCK)
        _check_integer("warmup_steps", self.warmup_steps, low=1)
        for name in ("refresh", "seed", "max_age", "window_steps"):
            _check_integer(name, getattr(self, name), low=0)
        self._check_window()
        if self.max_age and self.max_age * self.ratio < 1:
            least = math.ceil(1 / self.ratio)
            raise ValueError(f"max_age is {self.max_age}; at a ratio of {self.ratio:g} give at least {least}, or 0")
        if self.select != "random":
            try:
                check_score(self.select.partition("-")[2], self.block_size)
            except ValueError as error:
                raise ValueError(f"select is {self.select!r} and block_size {self.block_size}: {error}") from None
        _check_number("timeout", self.timeout, above=0.0, up_to=math.inf)
        if self.timeout < _SHORTEST_WAIT:
            raise ValueError(f"timeout is {self.timeout:g}; give a number from {_SHORTEST_WAIT:g} up")

    def _check_window(self) -> None:
        for name in ("window_span", "window_cap"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), low=1)
        if self.window_slope is not None:
            _check_number("window_slope", self.window_slope, above=0.0, up_to=math.inf)
        _ = self.window_settings.given
        if self.stages == 2 and self.window == NONE:
            raise ValueError("window is 'none'; two stages work in a window: give auto, or FIRST:END")

    @property
    def needs_guidance(self) -> bool:
        """Whether both predictions of classifier-free guidance are needed."""
        return self.stages == 2 or self.window == AUTO

    @property
    def window_settings(self) -> WindowSettings:
        """The settings that begin with ``window``, but for the guidance."""
        return WindowSettings(self.window, self.window_steps, self.window_slope, self.window_span, self.window_cap)

    def check_call(self, steps: int | None, scale: float | None, scale_name: str) -> None:
        """Refuse a picture that these settings cannot make.

        Args:
            steps: its number of steps; None where it is not known.
            scale: its guidance scale; None where it is not known.
            scale_name: the argument or flag of the guidance scale, for the message.

        Raises:
            ValueError: naming what is wrong and what would be accepted.
        """
        if steps is not None:
            self.window_settings.check(steps)
        if scale is not None and scale <= 1 and self.needs_guidance:
            raise ValueError(f"{scale_name} is {scale:g}; {NO_GUIDANCE}; give more than 1, or choose another strategy")

    @classmethod
    def of_quality(cls, quality: str | None, **settings: Any) -> OtilConfig:
        """The point that `quality` names, of `QUALITIES` or None for the default, with `settings` instead of its own.

        Raises:
            ValueError: naming what would be accepted.
        """
        if quality is not None:
            _check_choice("quality", quality, tuple(QUALITIES))
        return cls(**{**(QUALITIES[quality] if quality is not None else {}), **settings})

    def replace(self, **changes: Any) -> OtilConfig:
        """A copy with `changes`, validated again."""
        return replace(self, **changes)


QUALITIES: dict[str, dict[str, Any]] = {
    "draft": {"ratio": 0.4375},
    "balanced": {},
    "high": {"ratio": 1.0, "fresh_share": 1.0},
}
"""What ``--otil_quality`` stands for: fewer bytes, the default, and more bytes at every step's wait."""

_CHOICES = {
    "freshness": Freshness,
    "extrapolation": Extrapolation,
    "score_reference": ScoreReference,
    "halo": SmallFreshness,
    "moments": SmallFreshness,
    "window_guidance": HeldGuidance,
    "kv_cache_dtype": KvCacheDtype,
    "stages": Literal[1, 2],
}
