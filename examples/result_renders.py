"""Tables in Markdown of rows of `otil-xdit eval`, as the pages of docs/results have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from otil_xdit.tools.common.tables import markdown, number, table
from otil_xdit.tools.eval.rows import FLOOR, YARDSTICK, Row

Render = Callable[[Sequence[Row]], str]
"""Makes a table of rows; the cells of those that were not measured are empty."""

Text = Callable[[Row], str]
"""Makes a cell of a row."""


def measured(text: Text) -> Text:
    """Return what makes an empty cell of a row that was not measured."""
    return lambda row: "" if row.error else text(row)


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def kilobytes(value: float | None) -> str:
    return number(value, 1, 1e-3)


@measured
def psnr(row: Row) -> str:
    """The mean, and the worst image."""
    return f"{row.psnr:.1f} ({row.psnr_min:.1f})"


@measured
def of_a_step(row: Row) -> str:
    """Bytes of a step, PSNR and SSIM."""
    return f"{kilobytes(row.kv_bytes)} kB: {psnr(row)}, {row.ssim:.4f}"


@measured
def in_all(row: Row) -> str:
    """Bytes in all, PSNR and seam."""
    return f"{kilobytes(row.kv_total)} kB: {psnr(row)}, {row.seam:.2f}"


def place(row: Row) -> str:
    halves = " in two halves" if row.cfg_parallel else ""
    dtype = "" if row.dtype == "float32" else f", {row.dtype}"
    return f"{row.model}, {row.ranks} ranks{halves}, {row.sampler} {row.steps}{dtype}"


def variant(row: Row) -> str:
    return row.variant if row.variant == FLOOR else f"`{row.variant}`"


def network(row: Row) -> str:
    return row.network or "shipped"


def model_and_variant(row: Row) -> str:
    return f"{row.model}, {row.ranks} ranks, `{row.variant}`"


BYTES: dict[str, Text] = {
    "": variant,
    "kB of K/V a step": lambda row: kilobytes(row.kv_bytes),
    "share": lambda row: share(row.kv_share),
    "kB of K/V in all": lambda row: kilobytes(row.kv_total),
    "share in all": lambda row: share(row.total_share),
    "PSNR (worst)": psnr,
    "SSIM": lambda row: number(row.ssim, 4),
}
"""The first columns of a table with a line for each row."""


def images(rows: Sequence[Row]) -> str:
    """Return a table of images with a line for each row."""
    return table({**BYTES, "seam": lambda row: number(row.seam, 2)}, rows)


def clips(rows: Sequence[Row]) -> str:
    """Return a table of clips with a line for each row; their figures are means over frames."""
    return table({**BYTES, "flicker": lambda row: number(row.flicker, 2)}, rows)


def grid(line: Text, column: Text, cell: Text) -> Render:
    """Return what makes a table with a cell for each row."""

    def render(rows: Sequence[Row]) -> str:
        cells = {(line(row), column(row)): cell(row) for row in rows}
        lines, columns = (list(dict.fromkeys(name(row) for row in rows)) for name in (line, column))
        return markdown(
            ["", *columns], [[name, *(cells.get((name, title), "") for title in columns)] for name in lines]
        )

    return render


def equivalents(rows: Sequence[Row]) -> str:
    """Return a table of what `otil` makes of each model's equivalents, beside the shipped one and `YARDSTICK`.

    The yardstick sends keys and values as they are, so all equivalents are alike to it and the shipped one stands for
    all.
    """
    networks = list(dict.fromkeys(network(row) for row in rows))
    lines = []
    for where in dict.fromkeys((row.model, row.ranks) for row in rows):
        here = [row for row in rows if (row.model, row.ranks) == where]
        coded = {network(row): row for row in here if row.variant != YARDSTICK}
        (raw,) = (row for row in here if row.variant == YARDSTICK and not row.network)
        cells = [psnr(coded[name]) for name in networks]
        lines.append([f"{where[0]}, {where[1]} ranks", *cells, *_margins(coded, raw)])
    return markdown(["", *networks, "most lost", f"`{YARDSTICK}`", "least above it"], lines)


def _margins(coded: dict[str, Row], raw: Row) -> list[str]:
    """Return how much of the shipped network's dB the worst equivalent loses, the yardstick's, and the least lead."""
    shipped = coded["shipped"].psnr
    worst = min((row.psnr for row in coded.values() if row.psnr is not None), default=None)
    lost = None if shipped is None or worst is None else shipped - worst
    lead = None if raw.psnr is None or worst is None else worst - raw.psnr
    return [number(lost, 1), psnr(raw), number(lead, 1)]
