"""`PatchedControlNet`: a `ControlNetModel` on patches; its residuals stay where they are made.

A ControlNet is the encoder of a U-Net and reads the same latent, so it is cut as the U-Net is: each rank computes the
residuals of its rows (and, under CFG parallelism, of its half of the batch), which is all that its part of the U-Net
adds. The pipeline scales and adds residuals up without looking at their sizes.

Shapes: B batch, C channels, H x W the latent, h rows of this rank, s pixels of the condition to a latent pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding, ControlNetModel, ControlNetOutput
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from torch import nn

from otil_xdit.comm.groups import UnetGroups
from otil_xdit.networks.class_swap import is_swapped, subclass_of, swap_class
from otil_xdit.networks.compatibility import check_no_gradients
from otil_xdit.networks.unet.compatibility import check_arguments
from otil_xdit.networks.unet.context import CONTEXT, LayerContext
from otil_xdit.networks.unet.control_calls import ControlCalls
from otil_xdit.networks.unet.model import Attend, PatchedNetwork, SessionProtocol
from otil_xdit.networks.unet.sharding import UNetSharding


def is_controlnet(network: Any) -> bool:
    """Tell whether a network is run by `PatchedControlNet`."""
    return isinstance(network, ControlNetModel)


def controlnets_in(name: str, holder: nn.Module) -> dict[str, nn.Module]:
    """Return the networks of what a pipeline has under `name`: one ControlNet, or several that are added up."""
    if isinstance(holder, MultiControlNetModel):
        return {f"{name}.nets.{number}": net for number, net in enumerate(holder.nets)}
    return {name: holder}


def why_whole(controlnet: Any) -> str | None:
    """Return why every rank is to compute a ControlNet by itself; None where the ranks can share it."""
    if not is_controlnet(controlnet):
        return f"it is a {type(controlnet).__name__}"
    if controlnet.config.get("global_pool_conditions"):
        return "it pools its residuals over the whole image"
    return None


class PatchedControlNet(PatchedNetwork):
    """One ControlNet whose layers reach the other ranks.

    Args:
        controls: told of each call; others as of `PatchedNetwork`.
    """

    def __init__(
        self,
        session: SessionProtocol,
        network: Any,
        groups: UnetGroups,
        attend: Attend,
        controls: ControlCalls,
        name: str = "controlnet",
    ) -> None:
        super().__init__(session, network, groups, attend, name)
        self._controls = controls
        self._condition: Condition | None = None

    def prepare(self, holders: Iterable[nn.Module] = ()) -> None:
        super().prepare(holders)
        embedding = self.network.controlnet_cond_embedding
        if not is_swapped(embedding):
            swap_class(embedding, _patched_embedding)
        vars(embedding)[CONTEXT] = LayerContext(self, "controlnet_cond_embedding", 0)

    def forward(self, plain: Callable[..., Any], sample: torch.Tensor, **kwargs: Any) -> Any:
        """Compute this rank's part of the residuals that the ControlNet's own `forward` gives for the whole latent.

        Args:
            plain: the network's own `forward`, which returns a tuple.
            sample: the whole latent, [B, C, H, W].
            kwargs: what else the network is called with.

        Returns:
            The residuals of this rank's rows and images, as diffusers' output or in a tuple (`return_dict`).

        Raises:
            ValueError: for arguments that patches cannot serve, and sizes that the ranks cannot share.
        """
        check_arguments(kwargs)
        check_no_gradients(self.network, sample, *kwargs.values())
        return_dict = kwargs.pop("return_dict", True)
        # In guess mode the batch is that with the prompt alone: the pipeline puts zeros in front of the residuals.
        is_split = not kwargs.get("guess_mode", False) and not self.session.cfg_controller.calls_blocks
        sharding = UNetSharding.of(sample, self._levels.count, self.groups, self.groups.cfg_rank, is_split)
        self._count_call()
        self._controls.record(sharding)
        latent = sharding.rows_of(sharding.images_of(sample))
        self.session.communicator.observe(latent, sharding.token_layout(0))
        arguments = {name: sharding.argument(name, value) for name, value in kwargs.items()}
        whole = kwargs["controlnet_cond"]
        self._condition = Condition.of(whole, sharding, self.network.controlnet_cond_embedding)
        arguments["controlnet_cond"] = self._condition.rows_in(arguments["controlnet_cond"])
        self._sharding, self.running, self.is_under_way = sharding, self.groups.rows.world_size > 1, True
        try:
            residuals, middle = plain(latent, **arguments)
        finally:
            self._sharding, self._prefetched, self._condition = None, None, None
            self.running = self.is_under_way = False
        if return_dict:
            return ControlNetOutput(down_block_res_samples=residuals, mid_block_res_sample=middle)
        return residuals, middle

    @torch.compiler.disable
    def embed(self, embedding: Any, plain: Callable[[torch.Tensor], torch.Tensor], part: torch.Tensor) -> torch.Tensor:
        """Return the embedding of this rank's rows of the condition, which is the same at all steps.

        Args:
            embedding: the layer.
            plain: its own `forward`.
            part: the condition's rows that these are made of.

        Returns:
            [B, C, h, W]
        """
        condition = self._condition
        if condition is None:
            return plain(part)
        name = f"the condition, images {condition.images}"
        return self.text_cache.get(name, condition.whole, (embedding,), lambda: condition.cut(plain(part)))


@dataclass(frozen=True)
class Condition:
    """Which rows of the condition a rank embeds, and which of the result are its own.

    The whole condition is on every rank, so the embedding's convolutions ask nobody: they are given as many rows more
    as they look beyond a patch.

    Attributes:
        whole: the condition, [B, C, s * H, s * W].
        images: of the batch, those of this rank.
        rows: of `whole`, to be embedded.
        first, count: this rank's rows of the result.
    """

    whole: torch.Tensor
    images: tuple[int, int]
    rows: slice
    first: int
    count: int

    @classmethod
    def of(cls, whole: torch.Tensor, sharding: UNetSharding, embedding: nn.Module) -> Condition:
        """Find the rows for a call.

        Args:
            whole: the condition.
            sharding: of the call.
            embedding: reads the condition.
        """
        rows = sharding.grid.slice_of(0, sharding.groups.rows.rank)
        images = (sharding.images.start, sharding.images.stop)
        scale, reach = scale_and_reach(embedding)
        if whole.shape[2] != scale * sharding.grid.heights[0]:
            # Sizes that diffusers rounds (or refuses); or an embedding that is not known.
            return cls(whole, images, slice(0, whole.shape[2]), rows.start, rows.stop - rows.start)
        above = min(math.ceil(reach / scale), rows.start)
        taken = slice(scale * (rows.start - above), scale * rows.stop + scale * math.ceil(reach / scale))
        return cls(whole, images, taken, above, rows.stop - rows.start)

    def rows_in(self, condition: torch.Tensor) -> torch.Tensor:
        """Return the rows to be embedded of the condition of this rank's images."""
        return condition[:, :, self.rows]

    def cut(self, embedded: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows of what was made of `rows_in`, in memory of their own."""
        return embedded[:, :, self.first : self.first + self.count].clone()


def scale_and_reach(embedding: nn.Module) -> tuple[int, int]:
    """Return how many rows of the condition become one, and how many beyond its own a row of the result depends on.

    (0, 0) for an embedding that is not diffusers' own.
    """
    base = getattr(type(embedding), "_otil_base", type(embedding))
    convs = [module for module in embedding.modules() if isinstance(module, nn.Conv2d)]
    if base is not ControlNetConditioningEmbedding or any(conv.kernel_size != (3, 3) for conv in convs):
        return 0, 0
    scale, reach = 1, 0
    for conv in convs:
        reach += scale
        scale *= conv.stride[0]
    return scale, reach


@cache
def _patched_embedding(kind: Any) -> type:
    def forward(self: Any, conditioning: torch.Tensor) -> torch.Tensor:
        network: PatchedControlNet = self._otil_context.exchange
        return network.embed(self, lambda part: kind.forward(self, part), conditioning)

    return subclass_of(kind, {"forward": forward, CONTEXT: None})
