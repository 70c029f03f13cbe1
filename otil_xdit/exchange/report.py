"""What one rank sent and waited for in one generation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Report:
    """What one rank sent in one generation; bytes as handed to the collectives.

    The figures per step are means over the steps after warm-up: `kv_bytes_per_step` of keys and values, the figure that
    strategies are compared by; `small_bytes_per_step` of a U-Net's halo rows and moments; `output_bytes_per_step` of
    its noise prediction, which is the same whatever the strategy. `waited_seconds` is the host's waiting for messages,
    `exchange_seconds` its time in the calls of the exchange with that waiting; less it, what predicting, picking,
    coding, copying and sending takes. `discrepancy` is the denoising discrepancy of each step
    (`otil_xdit.hybridiff.guidance`), None for one that was not computed with and without the prompt; `window` the
    window's first step and the one after its last, None where there was none.
    """

    steps: int
    warmup_steps: int
    kv_bytes_per_step: float
    small_bytes_per_step: float
    output_bytes_per_step: float
    sent_bytes: dict[str, int]
    messages: dict[str, int]
    waited_seconds: float
    exchange_seconds: float
    buffer_bytes: int
    discrepancy: list[float | None] = field(default_factory=list)
    window: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
