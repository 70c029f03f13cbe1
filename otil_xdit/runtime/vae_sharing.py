"""`VaeSharing`: a pipeline's VAE, whose rows all ranks that work on the image share.

Where every rank calls it, as diffusers' pipelines do, they meet in its layers. xDiT's wrappers of DiTs have the last
rank alone decode: that rank then tells the others of each call, and they, who are at the end of theirs, make it too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from otil_xdit.comm.collectives import Collectives, Traffic, by_kind
from otil_xdit.comm.groups import PatchGroup
from otil_xdit.exchange.report import Report
from otil_xdit.exchange.synchronous import SynchronousExchange
from otil_xdit.networks.offload import execution_device
from otil_xdit.networks.vae.coder import PatchedCoder
from otil_xdit.networks.vae.support import coder_class, why_whole

logger = logging.getLogger("otil_xdit")

KIND = "vae"
"""The counter of what a VAE's ranks send."""

IS_DECODED = "images are decoded"
"""The fact of a call that asks for images; one that asks for latents lacks it, so it is not compared."""

_FACT = "how the VAE is computed"

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_HEADER = 7
"""Numbers in front of a latent: the place of its dtype, whether the call is given what the one before has returned, and
the latent's shape; -1 for the end, and to fill up."""


class VaeSharing:
    """Encoder and decoder of one pipeline's VAE on patches, during its generations.

    Args:
        group: all ranks that work on the image.
        timeout: seconds that one wait may take.
        shares: of the rows, for each of these ranks, in any unit; empty for equal ones.
    """

    def __init__(self, group: PatchGroup, timeout: float, shares: tuple[int, ...] = ()) -> None:
        self._shares = shares
        self._traffic = Traffic()
        self._exchange = SynchronousExchange(Collectives(group, timeout, self._traffic), KIND)
        self._vae: Any = None
        self._told = ""
        self._coders: list[PatchedCoder] = []
        self._alone = self._decodes_alike = self._by_last = self._serves = False

    def begin(self, vae: Any, is_generating: Callable[[], bool], by_last: bool = False) -> dict[str, str]:
        """Get a pipeline's VAE ready for a generation; nothing is sent.

        Args:
            vae: a module, or None.
            is_generating: tells whether a generation of the pipeline is under way.
            by_last: whether the last rank alone decodes, once its steps are done.

        Returns:
            The fact of how it is computed, which must be equal on all ranks.
        """
        self._traffic.clear()
        self._is_generating, self._by_last, self._decodes_alike = is_generating, by_last, True
        reason = why_whole(vae)
        if reason is None and by_last and coder_class(vae).takes_arguments:
            reason = "the last rank alone decodes, and the others do not have the arguments of its calls"
        if reason is not None or vae is not self._vae:
            self.release()
        if reason is not None:
            if vae is not None and self._told != reason and self._exchange.rank == 0:
                logger.info("every rank computes all of the VAE (%s): %s", type(vae).__name__, reason)
            self._told = reason
            return {_FACT: f"whole: {reason}"}
        if not self._coders:
            self._vae = vae
            ways = (
                (vae.encoder, self._is_shared_encoding, _tell_nobody),
                (vae.decoder, self._is_shared_decoding, self._announce),
            )
            for coder, is_shared, announce in ways:
                self._coders.append(coder_class(vae)(coder, self._exchange, is_shared, announce, self._shares))
                self._coders[-1].prepare()
        return {_FACT: "on patches"}

    def agree(self, by_rank: Mapping[int, Mapping[str, str]]) -> None:
        """Take note of which ranks want images: one that wants latents only does not decode with the others.

        Where the last rank alone decodes, its wish counts.

        Args:
            by_rank: all ranks' facts.
        """
        wanted = [IS_DECODED in by_rank[rank] for rank in sorted(by_rank)]
        self._decodes_alike = wanted[-1] if self._by_last else len(set(wanted)) == 1

    def finish(self) -> None:
        """End a generation: where the last rank alone decodes, the others compute their rows of what it decodes."""
        if not (self._by_last and self._decodes_alike and self._coders):
            return
        if self._is_last:
            for peer in range(self._exchange.ranks - 1):
                self._exchange.send("the end", torch.full((_HEADER,), -1, device=self._device), peer)
            return
        self._serves, hook = True, vars(self._vae).get("_hf_hook")
        if hook is not None:  # offload brings a VAE to its device where the pipeline calls it, which nobody does here
            hook.pre_forward(self._vae)
        try:
            with torch.no_grad():  # as within the pipeline's call, which has ended here
                self._coders[-1].follow(self._announced())
        finally:
            self._serves = False

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

    # ---- whose call it is ------------------------------------------------------------------------------------------

    @property
    def _is_last(self) -> bool:
        return self._exchange.rank == self._exchange.ranks - 1

    @property
    def _device(self) -> torch.device:
        return execution_device(self._vae) or torch.device("cpu")

    def _is_shared_encoding(self) -> bool:
        return self._is_generating() and not self._alone

    def _is_shared_decoding(self) -> bool:
        takes_part = self._decodes_alike and (not self._by_last or self._is_last or self._serves)
        return self._is_generating() and not self._alone and takes_part

    def _announce(self, latent: torch.Tensor, continues: bool) -> None:
        """Tell the other ranks of a call that they do not make by themselves."""
        if not self._by_last or self._serves:
            return
        numbers = [_DTYPES.index(latent.dtype), int(continues), *latent.shape]
        numbers += [-1] * (_HEADER - len(numbers))
        for peer in range(self._exchange.ranks - 1):
            self._exchange.send("the size of a latent", torch.tensor(numbers, device=latent.device), peer)
            self._exchange.send("a latent", latent, peer)

    def _announced(self) -> Iterator[tuple[torch.Tensor, bool]]:
        """Yield the latents that the last rank decodes, and whether it gives what the call before has returned."""
        last = self._exchange.ranks - 1
        header = torch.empty(_HEADER, dtype=torch.int64, device=self._device)
        while True:
            kind, continues, *shape = self._exchange.receive("the size of a latent", header, last).tolist()
            if kind < 0:
                return
            latent = torch.empty([count for count in shape if count >= 0], dtype=_DTYPES[kind], device=self._device)
            yield self._exchange.receive("a latent", latent, last), bool(continues)


def _tell_nobody(latent: torch.Tensor, continues: bool) -> None:
    """Every rank makes the call by itself."""
