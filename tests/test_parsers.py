"""No command line of the repository takes an abbreviated flag: a new flag would change what an old line means."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("otil_xdit", "examples", "tests")


def parsers() -> Iterator[tuple[str, ast.Call]]:
    """Every call that makes a parser, with its place."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                name = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
                if name.endswith(("ArgumentParser", "add_parser")) or name in ("Parser", "_Parser"):
                    assert isinstance(node, ast.Call)
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def test_no_parser_takes_abbreviations() -> None:
    found = dict(parsers())
    lax = [
        place
        for place, call in found.items()
        if not any(
            given.arg == "allow_abbrev" and isinstance(given.value, ast.Constant) and given.value.value is False
            for given in call.keywords
        )
    ]
    assert not lax and len(found) > 25
