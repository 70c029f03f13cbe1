"""Writes docs/settings.md from the settings themselves.

python -m otil_xdit.xdit.flags.reference > docs/settings.md
"""

from __future__ import annotations

from collections.abc import Iterable

from otil_xdit.method.config import QUALITIES, SETTINGS
from otil_xdit.method.settings import Setting
from otil_xdit.runtime.strategies import NO_EFFECT, NoEffect

INTRODUCTION = """# Settings

The settings of a strategy, as flags of `xfuser` and as fields of `otil_xdit.OtilConfig` (the same names without
`--otil_`). They are written here by `python -m otil_xdit.xdit.flags.reference`, from the fields themselves.
"""


def settings_page() -> str:
    """Return docs/settings.md."""
    qualities = [(f"`{name}`", _assignments(settings)) for name, settings in QUALITIES.items()]
    return "\n".join(
        [
            INTRODUCTION,
            *_table(("flag", "default", "what it does", "accepted"), map(_row, SETTINGS.values())),
            "",
            "`--otil_quality` stands for several of them:",
            "",
            *_table(("quality", "settings"), qualities),
            "",
            "What has no effect is warned about when it is given:",
            "",
            *_table(("settings", "no effect with", "because"), map(_no_effect_row, NO_EFFECT)),
            "",
            "So is another value of a setting that a strategy fixes, say `--otil_codec` with `compact-1bit`.",
            "",
        ]
    )


def main() -> None:
    """Print the page."""
    print(settings_page(), end="")


def _row(setting: Setting) -> tuple[str, ...]:
    accepted = ", ".join(f"`{choice}`" for choice in setting.choices) or setting.metavar or "no value"
    return f"`--{setting.flag}`", setting.shown_default, setting.text, accepted


def _no_effect_row(row: NoEffect) -> tuple[str, ...]:
    settings, strategies = (", ".join(f"`{name}`" for name in names) for names in (row.settings, row.strategies))
    return settings, strategies, row.reason


def _assignments(settings: dict[str, object]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in settings.items()) or "the defaults"


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [header, ("---",) * len(header), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


if __name__ == "__main__":
    main()
