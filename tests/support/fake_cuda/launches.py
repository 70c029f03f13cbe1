"""Counts what code asks of a CUDA device: launches, bytes moved, copies to the host, messages; by call site."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import otil_xdit
from otil_xdit.comm.collectives import Collectives, Pending
from otil_xdit.dryrun.launches import is_launched, launches_of, tensors_of
from otil_xdit.exchange.communicator import OtilCommunicator
from tests.support.fake_cuda.machine import LISTENERS

_PACKAGE = str(Path(otil_xdit.__file__).parent) + "/"

NETWORK = "network"
"""The site of what the network itself, diffusers and xDiT launch."""

_COPIES = ("_to_copy", "copy_", "_copy_from")

Site = str
"""``file:function`` below the package, or `NETWORK`."""


@dataclass
class Launches:
    """What was counted.

    Attributes:
        launches: by site.
        nbytes: that the launches read and write, by site; an expanded operand counts as far as it is distinct.
        host: copies between host and device, and the host's waits for the device, by what they are and their site.
        collectives: by operator and site.
        held: keys and values of all ranks that attention layers asked for, numbers.
        messages: by kind, and whether the network launched something before they were waited for: "kv awaited", "kv
            displaced"; one that nobody has waited for is displaced.
    """

    launches: Counter[Site] = field(default_factory=Counter)
    nbytes: Counter[Site] = field(default_factory=Counter)
    host: Counter[tuple[str, Site]] = field(default_factory=Counter)
    collectives: Counter[tuple[str, Site]] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    held: int = 0

    @property
    def total(self) -> int:
        """Number of launches."""
        return sum(self.launches.values())

    @property
    def own_bytes(self) -> int:
        """Bytes that are moved beyond what the network's own layers move."""
        return sum(count for site, count in self.nbytes.items() if not _is_of_network(site))

    @property
    def total_bytes(self) -> int:
        return sum(self.nbytes.values())

    def count_of(self, how: str) -> int:
        """Return the number of messages that were "awaited", or "displaced"."""
        return sum(count for kind, count in self.messages.items() if kind.endswith(how))


def _is_of_network(site: Site) -> bool:
    """Tell whether a site's launches are those of the network's own layers, on fewer rows."""
    layers = ("networks/unet/conv.py", "networks/unet/attention.py", "networks/unet/group_norm.py")
    return site == NETWORK or site.startswith(layers)


class LaunchCounter(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        found: since `take` was called last.

    Raises:
        AssertionError: at an operator between tensors of different devices, unless it is a copy or the other is one
            number. What gives a shape that depends on numbers is refused by fake tensors themselves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = Launches()
        self._open: list[tuple[Pending[Any], str, int]] = []
        self._of_network = 0

    def __enter__(self) -> LaunchCounter:
        LISTENERS.append(self._waited)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        LISTENERS.remove(self._waited)
        super().__exit__(*error)

    def take(self) -> Launches:
        """Return what was found so far, and begin anew."""
        for _, kind, _ in self._open:
            self.found.messages[f"{kind} displaced"] += 1
        self._open.clear()
        found, self.found = self.found, Launches()
        return found

    @contextmanager
    def watching_messages(self) -> Iterator[None]:
        """Count messages of `Collectives`, whether they were awaited, and the keys and values that are asked for."""
        init, wait, gather = Pending.__init__, Pending.wait, OtilCommunicator.gather
        counter = self

        def gathered(self: Any, name: str, key: torch.Tensor, value: torch.Tensor) -> Any:
            counter.found.held += 2 * key.numel() * self.group.world_size
            return gather(self, name, key, value)

        def started(self: Any, collectives: Collectives, works: list[Any], output: Any, label: Any) -> None:
            init(self, collectives, works, output, label)
            counter._open.append((self, label.kind, counter._of_network))

        def waited(self: Any) -> Any:
            for one in [one for one in counter._open if one[0] is self]:
                counter._open.remove(one)
                how = "awaited" if one[2] == counter._of_network else "displaced"
                counter.found.messages[f"{one[1]} {how}"] += 1
            return wait(self)

        Pending.__init__, Pending.wait, OtilCommunicator.gather = started, waited, gathered  # type: ignore[method-assign]
        try:
            yield
        finally:
            Pending.__init__, Pending.wait, OtilCommunicator.gather = init, wait, gather  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        name, space = func._overloadpacket.__name__, func.namespace
        if name == "_local_scalar_dense":
            return self._read_number(args[0])
        out = func(*args, **given)
        if not is_launched(func):
            return out
        tensors = tensors_of(args, tuple(given.values()), out)
        if space == "c10d":
            self.found.collectives[name, _site()] += 1
        elif any(one.device.type == "cuda" for one in tensors):
            self._count(func, tensors, args)
        return out

    def _count(self, func: Any, tensors: list[torch.Tensor], args: tuple[Any, ...]) -> None:
        name, site = func._overloadpacket.__name__, _site()
        if not any(one.numel() for one in tensors):
            return
        if len({one.device.type for one in tensors}) > 1:
            self._check_mix(name, site, tensors, args)
        asked = launches_of(func, tensors, args)
        self.found.launches[site] += asked.count
        self.found.nbytes[site] += asked.nbytes
        self._of_network += _is_of_network(site)

    def _check_mix(self, name: str, site: Site, tensors: list[torch.Tensor], args: tuple[Any, ...]) -> None:
        others = [one for one in tensors if one.device.type != "cuda"]
        if name in _COPIES:
            source = args[1] if name == "copy_" else args[0]
            self.found.host[f"copy from {source.device.type}", site] += 1
        elif any(one.ndim > 0 for one in others):
            devices = ", ".join(str(one.device) for one in tensors)
            raise AssertionError(f"{name} at {site} mixes devices: {devices}")

    def _waited(self, what: str) -> None:
        self.found.host[what, _site()] += 1

    def _read_number(self, tensor: torch.Tensor) -> Any:
        site = _site()
        if tensor.device.type == "cuda":
            self.found.host[f"number from {tensor.device.type}", site] += 1
        return True if tensor.dtype == torch.bool else 0.5 if tensor.is_floating_point() else 1


def _site() -> Site:
    for frame in _frames():
        path = frame.f_code.co_filename
        if path.startswith(_PACKAGE):
            code = frame.f_code
            return f"{path.removeprefix(_PACKAGE)}:{getattr(code, 'co_qualname', code.co_name)}"  # Python 3.11
        if "/diffusers/" in path or "/torch/nn/modules/" in path or "/xfuser/" in path:
            return NETWORK
    return NETWORK


def _frames() -> Iterable[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back
