"""Matplotlib figures that need no display."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_installed(whose: str) -> None:
    """Refuse to go on without matplotlib.

    Raises:
        ValueError: saying `whose` need it is, and what to install.
    """
    if find_spec("matplotlib") is None:
        raise ValueError(f"{whose} matplotlib; pip install 'otil-xdit[bench]'")


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches. Not pyplot's, which would ask for a display and keep it for ever."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
