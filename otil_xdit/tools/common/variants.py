"""Variants of a strategy: ``PRESET[:setting=value,...]``, with the settings that the flags of xfuser have."""

from __future__ import annotations

from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any

from otil_xdit.catalog.folders import Model
from otil_xdit.method.config import OtilConfig
from otil_xdit.runtime.strategies import Strategy, get_strategy, strategies
from otil_xdit.xdit.flags.options import Option, options


def variant_settings() -> dict[str, Option]:
    """Return the flag of each setting that a variant may give."""
    return {option.setting: option for option in options() if option.setting is not None}


@dataclass(frozen=True)
class Variant:
    """A preset with some settings changed.

    Attributes:
        text: as the user wrote it; the row's name.
        preset: name of the strategy.
        config: what the strategy's `make_config` built.
        block: the side of a sub-block where it was given, else None.
    """

    text: str
    preset: str
    config: Any
    block: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """All settings by name."""
        is_data = is_dataclass(self.config) and not isinstance(self.config, type)
        return asdict(self.config) if is_data else {"config": repr(self.config)}

    @property
    def strategy(self) -> Strategy:
        """The preset with this variant's settings for its own."""
        return replace(get_strategy(self.preset), make_config=lambda given: self.config)

    @property
    def requires_cfg_parallel(self) -> bool:
        """Whether the passes with and without the prompt are on different halves of the ranks."""
        return get_strategy(self.preset).requires_cfg_parallel

    def patches(self, ranks: int, cfg_parallel: bool = False) -> int:
        """Return how many patches there are on so many ranks, which `check_ranks` accepts.

        Args:
            ranks: that share an image.
            cfg_parallel: whether the two passes are on different halves of them, whatever the strategy.
        """
        return ranks // 2 if cfg_parallel or self.requires_cfg_parallel else ranks

    def check_ranks(self, ranks: int, cfg_parallel: bool = False) -> None:
        """Refuse a number of ranks, as in `patches`, that cannot be shared out.

        Raises:
            ValueError: naming the flag and what would be accepted.
        """
        if (cfg_parallel or self.requires_cfg_parallel) and ranks % 2:
            raise ValueError(f"--ranks {ranks}: {self.text} has two halves of the ranks; give an even number")

    def check_image(
        self, model: Model, size: int, ranks: int, steps: int, guidance: float, cfg_parallel: bool = False
    ) -> None:
        """Refuse an image that the variant cannot make.

        Args:
            model: that makes it.
            size: height and width in pixels.
            ranks: that share it.
            steps: denoising steps.
            guidance: guidance scale.
            cfg_parallel: as in `patches`.

        Raises:
            ValueError: naming setting or flag and what would be accepted.
        """
        self.check_ranks(ranks, cfg_parallel)
        model.check_size(size, self.patches(ranks, cfg_parallel), self.block)
        self.check_call(steps, guidance)

    def check_call(self, steps: int, guidance: float) -> None:
        """Refuse an image of so many steps, at such a guidance scale, that the settings cannot make.

        Raises:
            ValueError: naming setting or flag and what would be accepted.
        """
        if isinstance(self.config, OtilConfig):
            try:
                self.config.check_call(steps, guidance, "--guidance")
            except ValueError as error:
                raise ValueError(f"{self.text}: {error}") from None


def check_guidance(model: Model, guidance: float) -> None:
    """Refuse a guidance scale that a model's pipeline does not run with.

    Raises:
        ValueError: naming the flag and what would be accepted.
    """
    if not model.is_unet and not model.frames and guidance <= 1:
        raise ValueError(f"--guidance {guidance:g}: xDiT's SD3 pipeline needs guidance; give more than 1")


def parse_variant(text: str, flag: str = "--presets", others: str = "") -> Variant:
    """Parse ``PRESET[:setting=value,...]``.

    Args:
        text: what the user wrote.
        flag: under which it was given, for messages.
        others: what the flag takes besides presets, for messages.

    Raises:
        ValueError: naming the preset, setting or value, and what is accepted.
    """
    preset, _, rest = text.partition(":")
    if preset not in strategies():
        known = f"{', '.join(strategies())}{others}"
        raise ValueError(f"{flag} {text}: {preset!r} is not a preset; choose from {known}")
    try:
        given = dict(_parse_setting(part) for part in rest.split(",") if part.strip())
        return Variant(text, preset, get_strategy(preset).make_config(given), given.get("block_size"))
    except ValueError as error:
        raise ValueError(f"{flag} {text}: {error}") from error


def _parse_setting(part: str) -> tuple[str, Any]:
    name, equals, value = (piece.strip() for piece in part.partition("="))
    known = variant_settings()
    if not equals or name not in known:
        raise ValueError(f"{part!r} is not setting=value; settings are {', '.join(known)}")
    try:
        return name, known[name].parse(value)
    except ValueError as error:
        raise ValueError(f"{name}={value}: {error} ({known[name].help})") from error
