"""Which numbers a pipeline's call, and xDiT's flags of the same names, take: asked before the first step.

diffusers and xDiT make noise of three negative steps, and the default height of 0 pixels, without a word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple


class Range(NamedTuple):
    """The numbers that an argument takes, from `low` to `high`."""

    low: float
    high: float = 10**6
    whole: bool = True

    def refusal(self, name: str, value: Any) -> str | None:
        """Return what to say about a value; None where it is in the range, or no number."""
        if isinstance(value, bool) or not isinstance(value, Real):
            return None
        is_kind = isinstance(value, Integral) or not self.whole
        if is_kind and math.isfinite(value) and self.low <= float(value) <= self.high:
            return None
        kind = "a whole number" if self.whole else "a number"
        shown = value if isinstance(value, Integral) else f"{float(value):g}"
        return f"{name} is {shown}; give {kind} from {self.low:g} to {self.high:g}"


_SHARE = Range(0, 1, whole=False)
_SCALE = Range(0, 1000, whole=False)
_PIXELS = Range(1, 65536)

CALL_NUMBERS = {
    "height": _PIXELS,
    "width": _PIXELS,
    "num_frames": Range(1),
    "num_inference_steps": Range(1, 10_000),
    "num_images_per_prompt": Range(1, 10_000),
    "num_videos_per_prompt": Range(1, 10_000),
    "max_sequence_length": Range(1),
    "guidance_scale": _SCALE,
    "guidance_scale_2": _SCALE,
    "true_cfg_scale": _SCALE,
    "image_guidance_scale": _SCALE,
    "guidance_rescale": _SHARE,
    "strength": _SHARE,
    "eta": _SHARE,
}
"""Arguments of a pipeline's call."""

FLAG_NUMBERS = {
    **{name: CALL_NUMBERS[name] for name in ("height", "width", "num_frames", "num_inference_steps")},
    **{name: CALL_NUMBERS[name] for name in ("max_sequence_length", "guidance_scale", "guidance_scale_2")},
    **dict.fromkeys(
        (
            "data_parallel_degree",
            "ulysses_degree",
            "pipefusion_parallel_degree",
            "tensor_parallel_degree",
            "text_encoder_tp_degree",
            "fully_shard_degree",
        ),
        Range(1, 4096),
    ),
    "seed": Range(-(2**63), 2**64 - 1),
    "flow_shift": _SCALE,
    **dict.fromkeys(("num_iterations", "batch_size", "profile_active", "vsa_block_size", "vsa_top_k"), Range(1)),
    **dict.fromkeys(("warmup_calls", "determinism_check", "profile_wait", "profile_warmup"), Range(0)),
    **dict.fromkeys(("vae_tile_size_height", "vae_tile_size_width"), _PIXELS),
    **dict.fromkeys(("vae_tile_overlap_height", "vae_tile_overlap_width"), Range(0, 65536)),
}
"""Flags of xDiT by name; those of this project have checks of their own."""


def check_numbers(values: Mapping[str, Any], ranges: Mapping[str, Range], prefix: str = "") -> None:
    """Refuse numbers that are out of range; what is None, or no number, is another's matter.

    Args:
        values: by name.
        ranges: by name.
        prefix: of a name in messages, "--" for flags.

    Raises:
        ValueError: naming argument, value and range.
    """
    for name, wanted in ranges.items():
        refusal = wanted.refusal(f"{prefix}{name}", values.get(name))
        if refusal is not None:
            raise ValueError(refusal)
