"""`VaeSharing`: a pipeline's VAE, whose rows all ranks that work on the image share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from otil_xdit.comm.collectives import Collectives, Traffic, by_kind
from otil_xdit.comm.groups import PatchGroup
from otil_xdit.exchange.report import Report
from otil_xdit.exchange.synchronous import SynchronousExchange
from otil_xdit.networks.vae.coder import PatchedCoder, why_whole

KIND = "vae"
"""The counter of what a VAE's ranks send."""

_FACT = "how the VAE is computed"


class VaeSharing:
    """Encoder and decoder of one pipeline's VAE on patches, during its generations.

    Args:
        group: all ranks that work on the image.
        timeout: seconds that one wait may take.
    """

    def __init__(self, group: PatchGroup, timeout: float) -> None:
        self._traffic = Traffic()
        self._exchange = SynchronousExchange(Collectives(group, timeout, self._traffic), KIND)
        self._vae: Any = None
        self._coders: list[PatchedCoder] = []
        self._alone = False

    def begin(self, vae: Any, is_generating: Callable[[], bool]) -> dict[str, str]:
        """Get a pipeline's VAE ready for a generation; nothing is sent.

        Args:
            vae: a module, or None.
            is_generating: tells whether a generation of the pipeline is under way.

        Returns:
            The fact of how it is computed, which must be equal on all ranks.
        """
        self._traffic.clear()
        self._is_generating = is_generating
        reason = why_whole(vae)
        if reason is not None or vae is not self._vae:
            self.release()
        if reason is not None:
            return {_FACT: f"whole: {reason}"}
        if not self._coders:
            self._vae = vae
            for coder in (vae.encoder, vae.decoder):
                self._coders.append(PatchedCoder(coder, self._exchange, self._is_shared_call))
                self._coders[-1].prepare()
        return {_FACT: "on patches"}

    def release(self) -> None:
        """Give the VAE its own layers back."""
        for coder in self._coders:
            coder.release()
        self._coders.clear()
        self._vae = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Bracket what one rank may do without the others, such as a callback that decodes a preview."""
        before, self._alone = self._alone, True
        try:
            yield
        finally:
            self._alone = before

    def added_to(self, report: Report) -> Report:
        """Return a report with what this rank has sent for the VAE of the last generation."""
        sent, messages = by_kind(self._traffic.sent), by_kind(self._traffic.messages)
        return replace(
            report,
            sent_bytes={**report.sent_bytes, **sent},
            messages={**report.messages, **messages},
            waited_seconds=report.waited_seconds + sum(self._traffic.waited.values()),
        )

    def shares(self, vae: Any) -> bool:
        """Tell whether the ranks share a VAE; nothing is changed."""
        return why_whole(vae) is None

    def _is_shared_call(self) -> bool:
        return self._is_generating() and not self._alone
