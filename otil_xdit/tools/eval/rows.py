"""One row of figures for each case: fidelity, counted bytes, seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, pstdev
from typing import Any

from otil_xdit.tools.common.environment import versions
from otil_xdit.tools.eval.cache import DrawnImage, ImageCache
from otil_xdit.tools.eval.generate import Failures
from otil_xdit.tools.eval.matrix import Case, Matrix
from otil_xdit.tools.eval.metrics import flicker, psnr, seam, ssim
from otil_xdit.tools.eval.perceptual_metrics import weighted_figures

YARDSTICK = "distrifusion"
"""The variant whose bytes of keys and values the others' are given a share of."""

FLOOR = "one process, sums in another order"
"""The row of what arithmetic in 16 bits leaves undecided."""


@dataclass(frozen=True)
class Row:
    """The figures of one case; None where it failed or they do not exist.

    Attributes:
        model, variant, preset, ranks, sampler, steps: the case.
        network: what the model's network was changed to (`otil_xdit.tools.eval.equivalents`); empty for as it is.
        cfg_parallel: whether the passes with and without the prompt were on different halves of the ranks.
        dtype: of the weights, as torch names it.
        settings: all settings of the strategy.
        images: how many.
        psnr, psnr_min, psnr_std: in dB, over the images; the standard deviation is that of these very images.
        ssim, seam: means over the images; one patch and a clip have no seam.
        flicker: mean over clips, in levels of 8 bits; None for images.
        kv_bytes, small_bytes: of keys and values, and of halo rows and moments; sent by the last rank in a step, mean
            over the steps after warm-up.
        kv_total: bytes of keys and values in the whole run, warm-up steps included.
        kv_range: least and most of `kv_total` where the images differ in it.
        kv_share, total_share: `kv_bytes` and `kv_total` over those of the `YARDSTICK` in the same place.
        seconds: of one image, mean; not a benchmark.
        psnrs: of every image, in the order of the calls.
        windows, discrepancies: of every image, the same fields of its report (`otil_xdit.exchange.report.Report`).
        weighted: the metrics of `otil_xdit.tools.eval.perceptual_metrics` that could be had, by name.
        error: what went wrong.
    """

    model: str
    variant: str
    preset: str
    ranks: int
    sampler: str
    steps: int
    network: str = ""
    cfg_parallel: bool = False
    dtype: str = "float32"
    images: int = 0
    psnr: float | None = None
    psnr_min: float | None = None
    psnr_std: float | None = None
    ssim: float | None = None
    seam: float | None = None
    flicker: float | None = None
    kv_bytes: float | None = None
    small_bytes: float | None = None
    kv_total: float | None = None
    kv_range: tuple[float, float] | None = None
    kv_share: float | None = None
    total_share: float | None = None
    seconds: float | None = None
    error: str = ""
    psnrs: tuple[float, ...] = ()
    windows: tuple[tuple[int, int] | None, ...] = ()
    discrepancies: tuple[list[float | None], ...] = ()
    weighted: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def place(self) -> tuple[str, int, str, int, str, bool, str]:
        """Rows of the same place are compared with each other."""
        where = self.model, self.ranks, self.sampler, self.steps, self.network
        return *where, self.cfg_parallel, self.dtype


def make_rows(matrix: Matrix, cache: ImageCache, failures: Failures) -> dict[Case, Row]:
    """Return a row for every case, in the order model, ranks, sampler, variant.

    Args:
        matrix: what was to be made.
        cache: has the images of all cases that did not fail, and of those that they are compared with.
        failures: what went wrong.
    """
    cases = [case for ranks in matrix.ranks for case in (*matrix.floors(ranks), *matrix.cases(ranks))]
    cases.sort(key=lambda case: matrix.models.index(case.model))
    rows = [make_row(case, matrix, cache, failures.get(case)) for case in cases]
    return dict(zip(cases, with_shares(rows), strict=True))


def make_row(case: Case, matrix: Matrix, cache: ImageCache | None, error: str | None) -> Row:
    """Return the row of a case.

    Args:
        case: to make it of.
        matrix: that the case is of.
        cache: has its images; None where there is an error.
        error: why it failed; None where it did not.
    """
    variant = case.variant
    row = Row(
        model=case.model.name,
        variant=FLOOR if variant is None else variant.text,
        preset=FLOOR if variant is None else variant.preset,
        ranks=case.ranks,
        sampler=case.sampler.name,
        steps=case.sampler.steps,
        network="" if case.equivalent is None or variant is None else case.equivalent.text,
        cfg_parallel=matrix.cfg_parallel,
        dtype=str(matrix.dtype).removeprefix("torch."),
        settings={} if variant is None else variant.settings,
    )
    if error is not None:
        return replace(row, error=error)
    assert cache is not None, "a row without an error is made of images"
    borders = case.model.borders(matrix.size, case.patches)
    made, references = cache.load(case), cache.load(case.reference)
    images = [drawn.image for drawn in made], [drawn.image for drawn in references]
    prompts = [call.prompt for call in matrix.calls]
    weighted = {} if case.model.frames else weighted_figures(*images, prompts)
    return replace(with_figures(row, made, references, borders), weighted=weighted)


def with_figures(row: Row, made: Sequence[DrawnImage], references: Sequence[DrawnImage], borders: Sequence[int]) -> Row:
    """Return the row with the figures of its images.

    Args:
        row: without any.
        made: the case's images, in the order of the calls.
        references: one process's, likewise.
        borders: first image row of every patch but the first one's.
    """
    pairs = [(drawn.image, best.image) for drawn, best in zip(made, references, strict=True)]
    psnrs = tuple(psnr(image, best) for image, best in pairs)
    row = _with_bytes(row, [drawn.report for drawn in made if drawn.report is not None])
    return replace(
        row,
        images=len(made),
        psnr=fmean(psnrs),
        psnr_min=min(psnrs),
        psnr_std=pstdev(psnrs),
        ssim=fmean(ssim(image, best) for image, best in pairs),
        seam=fmean(seam(image, best, borders) for image, best in pairs) if borders else None,
        flicker=fmean(flicker(image, best) for image, best in pairs) if pairs[0][0].ndim == 4 else None,
        seconds=fmean(drawn.seconds for drawn in made),
        psnrs=psnrs,
    )


def _with_bytes(row: Row, reports: Sequence[dict[str, Any]]) -> Row:
    """Return the row with what the reports of its images count; one process has none."""
    if not reports:
        return row
    totals = [sum(report["sent_bytes"].get("kv", {}).values()) for report in reports]
    return replace(
        row,
        kv_bytes=fmean(report["kv_bytes_per_step"] for report in reports),
        small_bytes=fmean(report["small_bytes_per_step"] for report in reports),
        kv_total=fmean(totals),
        kv_range=None if min(totals) == max(totals) else (min(totals), max(totals)),
        windows=tuple(report.get("window") for report in reports),
        discrepancies=tuple(report.get("discrepancy", []) for report in reports),
    )


def with_shares(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with their shares of the `YARDSTICK`'s bytes, where it is among them."""
    wholes = {row.place: row for row in rows if row.variant == YARDSTICK}
    return [
        replace(row, kv_share=_share(row.kv_bytes, whole.kv_bytes), total_share=_share(row.kv_total, whole.kv_total))
        if (whole := wholes.get(row.place)) is not None
        else row
        for row in rows
    ]


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def as_json(rows: Sequence[Row], command: str) -> list[dict[str, Any]]:
    """Return the rows for `rows.json`, each with versions and command line, so that several runs' can be joined."""
    known = versions()
    return [{**asdict(row), "versions": known, "command": command} for row in rows]
