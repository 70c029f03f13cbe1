"""What the U-Net of a step is told of the ControlNets before it: how their residuals were shared out."""

from __future__ import annotations

from otil_xdit.networks.unet.sharding import UNetSharding


class ControlCalls:
    """The calls of a pipeline's ControlNets since the last call of its U-Net."""

    def __init__(self) -> None:
        self._shardings: list[UNetSharding] = []

    def clear(self) -> None:
        """Forget what a generation has left that ended early."""
        self._shardings.clear()

    def record(self, sharding: UNetSharding) -> None:
        """Note the call of a ControlNet."""
        self._shardings.append(sharding)

    def take(self, sharding: UNetSharding) -> None:
        """Forget the calls, once they are seen to fit that of the U-Net.

        Raises:
            ValueError: where a ControlNet shared out other images, or another size, than the U-Net does.
        """
        calls, self._shardings = self._shardings, []
        for call in calls:
            if call.grid != sharding.grid:
                sizes = (f"{one.grid.heights[0]} x {one.grid.widths[0]}" for one in (call, sharding))
                raise ValueError("a ControlNet was called with a latent of {}, and its U-Net with {}".format(*sizes))
            is_split = call.images != slice(0, call.batch)
            if is_split and call.batch != sharding.batch:
                raise ValueError(
                    f"a ControlNet was called with a batch of {call.batch}, which --use_cfg_parallel shares out, and "
                    f"its U-Net with {sharding.batch}; call both with one batch, or the ControlNet with guess_mode=True"
                )
