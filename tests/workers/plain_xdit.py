"""xfuser's own runner without the plugin's hooks, but on CPU ranks and with the shipped model in its registry."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from otil_xdit.xdit.cpu import enable_cpu_ranks  # noqa: E402
from otil_xdit.xdit.launcher.runner import run_main_block  # noqa: E402
from otil_xdit.xdit.models.tiny_dit import register_models  # noqa: E402

if __name__ == "__main__":
    enable_cpu_ranks()
    register_models()
    run_main_block(importlib.import_module("xfuser.runner"))
