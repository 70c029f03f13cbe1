"""The server's log: one JSON object a line, on stderr."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone

_OWN = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {
    "message",
    "asctime",
    "taskName",
    "color_message",
}
"""What every record has; the rest was given as ``extra``."""


class JsonLines(logging.Formatter):
    """Writes a record as JSON, with what ``extra`` gave it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        values = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name, value in vars(record).items() if name not in _OWN},
        }
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        return json.dumps(values, default=str)


def log_to_stderr() -> None:
    """Have this package and uvicorn log there, from INFO up."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name in ("otil_xdit", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
