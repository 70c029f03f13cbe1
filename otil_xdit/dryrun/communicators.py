"""NCCL's communicators of a rank, which take memory on the card besides the exchange's buffers."""

from __future__ import annotations

from otil_xdit.dryrun.job import ParallelDegrees

CONNECTION_BYTES = 10 * 2**20
"""Of one channel's connection to one rank, for its three protocols: allocations of 10,485,760 bytes in NCCL's log
(github.com/NVIDIA/nccl, issue 1685)."""

CHANNELS, CONNECTIONS = 4, 2
"""Taken for cards on PCIe: NCCL's memory is linear in its channels, of which NVLink has up to 32, and a ring has two
connections regardless of the scale (github.com/NVIDIA/nccl, issue 986)."""

COMMUNICATOR_BYTES = CHANNELS * CONNECTIONS * CONNECTION_BYTES
"""Estimate for one communicator; nothing was measured."""


def communicators_of(degrees: ParallelDegrees) -> tuple[str, ...]:
    """Return what the communicators of a rank carry, one text each, as `otil_xdit.xdit.plugin.groups.connect` has them.

    Where the same ranks hold the rows and the image there are two, one for bulk and one for what is urgent.
    """
    found = ["keys and values"] if degrees.patches > 1 else []
    if degrees.rows > 1:
        found.append("rows, moments" if degrees.cfg > 1 else "rows, moments, the output")
    if degrees.cfg > 1:
        found += ["the output", "the two passes of guidance"]
    return (*found, *(("Ulysses",) if degrees.ulysses > 1 else ()))
