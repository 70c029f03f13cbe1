"""The package is built in floors, and an import only goes down them (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "otil_xdit"

FLOORS = (
    "errors",
    "method",
    "comm",
    "catalog",
    "exchange",
    "networks",
    "hybridiff",
    "runtime",
    "dryrun",
    "xdit",
    "serve",
    "tools",
)
"""Rooms from the ground up. A module may import from its own room and from those before it."""

ONLY_IN = {
    "xfuser": ("xdit", "tools"),
    "yunchang": ("xdit",),
    "diffusers": ("catalog", "networks", "dryrun", "xdit", "tools"),
    "transformers": ("tools", "xdit"),
    "torch.distributed": ("comm", "xdit", "tools"),
}
"""Packages that only some rooms may import."""


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below `otil_xdit`."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(path: Path) -> Iterator[str]:
    """Dotted names that a module imports, also inside functions; those under TYPE_CHECKING are types only."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str:
    return module.partition(".")[0]


def own_imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a module imports."""
    found = set()
    for name in imports_of(path):
        if name.startswith("otil_xdit."):
            inner = name.removeprefix("otil_xdit.")
            found.add(inner if inner in known else inner.rpartition(".")[0])
    return found - {""}


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(module) for module in modules()} - {"", "__main__", "run"}
    assert rooms - {"weights"} <= set(FLOORS)
    assert {path.stem for path in ROOT.glob("*.py")} == {"__init__", "__main__", "errors", "run"}


@pytest.mark.parametrize("room", FLOORS)
def test_an_import_goes_down(room: str) -> None:
    known = modules()
    below = set(FLOORS[: FLOORS.index(room) + 1])
    climbs = {
        f"{module} -> {target}"
        for module, path in known.items()
        if room_of(module) == room
        for target in own_imports(path, known)
        if room_of(target) not in below
    }
    assert not climbs


def test_no_circle_inside_a_room() -> None:
    known = modules()
    graph = {module: own_imports(path, known) & set(known) for module, path in known.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for target in sorted(graph[module] - {module}):
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_package_is_imported_in_its_rooms_only(package: str) -> None:
    users = {
        room_of(module)
        for module, path in modules().items()
        if any(name == package or name.startswith(f"{package}.") for name in imports_of(path))
    }
    assert users <= set(ONLY_IN[package])


def test_what_is_long_says_why() -> None:
    """A module over 300 lines and a class over 200 give the reason in their docstring: "Over 300 lines: ..."."""
    silent = []
    for name, path in modules().items():
        tree = ast.parse(path.read_text())
        sized: list[tuple[str, int, ast.Module | ast.ClassDef]] = [(name, path.read_text().count("\n"), tree)]
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        sized += [(f"{name}.{node.name}", (node.end_lineno or 0) - node.lineno + 1, node) for node in classes]
        for what, lines, node in sized:
            limit = 200 if isinstance(node, ast.ClassDef) else 300
            if lines > limit and f"Over {limit} lines" not in (ast.get_docstring(node) or ""):
                silent.append(f"{what}: {lines} lines")
    assert not silent
