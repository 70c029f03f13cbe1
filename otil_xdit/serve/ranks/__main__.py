"""``torchrun -m otil_xdit.serve.ranks``: what every rank runs under `xfuser serve`."""

from __future__ import annotations

import sys

from otil_xdit.serve.ranks.loop import serve_ranks
from otil_xdit.xdit.launcher import runner

if __name__ == "__main__":
    sys.exit(runner.main(serve_ranks))
