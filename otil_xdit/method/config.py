"""`OtilConfig`: every setting of the patch exchange, described once and validated before any process group exists.

Over 300 lines: every setting stands here once, with its default, its choices and its help.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from otil_xdit.method.checks import check_choice, check_integer, check_number, parse_ratio, parse_whole_number
from otil_xdit.method.codecs import CODECS
from otil_xdit.method.scores import CHANGE_SCORES, check_score
from otil_xdit.method.settings import setting, settings_of
from otil_xdit.method.window import AUTO, NONE, PUBLISHED_DIT, PUBLISHED_UNET, WindowSettings

Freshness = Literal["sync", "fresh", "displaced", "frozen"]
"""What a rank knows of the others after warm-up: exact values of this step, payloads of this step, payloads until the
step before, or the last warm-up step."""

ScoreReference = Literal["prediction", "previous"]

Extrapolation = Literal["none", "constant", "fitted"]

CoordinatesFrom = Literal["weights", "none"]

KvCacheDtype = Literal["auto", "same", "bfloat16", "float8"]

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

    Over 200 lines, for the reason at the top of this file.

    Each field's text is its documentation: it is the help of the flag ``--otil_NAME`` and the row in docs/settings.md.
    The values that are listed where a `Literal` stands, or in the dict that a field's `choices` name, are accepted.

    Attributes:
        requires_cfg_parallel: work in two stages in the window (`otil_xdit.hybridiff.stages`), which takes the passes
            with and without the prompt on different ranks. Set by the strategy; not a flag.

    Raises:
        ValueError: naming the setting, its value and what would be accepted.
    """

    freshness: Freshness = setting(
        "displaced",
        "WHEN",
        "How a step after warm-up uses the other ranks' keys and values: sync waits for exact ones of this step; fresh "
        "waits for this step's payloads (CompactFusion, NeurIPS 2025); displaced uses those of the previous step while "
        "the new ones travel (DistriFusion, CVPR 2024); frozen exchanges nothing.",
    )
    fresh_share: float = setting(
        0.5,
        "P",
        "Under displaced: share of the steps, counted from the first, that wait for their payloads as under fresh, in "
        "[0, 1], and 8 steps at least unless it is 0; all steps where the scheduler adds noise at each. Old values do "
        "most harm while the large shapes settle, and where they lack this step's noise.",
    )
    ratio: float = setting(
        0.875,
        "R",
        "Share of its sub-blocks that a rank sends at each step after warm-up, 1/8 or 0.125, in (0, 1]; 1 sends all, "
        "as from 3/4 on do steps that wait under CFG parallelism, for the errors of both passes to be alike.",
        parse=parse_ratio,
    )
    codec: str = setting(
        "adaptive",
        "HOW",
        "Payload format: raw sends the values themselves, the others what the prediction lacks, in as few bits as they "
        "say, adaptive in 2 on average and more for features that vary more. Halo rows that nobody waits for are sent "
        "raw under raw, else in 8 bits.",
        choices=lambda: CODECS,
    )
    coordinates: CoordinatesFrom = setting(
        "weights",
        "HOW",
        "In what coordinates keys and values are compared and coded: weights, in each head's own, in which errors of "
        "equal size do equal harm by the layer's weights, so that networks that draw the same do as well; none, as the "
        "layer gives them, as all codecs but adaptive have them.",
    )
    extrapolation: Extrapolation = setting(
        "fitted",
        "HOW",
        "How far the copies of keys and values move along their velocity to the next step: not at all, by a constant "
        "gain, or by a gain fitted to what a rank's own values did.",
    )
    extrapolation_gain: float = setting(
        0.75,
        "P",
        "Gain of constant extrapolation, in [0, 1]; also that of halo rows and moments that are a step old, unless "
        "there is no extrapolation.",
    )
    velocity_damping: float = setting(
        0.75, "P", "Share of its velocity that is left after a step to a token that was not sent, in [0, 1]."
    )
    block_size: int = setting(4, "B", "Side of a sub-block, in latent pixels.")
    select: str = setting(
        "kv-l2",
        "HOW",
        "What tells the sub-blocks that changed most: a change score of the latent (Otil, CVPR 2026, takes cosine "
        "similarity) or of the layer's keys and values, or chance.",
        choices=selectors,
    )
    score_reference: ScoreReference = setting(
        "prediction",
        "WHAT",
        "What kv- scores compare with: what the other ranks predict, or the step before. The latent is always compared "
        "with the step before.",
    )
    polling: float = setting(
        0.0, "P", "Share of the sent sub-blocks that is taken in turn instead of by change, in [0, 1]."
    )
    max_age: int = setting(
        0, "N", "Bound on the steps that a sub-block stays unsent, kept by taking the oldest in turn; 0 for no bound."
    )
    warmup_steps: int = setting(2, "N", "Synchronous steps before the first one that sends less, at least 1.")
    warmup_codec: str = setting(
        "int8",
        "HOW",
        "Payload format of warm-up steps, which send all tokens: raw makes them exact, int8 takes a quarter of "
        "float32's bytes.",
        choices=lambda: CODECS,
    )
    refresh: int = setting(0, "N", "After warm-up make every N-th step synchronous; 0 for never.")
    tolerance: float = setting(
        0.0,
        "E",
        "A layer whose prediction missed by more than this in the last step, relative to its values, waits for this "
        "step's payloads as under fresh; 0 for no such check. It makes the host wait for the device.",
    )
    halo: SmallFreshness = setting(
        "displaced",
        "WHEN",
        "U-Nets, under displaced: a convolution waits for its neighbours' rows of this step (fresh), or takes those of "
        "the step before (displaced).",
        unet_only=True,
    )
    moments: SmallFreshness = setting(
        "displaced", "WHEN", "U-Nets, under displaced: the same for the moments of a GroupNorm.", unet_only=True
    )
    window: str = setting(
        NONE,
        "WHEN",
        "Exchange patches as --otil_freshness says in a window of the steps only, and synchronously outside; under "
        "hybridiff, when to work in two stages. auto: from when the predictions with and without the prompt have come "
        "close; FIRST:END, steps from 0; none.",
        default_text="none, of hybridiff auto",
    )
    window_steps: int = setting(WindowSettings.steps, "N", "How many steps a window that is found lasts.")
    window_slope: float | None = setting(
        None,
        "E",
        "A window that is found begins when the difference of the two predictions falls by less than this a step.",
        parse=float,
        default_text=f"{PUBLISHED_UNET.slope:g} for U-Nets, {PUBLISHED_DIT.slope:g} for DiTs",
    )
    window_span: int | None = setting(
        None,
        "N",
        "Number of steps over which that fall is taken.",
        parse=parse_whole_number,
        default_text=f"{PUBLISHED_UNET.span} for U-Nets, {PUBLISHED_DIT.span} for DiTs",
    )
    window_cap: int | None = setting(
        None,
        "N",
        "The step at which the window begins if it has not by then.",
        parse=parse_whole_number,
        default_text=f"{PUBLISHED_UNET.cap} for U-Nets, {PUBLISHED_DIT.cap} for DiTs, earlier where the window would "
        "not end in time",
    )
    window_guidance: HeldGuidance = setting(
        "held",
        "HOW",
        "Under hybridiff: the guidance in the window, where one prediction is computed: that of the step before it, or "
        "none.",
    )
    kv_cache_dtype: KvCacheDtype = setting(
        "auto",
        "HOW",
        "How a rank keeps its copies of all patches: auto for values in the layer's own type, with velocities in 8 "
        "bits where that has 16; same for both in the layer's own type; bfloat16 for both in that; float8 for bfloat16 "
        "values with velocities in 8 bits.",
    )
    check: bool = setting(
        False,
        None,
        "For debugging, slow: compare a digest of the copies on all ranks at every layer and step, and stop where they "
        "differ.",
    )
    timeout: float = setting(
        300.0, "SECONDS", "How long a rank waits for the others in one collective before it gives up."
    )
    seed: int = setting(0, "N", "Seed of the random selector.")
    requires_cfg_parallel: bool = False

    def __post_init__(self) -> None:
        for name, described in SETTINGS.items():
            if described.choices:
                check_choice(name, getattr(self, name), described.choices)
        check_number("ratio", self.ratio, above=0.0, up_to=1.0)
        for name in ("fresh_share", "extrapolation_gain", "velocity_damping", "polling"):
            check_number(name, getattr(self, name), above=None, up_to=1.0)
        check_number("tolerance", self.tolerance, above=None, up_to=math.inf)
        check_integer("block_size", self.block_size, low=1, high=MAX_BLOCK)
        check_integer("warmup_steps", self.warmup_steps, low=1)
        for name in ("refresh", "seed", "max_age", "window_steps"):
            check_integer(name, getattr(self, name), low=0)
        self._check_window()
        if self.max_age and self.max_age * self.ratio < 1:
            least = math.ceil(1 / self.ratio)
            raise ValueError(f"max_age is {self.max_age}; at a ratio of {self.ratio:g} give at least {least}, or 0")
        if self.select != "random":
            try:
                check_score(self.select.partition("-")[2], self.block_size)
            except ValueError as error:
                raise ValueError(f"select is {self.select!r} and block_size {self.block_size}: {error}") from None
        check_number("timeout", self.timeout, above=0.0, up_to=math.inf)
        if self.timeout < _SHORTEST_WAIT:
            raise ValueError(f"timeout is {self.timeout:g}; give a number from {_SHORTEST_WAIT:g} up")

    def _check_window(self) -> None:
        for name in ("window_span", "window_cap"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), low=1)
        if self.window_slope is not None:
            check_number("window_slope", self.window_slope, above=0.0, up_to=math.inf)
        _ = self.window_settings.given
        if self.requires_cfg_parallel and self.window == NONE:
            raise ValueError("window is 'none'; two stages work in a window: give auto, or FIRST:END")

    @property
    def uses_coordinates(self) -> bool:
        """True where keys and values are compared and coded in coordinates of their own."""
        by_feature = CODECS[self.codec](torch.float32).by_feature
        return self.coordinates != "none" and self.freshness != "sync" and by_feature

    @property
    def computes_copies(self) -> bool:
        """True where copies of others' keys and values are more than what was sent of them: coded, or moved on."""
        is_coded = self.codec != "raw" or self.warmup_codec != "raw"
        return self.freshness != "sync" and (is_coded or self.extrapolation != "none")

    @property
    def selects_by_layer(self) -> bool:
        """True where each layer's sub-blocks are selected by its own keys and values."""
        return self.ratio < 1 and self.select.startswith("kv")

    @property
    def needs_guidance(self) -> bool:
        """True where both predictions of classifier-free guidance are needed."""
        return self.requires_cfg_parallel or self.window == AUTO

    @property
    def window_settings(self) -> WindowSettings:
        """The settings that begin with ``window``, but for the guidance."""
        return WindowSettings(self.window, self.window_steps, self.window_slope, self.window_span, self.window_cap)

    def check_call(self, steps: int | None, scale: float | None, scale_name: str) -> None:
        """Refuse an image that these settings cannot make.

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
        """Return the point that `quality` names, of `QUALITIES` or None for the default, with `settings` given besides.

        Raises:
            ValueError: naming what would be accepted.
        """
        if quality is not None:
            check_choice("quality", quality, tuple(QUALITIES))
        return cls(**{**(QUALITIES[quality] if quality is not None else {}), **settings})

    def replace(self, **changes: Any) -> OtilConfig:
        """Return a copy with `changes`, validated again."""
        return replace(self, **changes)


QUALITIES: dict[str, dict[str, Any]] = {
    "draft": {"ratio": 0.4375},
    "balanced": {},
    "high": {"ratio": 1.0, "fresh_share": 1.0},
}
"""What ``--otil_quality`` stands for: fewer bytes, the default, and more bytes at every step's wait."""

SETTINGS = settings_of(OtilConfig)
"""What is known about each setting that a user may give, by its name in `OtilConfig`."""
