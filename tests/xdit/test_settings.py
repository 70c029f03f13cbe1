"""A setting stands once: its flag, its help and its row in docs/settings.md come from the field."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest

from otil_xdit.method.codecs import CODECS
from otil_xdit.method.config import SETTINGS, OtilConfig
from otil_xdit.method.settings import setting, settings_of
from otil_xdit.xdit.flags.options import add_otil_args, given_settings, options
from otil_xdit.xdit.flags.reference import settings_page


def test_the_page_is_what_is_written_from_the_fields() -> None:
    page = Path(__file__).parents[2] / "docs" / "settings.md"
    assert page.read_text() == settings_page(), "run python -m otil_xdit.xdit.flags.reference > docs/settings.md"


def test_every_field_is_a_flag_but_the_one_that_the_strategy_sets() -> None:
    assert {one.name for one in fields(OtilConfig)} - set(SETTINGS) == {"requires_cfg_parallel"}
    flags = {option.flag for option in options()}
    assert {f"otil_{name}" for name in SETTINGS} < flags
    assert all(getattr(OtilConfig(), name) == one.default for name, one in SETTINGS.items())


def test_help_tells_choices_and_default() -> None:
    assert SETTINGS["codec"].help.endswith("Choose from raw, int8, int4, 2bit, 1bit, adaptive. Default: adaptive.")
    assert SETTINGS["timeout"].help.endswith("gives up. Default: 300.")
    assert "Default" not in SETTINGS["check"].help
    assert SETTINGS["select"].choices[0] == "latent-cosine" and SETTINGS["select"].choices[-1] == "random"


def test_a_registered_codec_is_in_the_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODECS, "mine", CODECS["raw"])
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_otil_args(parser)
    assert "1bit, adaptive, mine." in " ".join(parser.format_help().split())
    assert given_settings(vars(parser.parse_args(["--otil_codec", "mine", "--otil_seed", "3"]))) == {
        "codec": "mine",
        "seed": 3,
    }


def test_fields_are_read_by_their_type() -> None:
    @dataclass
    class Two:
        how: Literal["a", "b"] = setting("a", "HOW", "Which.")
        many: int = setting(3, "N", "How many.", unet_only=True)
        inner: int = 0

    how, many = settings_of(Two).values()
    assert (how.choices, how.help) == (("a", "b"), "Which. Choose from a, b. Default: a.")
    assert (many.flag, many.parse("4"), many.choices, many.unet_only) == ("otil_many", 4, (), True)
    with pytest.raises(ValueError, match="'x' is not a whole number"):
        many.parse("x")
