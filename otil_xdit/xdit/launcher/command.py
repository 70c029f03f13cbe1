"""The console command `xfuser`: the launcher, or with ``serve`` as its first word the server.

The server's process must not import torch, so the choice is made before the launcher is imported.
"""

from __future__ import annotations

import importlib
import sys

SERVER = "otil_xdit.serve.main"
"""Named, not imported: the server stands on the launcher (docs/architecture.md)."""


def main() -> int:
    """Run the command line, and return the exit code."""
    if sys.argv[1:2] == ["serve"]:
        code: int = importlib.import_module(SERVER).main(sys.argv[2:])
        return code
    from otil_xdit.xdit.launcher.main import main as launch

    return launch()
