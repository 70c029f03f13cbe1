"""A tiny pipeline of every DiT architecture that xDiT runs, with random weights, made offline."""

from tests.zoo import packed, rows, videos
from tests.zoo.case import Case, Degrees

CASES: dict[str, Case] = {case.name: case for case in (*rows.CASES, *packed.CASES, *videos.CASES)}

__all__ = ["CASES", "Case", "Degrees"]
