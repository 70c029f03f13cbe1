"""What the Markdown pages name is there: links, files, modules, settings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from otil_xdit.method.config import OtilConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    page.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "patches/*.md", "otil_xdit/weights/*/README.md")
    for page in ROOT.glob(pattern)
)
HISTORY = Path("docs/LOG.md")
"""Its commands are those of the day on which they were run."""

SETTINGS = {field.name for field in fields(OtilConfig)} | {"quality"}
FLAGS = SETTINGS | {"report"}

LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"(?<![\w./-])(?:tests|examples|docs|otil_xdit|patches)/[\w./*-]*[\w*]")
DOTTED = re.compile(r"(?<![\w./])otil_xdit(?:\.[A-Za-z_]\w*)+")
FLAG = re.compile(r"--otil_(\w+)")
VARIANT = re.compile(r"(?<![\w/])(?:otil|otil-paper|distrifusion|hybridiff|compact-\dbit):((?:\w+=[^,\s`|]+,?)+)")
MADE_UP = "my_"
"""Files of a reader's own, in recipes, are named so."""

ELSEWHERE = {"tests/core"}
"""Folders of xDiT's own repository."""


def test_there_are_pages() -> None:
    assert {Path("README.md"), Path("CONTRIBUTING.md"), Path("docs/quickstart.md")} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    wrong = [link for link in LINK.findall(text_of(page)) if not leads_somewhere(page, link)]
    assert not wrong


@pytest.mark.parametrize("page", [page for page in PAGES if page != HISTORY], ids=str)
def test_files_modules_and_settings_exist(page: Path) -> None:
    text = text_of(page)
    wrong = [name for name in FILE.findall(text) if not is_file(name)]
    wrong += [name for name in DOTTED.findall(text) if MADE_UP not in name and not is_there(name)]
    wrong += [f"--otil_{name}" for name in FLAG.findall(text) if name not in FLAGS]
    wrong += [name for name in settings_of_variants(text) if name not in SETTINGS]
    assert not wrong


def test_what_is_not_there_is_found() -> None:
    assert not leads_somewhere(Path("README.md"), "docs/nowhere.md")
    assert not leads_somewhere(Path("README.md"), "docs/quickstart.md#no-such-heading")
    assert FILE.findall("run `tests/nowhere/test_x.py -x`") == ["tests/nowhere/test_x.py"]
    assert is_there("otil_xdit.parallelize") and not is_there("otil_xdit.method.nothing")
    assert list(settings_of_variants("`otil:ratio=1/8,codec=raw` and `sync`")) == ["ratio", "codec"]


def text_of(page: Path) -> str:
    return (ROOT / page).read_text()


def leads_somewhere(page: Path, link: str) -> bool:
    """Return whether a link leads to a file, and to a heading where it names one. Links out of the project do."""
    if re.match(r"[a-z]+:", link):
        return True
    path, _, anchor = link.partition("#")
    target = (ROOT / page).parent / path if path else ROOT / page
    if not target.exists():
        return False
    return not anchor or anchor in {slug(line) for line in target.read_text().splitlines() if line.startswith("#")}


def slug(heading: str) -> str:
    """Return the anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.lstrip("#").strip().lower()).replace(" ", "-")


def is_file(name: str) -> bool:
    """Return whether a path, which may have stars, is in the project or is known not to be of it."""
    return MADE_UP in name or name in ELSEWHERE or any(ROOT.glob(name))


def is_there(name: str) -> bool:
    """Return whether a dotted name is a module, or an attribute of one."""
    head, _, last = name.rpartition(".")
    try:
        if find_spec(name) is not None:
            return True
    except ModuleNotFoundError:
        pass
    try:
        return hasattr(import_module(head), last)
    except ModuleNotFoundError:
        return bool(head) and "." in head and is_there(head) and has_attribute(head, last)


def has_attribute(name: str, attribute: str) -> bool:
    """Return whether an attribute of a module has one of that name, as a class its methods."""
    module, _, owner = name.rpartition(".")
    return hasattr(getattr(import_module(module), owner, None), attribute)


def settings_of_variants(text: str) -> Iterator[str]:
    """Yield the settings that ``otil:NAME=VALUE,...`` name."""
    for settings in VARIANT.findall(text):
        yield from (part.partition("=")[0] for part in settings.rstrip(",").split(",") if part)
