"""Bytes, messages and waits of one rank in one generation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from otil_xdit.comm.collectives import ByKind, CounterKey, Traffic, by_kind


@dataclass(frozen=True)
class Report:
    """What one rank sent in one generation; bytes as handed to the collectives.

    Attributes:
        steps, warmup_steps: made so far.
        kv_bytes_per_step: of keys and values, the figure that strategies are compared by. This and the next two are
            means over the steps after warm-up.
        small_bytes_per_step: of a U-Net's halo rows and moments.
        output_bytes_per_step: of a U-Net's noise prediction, which is the same whatever the strategy.
        sent_bytes, messages: by kind of message and phase of its step: ``{"kv": {"warmup": 7, "steady": 9}}``.
        waited_seconds: the host's waiting for messages.
        exchange_seconds: the host's time in the communicator, with that waiting; without it, what predicting,
            selecting, coding, copying and sending take. On CUDA both are what the host needs to enqueue.
        timed_steps: number of steps that CUDA events were recorded in; 0 where the host waits for messages itself.
        device_waited_seconds, device_exchange_seconds: the same of the device in those steps: how long its stream
            waited for messages, and how long it took from each of the layers' requests to its answer, with that
            waiting; None where no step was timed.
        buffer_bytes: kept on the device.
        discrepancy: the denoising discrepancy of each step (`otil_xdit.hybridiff.guidance`), None for one that was not
            computed with and without the prompt.
        window: the window's first step and the one after its last; None where there was none.
    """

    steps: int
    warmup_steps: int
    kv_bytes_per_step: float
    small_bytes_per_step: float
    output_bytes_per_step: float
    sent_bytes: ByKind
    messages: ByKind
    waited_seconds: float
    exchange_seconds: float
    buffer_bytes: int
    timed_steps: int = 0
    device_waited_seconds: float | None = None
    device_exchange_seconds: float | None = None
    discrepancy: list[float | None] = field(default_factory=list)
    window: tuple[int, int] | None = None

    @classmethod
    def of(
        cls,
        traffic: Traffic,
        steps: int,
        warmup_steps: int,
        exchange_seconds: float,
        buffer_bytes: int,
        window: tuple[int, int] | None,
    ) -> Report:
        """Return the report of so many steps, from what was counted in them."""
        after_warmup, sent = max(steps - warmup_steps, 0), traffic.sent

        def per_step(*kinds: str) -> float:
            return sum(sent[CounterKey(kind)] for kind in kinds) / max(after_warmup, 1)

        return cls(
            steps=steps,
            warmup_steps=min(warmup_steps, steps),
            kv_bytes_per_step=per_step("kv"),
            small_bytes_per_step=per_step("halo", "moments"),
            output_bytes_per_step=per_step("output"),
            sent_bytes=by_kind(sent),
            messages=by_kind(traffic.messages),
            waited_seconds=sum(traffic.waited.values()),
            exchange_seconds=exchange_seconds,
            buffer_bytes=buffer_bytes,
            timed_steps=traffic.device_times.steps,
            device_waited_seconds=traffic.device_times.seconds("waited"),
            device_exchange_seconds=traffic.device_times.seconds("exchange"),
            window=window,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
