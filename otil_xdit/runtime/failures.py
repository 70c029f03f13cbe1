"""How a generation ends by an exception: the other ranks are told, and the error names the rank that began it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from otil_xdit.comm.failure_detector import FailureDetector
from otil_xdit.comm.groups import is_lost_connection, reason_of
from otil_xdit.comm.peer_status import PeerStatus
from otil_xdit.errors import ExchangeTimeout, NotFinite, PipelineBusyError


@contextmanager
def tell_failures(detector: FailureDetector | None) -> Iterator[None]:
    """Begin a generation, and tell the other ranks of its end by an exception.

    They are told before anything of the exchange is waited for, which they might not send any more.

    Args:
        detector: the session's; None for a single rank.

    Raises:
        ExchangeTimeout: for a collective, of xDiT's too, that failed because of another rank.
        NotFinite: naming the ranks that had it first.
    """
    if detector is None:
        yield
        return
    detector.begin()
    try:
        yield
    except (ExchangeTimeout, PipelineBusyError):  # which the detector has told
        raise
    except NotFinite as error:
        raise _with_origin(error, detector.failed(error), detector.rank) from error
    except BaseException as error:
        if not (isinstance(error, RuntimeError) and (detector.is_alarmed or is_lost_connection(error))):
            detector.failed(error)
            raise
        # A collective of xDiT's own.
        place = f"rank {detector.rank}: no answer from the other ranks after {detector.where}"
        raise ExchangeTimeout(f"{place} ({reason_of(error)}); {detector.diagnose()}") from error


def _with_origin(error: NotFinite, statuses: Mapping[int, PeerStatus], rank: int) -> NotFinite:
    """Return the error, with the ranks that had it first: what is not finite spreads to all in a step or two."""
    orders = {other: peer.order for other, peer in statuses.items() if peer.order is not None}
    first = min([error.order, *orders.values()])
    origins = [statuses[other].error.partition(": ")[2] for other, order in orders.items() if order == first]
    if first < error.order:
        return NotFinite(f"rank {rank} stops with {'; '.join(origins)}", first)
    return NotFinite(f"{error}{''.join(f'; {origin}' for origin in origins)}", first)
