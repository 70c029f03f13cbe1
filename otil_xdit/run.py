"""Run an unchanged script of xDiT or diffusers with the plugin: ``python -m otil_xdit.run SCRIPT ARGUMENTS``."""

import sys

from otil_xdit.xdit.launcher.script import main

if __name__ == "__main__":
    sys.exit(main())
