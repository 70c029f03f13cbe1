"""The JSON and the page of a check."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from otil_xdit.tools.check.runner import Result
from otil_xdit.tools.check.settings import Settings
from otil_xdit.tools.common.environment import machine, versions
from otil_xdit.tools.common.tables import table

JSON, PAGE = "check.json", "check.md"


def as_data(results: Sequence[Result], settings: Settings, command: str) -> dict[str, Any]:
    """Return everything that was found, for machines."""
    return {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": machine(),
        "settings": asdict(settings),
        "ok": all(result.state != "failed" for result in results),
        "parts": [result.to_dict() for result in results],
    }


def page(results: Sequence[Result], data: dict[str, Any]) -> str:
    """Return the page, in Markdown."""
    columns = {
        "part": lambda result: result.part.name,
        "": lambda result: result.state,
        "seconds": lambda result: f"{result.seconds:.0f} of {result.part.seconds:.0f}",
        "found": lambda result: result.finding.said,
    }
    said = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    sections = [f"# otil-xdit check\n\n`{data['command']}`, {data['date']}; {said}.", table(columns, results)]
    for result in results:
        wrong = "".join(f"\n- **{line}**" for line in result.finding.wrong)
        body = result.finding.page or result.finding.said
        sections.append(f"## {result.part.name}: {result.part.about}\n\n{body}{wrong and chr(10) + wrong}")
    return "\n\n".join(sections) + "\n"


def write(results: Sequence[Result], settings: Settings, command: str, out: Path) -> None:
    """Write both files."""
    data = as_data(results, settings, command)
    out.mkdir(parents=True, exist_ok=True)
    (out / JSON).write_text(json.dumps(data, indent=1) + "\n")
    (out / PAGE).write_text(page(results, data))
