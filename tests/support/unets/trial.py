"""One comparison of a patched U-Net with the plain one: which network, on which ranks, with which inputs.

B batch, C channels, H and W the latent's rows and columns, T text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

from tests.support.dits.case import Degrees
from tests.support.dits.weights import noise
from tests.support.unets.configs import POOLED_WIDTH

TEXT_TOKENS = 9
TIMESTEPS = (801, 601, 401)

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """What is compared; `str` of it names it on a command line and `parse` reads that.

    Attributes:
        case: key of `CONFIGS` or `REAL`.
        degrees: of the ranks.
        height, width: of the latent.
        batch: of the sample.
        extra: key of `EXTRAS`, what else the network is called with, or of `ALTERATIONS`.
        freshness: of the exchange; anything but ``sync`` is expected to differ.
    """

    case: str
    degrees: Degrees
    height: int = 64
    width: int = 64
    batch: int = 1
    extra: str = "plain"
    freshness: str = "sync"

    def __str__(self) -> str:
        degrees = f"{self.degrees.patch},{self.degrees.ulysses},{self.degrees.cfg}"
        return f"{self.case}/{degrees}/{self.height}x{self.width}/{self.batch}/{self.extra}/{self.freshness}"

    @classmethod
    def parse(cls, text: str) -> Trial:
        case, degrees, size, batch, extra, freshness = text.split("/")
        height, width = map(int, size.split("x"))
        return cls(case, Degrees(*map(int, degrees.split(","))), height, width, int(batch), extra, freshness)

    def calls(self, unet: UNet2DConditionModel) -> Iterator[Arguments]:
        """The arguments of one call of the network after another, the same in every process.

        The text is the same object in every call, as pipelines pass it, and every sample is a new one.
        """
        arguments = self._always(unet)
        for step, timestep in enumerate(TIMESTEPS):
            shape = (self.batch, unet.config.in_channels, self.height, self.width)
            arguments = {**arguments, "sample": noise(*shape, seed=10 + step), "timestep": torch.tensor(timestep)}
            made = EXTRAS.get(self.extra, _plain)(self, unet, arguments, step)
            yield as_double(made) if self.extra == "double" else made

    def alter(self, unet: UNet2DConditionModel) -> None:
        """Do to `unet` what this trial is about."""
        if self.extra in ALTERATIONS:
            ALTERATIONS[self.extra](unet)

    def _always(self, unet: UNet2DConditionModel) -> Arguments:
        """What this network needs in every call."""
        config = unet.config
        found: Arguments = {"encoder_hidden_states": noise(self.batch, TEXT_TOKENS, _text_width(unet), seed=1)}
        if config.addition_embed_type == "text_time":
            width = config.projection_class_embeddings_input_dim - POOLED_WIDTH
            ids = noise(self.batch, width // config.addition_time_embed_dim, seed=2).abs() * 500
            pooled = noise(self.batch, POOLED_WIDTH, seed=3)
            found["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
        if config.num_class_embeds is not None:
            found["class_labels"] = torch.arange(self.batch) * 7 + 20
        elif config.class_embed_type == "projection":
            found["class_labels"] = noise(self.batch, POOLED_WIDTH, seed=4)
        if config.time_cond_proj_dim is not None:
            found["timestep_cond"] = noise(self.batch, config.time_cond_proj_dim, seed=5)
        return found


def feature_shapes(trial: Trial, unet: UNet2DConditionModel) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    """The maps of the down half in order: ("skip", shape) for each skip connection, ("block", shape) for each block.

    A block's map is that after its last layer: where a T2I-Adapter adds its own. Blocks with cross-attention take it
    before they downsample, the others after.
    """
    height, width = trial.height, trial.width
    yield "skip", (trial.batch, unet.config.block_out_channels[0], height, width)
    for channels, block in zip(unet.config.block_out_channels, unet.down_blocks, strict=True):
        before = (trial.batch, channels, height, width)
        yield from (("skip", before) for _ in block.resnets)
        if block.downsamplers is not None:
            height, width = (height + 1) // 2, (width + 1) // 2
            yield "skip", (trial.batch, channels, height, width)
        yield "block", before if hasattr(block, "attentions") else (trial.batch, channels, height, width)


def _text_width(unet: UNet2DConditionModel) -> int:
    return unet.config.encoder_hid_dim or unet.config.cross_attention_dim


def _residuals(trial: Trial, unet: UNet2DConditionModel, wanted: str, seed: int) -> list[torch.Tensor]:
    shapes = [shape for kind, shape in feature_shapes(trial, unet) if kind == wanted]
    return [noise(*shape, seed=seed + number) for number, shape in enumerate(shapes)]


def _plain(trial: Trial, unet: UNet2DConditionModel, arguments: Arguments, step: int) -> Arguments:
    return arguments


def _controlnet(trial: Trial, unet: UNet2DConditionModel, arguments: Arguments, step: int) -> Arguments:
    *skips, middle = (*_residuals(trial, unet, "skip", 100 * step), _residuals(trial, unet, "skip", 77 + step)[-1])
    return {**arguments, "down_block_additional_residuals": skips, "mid_block_additional_residual": middle}


def _adapter(trial: Trial, unet: UNet2DConditionModel, arguments: Arguments, step: int) -> Arguments:
    # Adapters run once: their maps are the same in all steps. The network empties the list, so each call gets its own.
    return {**arguments, "down_intrablock_additional_residuals": _residuals(trial, unet, "block", 200)}


def _text_mask(trial: Trial, unet: UNet2DConditionModel, arguments: Arguments, step: int) -> Arguments:
    lengths = 3 + torch.arange(trial.batch)[:, None]
    return {**arguments, "encoder_attention_mask": torch.arange(TEXT_TOKENS)[None] < lengths}


def _timestep_per_item(trial: Trial, unet: UNet2DConditionModel, arguments: Arguments, step: int) -> Arguments:
    return {**arguments, "timestep": arguments["timestep"] - 50 * torch.arange(trial.batch)}


def _number_as_timestep(trial: Trial, unet: UNet2DConditionModel, arguments: Arguments, step: int) -> Arguments:
    return {**arguments, "timestep": float(arguments["timestep"]), "return_dict": False}


def _new_text(trial: Trial, unet: UNet2DConditionModel, arguments: Arguments, step: int) -> Arguments:
    text = noise(trial.batch, TEXT_TOKENS + step, _text_width(unet), seed=300 + step)
    return {**arguments, "encoder_hidden_states": text}


def _text_in_place(trial: Trial, unet: UNet2DConditionModel, arguments: Arguments, step: int) -> Arguments:
    arguments["encoder_hidden_states"].neg_()
    return arguments


def as_double(value: Any) -> Any:
    """`value` with its floating-point tensors in float64."""
    if isinstance(value, dict):
        return {name: as_double(part) for name, part in value.items()}
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _double(unet: UNet2DConditionModel) -> None:
    unet.double()


def _plain_attention(unet: UNet2DConditionModel) -> None:
    unet.set_attn_processor(AttnProcessor())


def _sliced_attention(unet: UNet2DConditionModel) -> None:
    unet.set_attention_slice("max")


def _fused_projections(unet: UNet2DConditionModel) -> None:
    unet.fuse_qkv_projections()


def _channels_last(unet: UNet2DConditionModel) -> None:
    unet.to(memory_format=torch.channels_last)


EXTRAS: dict[str, Callable[[Trial, UNet2DConditionModel, Arguments, int], Arguments]] = {
    "plain": _plain,
    "controlnet": _controlnet,
    "adapter": _adapter,
    "text mask": _text_mask,
    "timestep per item": _timestep_per_item,
    "timestep as number": _number_as_timestep,
    "new text": _new_text,
    "text in place": _text_in_place,
}
"""Ways to call a network; each gets the usual arguments of a step and gives those that the network is called with."""


def _compiled(unet: UNet2DConditionModel) -> None:
    unet.compile(backend="eager")  # what is in question is what Dynamo makes of the layers, not the code generated


ALTERATIONS: dict[str, Callable[[UNet2DConditionModel], None]] = {
    "double": _double,
    "plain attention": _plain_attention,
    "sliced attention": _sliced_attention,
    "fused projections": _fused_projections,
    "channels last": _channels_last,
    "compiled": _compiled,
}
"""What users do to a network; done after it was parallelised. A trial names one in the place of an extra."""
