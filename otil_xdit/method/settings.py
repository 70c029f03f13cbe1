"""How a setting is described: the one place of its default, choices and help, from which flags and documents follow.

A field of `OtilConfig` is written ``name: type = setting(default, METAVAR, help, ...)``; `settings_of` reads the fields
back. A field without `setting` is no flag.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar, get_args, get_type_hints

from otil_xdit.method.checks import parse_switch, parse_whole_number

T = TypeVar("T")

_PARSERS: dict[type, Callable[[str], Any]] = {bool: parse_switch, int: parse_whole_number, float: float, str: str}


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: of the field.
        default: its value where nothing is given.
        metavar: what ``--help`` shows for the value; None for a switch.
        text: what it does.
        parse: reads the value from a command line; raises `ValueError`.
        default_text: the default in words, where the value does not say it.
        unet_only: True where it changes nothing of a transformer.
    """

    name: str
    default: Any
    metavar: str | None
    text: str
    parse: Callable[[str], Any]
    default_text: str | None
    unet_only: bool
    _choices: Callable[[], Iterable[str]]

    @property
    def flag(self) -> str:
        return f"otil_{self.name}"

    @property
    def choices(self) -> tuple[str, ...]:
        """The accepted values, with those that have been registered by now; empty where they cannot be listed."""
        return tuple(self._choices())

    @property
    def shown_default(self) -> str:
        if self.default_text is not None:
            return self.default_text
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)

    @property
    def help(self) -> str:
        """What it does, what it takes and what it is by default, in one line."""
        choices = f" Choose from {', '.join(self.choices)}." if self.choices else ""
        default = f" Default: {self.shown_default}." if self.metavar is not None else ""
        return f"{self.text}{choices}{default}"


def setting(
    default: T,
    metavar: str | None,
    text: str,
    *,
    parse: Callable[[str], Any] | None = None,
    choices: Callable[[], Iterable[str]] | None = None,
    default_text: str | None = None,
    unet_only: bool = False,
) -> T:
    """Describe a field of a dataclass; arguments as in `Setting`.

    Args:
        parse: None for what the default's type says.
        choices: None for those of the field's `Literal`, if it is one.
    """
    described = {
        "metavar": metavar,
        "text": text,
        "parse": parse or _PARSERS[type(default)],
        "choices": choices,
        "default_text": default_text,
        "unet_only": unet_only,
    }
    made: Any = field(default=default, metadata=described)
    return made


def settings_of(kind: type) -> dict[str, Setting]:
    """Return the settings of a dataclass by name, in the order of its fields."""
    types = get_type_hints(kind)
    return {found.name: _setting_of(found, types[found.name]) for found in fields(kind) if found.metadata}


def _setting_of(found: Field[Any], annotation: Any) -> Setting:
    described = dict(found.metadata)
    literals = [value for value in get_args(annotation) if isinstance(value, str)]
    choices = described.pop("choices") or (lambda: literals)
    return Setting(name=found.name, default=found.default, _choices=choices, **described)
