"""``python -m otil_xdit.serve`` is `xfuser serve`."""

from __future__ import annotations

import sys

from otil_xdit.serve.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
