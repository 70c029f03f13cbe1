"""``python -m otil_xdit``: the launcher."""

import sys

from otil_xdit.xdit.launcher.main import main

if __name__ == "__main__":
    sys.exit(main())
