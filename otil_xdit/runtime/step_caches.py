"""`StepCaches`: the step caches of a pipeline's DiTs, which decide alike on all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from otil_xdit.comm.collectives import Collectives
from otil_xdit.comm.groups import PatchGroup
from otil_xdit.exchange.synchronous import SynchronousExchange
from otil_xdit.networks.compiled import is_compiled
from otil_xdit.networks.dit.architectures import architecture_of
from otil_xdit.networks.dit.keys import DitKeys
from otil_xdit.networks.dit.step_cache import StepCache, cache_of, check_cache, comparing
from otil_xdit.networks.unet.model import is_unet

FACT = "the step caches"
"""The fact of a generation that is compared among the ranks."""


class StepCaches:
    """The caches of one session's networks, found anew for each generation.

    Args:
        group: the ranks that hold the patches.
        timeout: seconds that one wait may take.
        keys: knows which of this rank's tokens are real.
        cfg_degree: ranks that share the passes with and without the prompt.
    """

    def __init__(self, group: PatchGroup, timeout: float, keys: DitKeys, cfg_degree: int) -> None:
        self._group, self._timeout = group.rows or group, timeout
        self._keys, self._cfg_degree = keys, cfg_degree
        self._found: list[StepCache] = []

    def find(self, networks: Mapping[str, nn.Module], holders: Mapping[str, nn.Module]) -> None:
        """Find the caches of a pipeline's networks, by attribute.

        Args:
            networks: to be searched.
            holders: the same, or what torch.compile has made of them.

        Raises:
            ValueError: for a cache that patches cannot serve.
        """
        self._found = []
        for name, network in networks.items():
            cache = None if is_unet(network) else cache_of(network)
            if cache is None:
                continue
            check_cache(name, network, cache, architecture_of(network), self._cfg_degree)
            if is_compiled(holders.get(name, network)):
                raise ValueError(
                    f"--parallel does not support the step cache {cache.says} of the compiled {name}: what it compares "
                    "is asked of the other ranks in the middle of a graph; leave one of the two out"
                )
            self._found.append(cache)

    @property
    def facts(self) -> dict[str, str]:
        """What must be equal on all ranks."""
        return {FACT: "; ".join(cache.says for cache in self._found)}

    @contextmanager
    def comparing(self) -> Iterator[None]:
        """Bracket a generation, in which the caches compare the tokens of all ranks."""
        with ExitStack() as stack:
            for cache in self._found:
                stack.enter_context(comparing(cache, self._distance))
            yield

    @torch.compiler.disable
    def _distance(self, before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
        """Return the change of all ranks' real tokens over what they were; see `Distance`.

        Every rank adds the same numbers in the same order, so all get the same bits, and decide alike.
        """
        exchange = SynchronousExchange(Collectives(self._group, self._timeout), "cache")
        real = self._keys.real_tokens(now.shape[1], exchange.rank, now.device)
        if real is not None:
            before, now = before.index_select(1, real), now.index_select(1, real)
        sums = torch.stack([(now - before).abs().sum(dtype=torch.float64), before.abs().sum(dtype=torch.float64)])
        change, size = exchange.gather("what a step cache compares", sums).sum(0).unbind()
        return (change / size).to(torch.float32)
