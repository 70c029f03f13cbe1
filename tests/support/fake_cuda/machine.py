"""Makes this process one rank of a machine with a CUDA card each, whose collectives reach nobody.

For a process of its own: torch is told of cards that are not there, and xfuser must not have been imported.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.support.fake_cuda.guard import load_guard

DEVICE = torch.device("cuda:0")

LISTENERS: list[Callable[[str], object]] = []
"""Called with what the host waits for: a name. Those for single numbers reach the dispatcher and are not among them."""


class FakeEvent:
    """A `torch.cuda.Event` of a device that is always done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _wait("Event.synchronize")

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1.0


def become_cuda_machine(world_size: int) -> None:
    """Let torch, and whoever asks it, believe in `world_size` CUDA cards with nothing installed but torch.

    Call it before xfuser is imported.
    """
    load_guard()
    card = {"name": "Fake", "major": 8, "minor": 9, "total_memory": 24 * 2**30, "multi_processor_count": 128}
    properties = SimpleNamespace(**card, gcnArchName="")
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "device_count": world_size,
        "current_device": 0,
        "get_device_name": properties.name,
        "get_device_capability": (properties.major, properties.minor),
        "get_device_properties": properties,
        "set_device": None,
        "empty_cache": None,
        "manual_seed": None,
        "manual_seed_all": None,
        "max_memory_allocated": 0,
        "reset_peak_memory_stats": None,
        "is_current_stream_capturing": False,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, partial(_answer, answer))
    torch.cuda.synchronize = partial(_wait, "torch.cuda.synchronize")
    torch.cuda.Event = FakeEvent
    torch.cuda.get_rng_state = lambda device="cuda": torch.zeros(16, dtype=torch.uint8)
    torch.cuda.set_rng_state = partial(_answer, None)
    torch.version.cuda = "12.8"
    torch.backends.cudnn.is_available = partial(_answer, True)
    # torch.distributed keeps one name of the function and xfuser another.
    dist.new_group = dist.distributed_c10d.new_group = _with_fake_backend(dist.new_group)
    torch.nn.functional.scaled_dot_product_attention = _sdpa
    FakeTensor.tolist = _rising_numbers


def join(rank: int, world_size: int) -> None:
    """Be that rank of a group whose other ranks are not there."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())


def _answer(answer: Any, *args: Any, **kwargs: Any) -> Any:
    return answer


def _wait(name: str, *args: Any, **kwargs: Any) -> None:
    for listener in LISTENERS:
        listener(name)


def _with_fake_backend(new_group: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(new_group)
    def new(ranks: Any = None, timeout: Any = None, backend: Any = None, **kwargs: Any) -> Any:
        return new_group(ranks, timeout, "fake", **kwargs)

    return new


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attend in one kernel as torch does on a card; a CPU build would trace the many of its fallback."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half and attn_mask is None and query.shape[-1] <= 256:
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, False, dropout_p, is_causal, scale=scale
    )[0]


def _rising_numbers(tensor: torch.Tensor) -> Any:
    """Return numbers in the shape of a tensor whose own are not there."""
    _wait(f"numbers from {tensor.device.type}")

    def made(shape: tuple[int, ...]) -> Any:
        return [made(shape[1:]) if len(shape) > 1 else number + 1 for number in range(shape[0])] if shape else 1

    return made(tuple(tensor.shape))
