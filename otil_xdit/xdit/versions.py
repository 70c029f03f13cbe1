"""Which versions this plugin was tested with."""

from __future__ import annotations

import logging
from importlib.metadata import version

from packaging.version import Version

logger = logging.getLogger(__name__)

TESTED_XFUSER = "0.7.0"


def warn_if_untested() -> None:
    """Say what was tested where another xfuser is installed; its release number counts, not a local suffix."""
    installed = version("xfuser")
    if Version(installed).release != Version(TESTED_XFUSER).release:
        logger.warning(
            "otil-xdit was tested with xfuser %s; its hooks may not fit %s, which is installed",
            TESTED_XFUSER,
            installed,
        )
