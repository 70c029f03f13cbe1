"""A tiny pipeline of every DiT architecture that xDiT runs, with random weights, made offline."""

from tests.support.dits import networks, packed, pipelines, rows, videos
from tests.support.dits.case import Case, Degrees

CASES: dict[str, Case] = {
    case.name: case
    for case in (*rows.CASES, *packed.CASES, *videos.CASES, *networks.CASES, *pipelines.CASES, pipelines.CONSISID)
}

__all__ = ["CASES", "Case", "Degrees"]
