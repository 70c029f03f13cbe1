"""A tiny pipeline of every DiT architecture that xDiT runs, with random weights, made offline."""

from tests.support.dits import ltx, networks, packed, pipelines, rows, videos
from tests.support.dits.case import Case, Degrees

_OF_PIPELINES = (*pipelines.CASES, *ltx.CASES, pipelines.CONSISID)

CASES: dict[str, Case] = {
    case.name: case for case in (*rows.CASES, *packed.CASES, *videos.CASES, *networks.CASES, *_OF_PIPELINES)
}

__all__ = ["CASES", "Case", "Degrees"]
