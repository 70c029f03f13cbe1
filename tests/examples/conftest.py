"""Scripts of a folder import each other from it."""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES / "study"), str(EXAMPLES)]
