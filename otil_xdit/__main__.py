"""Run the launcher `xfuser`: ``python -m otil_xdit``."""

import sys

from otil_xdit.xdit.launcher.main import main

if __name__ == "__main__":
    sys.exit(main())
