"""Networks whose pipelines are too large to build: one network in a loop of three steps.

Shapes: 27 tokens of a video of 3 frames, 4 heads, 2 layers.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    Cosmos3OmniTransformer,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Transformer3DModel,
    Ideogram4Transformer2DModel,
    LTX2VideoTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from torch import nn
from torch.utils._pytree import tree_leaves

from tests.support.dits.case import Case
from tests.support.dits.packed import HEADS
from tests.support.dits.weights import noise, ones, seeded

TEXT = 7
WAN = {"attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 32, "freq_dim": 32, "ffn_dim": 64}
TRANSFORMERS = "xfuser.model_executor.models.transformers"


class Loop:
    """Stands for a pipeline: calls a network three times, and adds what it predicts to some of its arguments."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer
        self.scheduler = FlowMatchEulerDiscreteScheduler()

    def save_pretrained(self, folder: str) -> None:
        self.transformer.save_pretrained(Path(folder) / "transformer")

    def set_progress_bar_config(self, **settings: Any) -> None:
        """It has none."""

    def __call__(self, states: tuple[str, ...], inputs: dict[str, Any], **others: Any) -> tuple[torch.Tensor]:
        """The last values of the arguments in `states`, which are tensors or lists of one."""
        inputs = dict(inputs)
        if "return_dict" in inspect.signature(self.transformer.forward).parameters:
            inputs["return_dict"] = False
        self.scheduler.set_timesteps(3)
        for time in self.scheduler.timesteps:
            predicted = [leaf for leaf in tree_leaves(self.transformer(**inputs)) if isinstance(leaf, torch.Tensor)]
            for state, prediction in zip(states, predicted, strict=True):
                value = inputs[state]
                before = value[0] if isinstance(value, list) else value
                after = before - 0.3 * prediction.reshape(before.shape)
                inputs[state] = [after] if isinstance(value, list) else after
            self.scheduler.step(predicted[0], time, predicted[0])
        return (torch.cat([leaf.flatten() for state in states for leaf in tree_leaves(inputs[state])]),)


def wrapper(module: str, name: str) -> type:
    """xDiT's class of a network."""
    return getattr(importlib.import_module(f"{TRANSFORMERS}.{module}"), name)


def made(module: str, name: str) -> type:
    """The class that a function of xDiT's makes when it is wanted."""
    return getattr(importlib.import_module(f"{TRANSFORMERS}.{module}"), name)()


def case(name: str, kind: Callable[..., nn.Module], settings: dict[str, Any], inputs: Any, network: Any) -> Case:
    """A case whose first inputs are what is denoised."""

    def build() -> Loop:
        return Loop(seeded(kind(**settings)))

    states = STATES.get(kind, ("hidden_states",))
    return Case(name, build, lambda: {"inputs": inputs()}, {"states": states}, network=network)


STATES: dict[Any, tuple[str, ...]] = {
    LTX2VideoTransformer3DModel: ("hidden_states", "audio_hidden_states"),
    Cosmos3OmniTransformer: ("vision_tokens",),
}


def ltx2_inputs(text: int = 32, audio_text: int = 32, **others: Any) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, 27, 8, seed=1),
        "audio_hidden_states": noise(1, 5, 8, seed=2),
        "encoder_hidden_states": noise(1, TEXT, text, seed=3),
        "audio_encoder_hidden_states": noise(1, TEXT, audio_text, seed=4),
        "timestep": torch.tensor([500.0]),
        "num_frames": 3,
        "height": 3,
        "width": 3,
        "audio_num_frames": 5,
        **others,
    }


LTX2 = {
    **HEADS,
    **dict.fromkeys(("in_channels", "out_channels", "audio_in_channels", "audio_out_channels"), 8),
    "cross_attention_dim": 64,
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 32,
    "num_layers": 2,
    "caption_channels": 32,
    "rope_type": "split",  # as the published models have it; xDiT gathers no other
}


LTX23 = {
    **LTX2,
    **dict.fromkeys(("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod"), True),
    "perturbed_attn": True,
    "use_prompt_embeddings": False,
}
LTX25 = {
    **LTX23,
    **dict.fromkeys(("use_prompt_adaln_single", "ff_bias", "audio_ff_bias"), False),
    "use_keyframes_abs_pos_embedding": True,
}


def ltx23_inputs() -> dict[str, Any]:
    """With one layer's self-attention left out of the prediction, as its pipeline has it in one of the passes."""
    return ltx2_inputs(64, 32, sigma=torch.tensor([0.5]), spatio_temporal_guidance_blocks=[1])


def cosmos3_inputs() -> dict[str, Any]:
    text, image = 5, 27
    return {
        "input_ids": torch.arange(text),
        "text_indexes": torch.arange(text),
        "position_ids": torch.arange(text + image).expand(3, -1),
        "und_len": text,
        "sequence_length": text + image,
        "vision_tokens": [noise(1, 4, 3, 6, 6, seed=1)],
        "vision_token_shapes": [(3, 3, 3)],
        "vision_sequence_indexes": torch.arange(text, text + image),
        "vision_mse_loss_indexes": torch.arange(text, text + image),
        "vision_timesteps": torch.full((image,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(3)],
    }


COSMOS3 = {
    "head_dim": 16,
    "hidden_size": 64,
    "intermediate_size": 128,
    "latent_channel": 4,
    "latent_patch_size": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "patch_latent_dim": 16,
    "vocab_size": 50,
    "rope_axes_dim": (4, 2, 2),
}


def ideogram4_inputs() -> dict[str, Any]:
    image = 36
    return {
        "hidden_states": noise(1, TEXT + image, 16, seed=1),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": noise(1, TEXT + image, 32, seed=2),
        "position_ids": torch.arange(TEXT + image)[None, :, None].expand(1, -1, 3),
        "segment_ids": torch.ones(1, TEXT + image, dtype=torch.long),
        "indicator": torch.tensor([[3] * TEXT + [2] * image]),
    }


IDEOGRAM4 = {
    **HEADS,
    "in_channels": 16,
    "num_layers": 2,
    "intermediate_size": 128,
    "adaln_dim": 32,
    "llm_features_dim": 32,
    "mrope_section": (4, 2, 2),
}


def hunyuan_video15_inputs() -> dict[str, Any]:
    return {
        "hidden_states": noise(1, 4, 3, 3, 3, seed=1),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": noise(1, TEXT, 32, seed=2),
        "encoder_attention_mask": ones(1, TEXT),
        "encoder_hidden_states_2": noise(1, 3, 24, seed=3),
        "encoder_attention_mask_2": torch.tensor([[1, 1, 0]]),
        "image_embeds": torch.zeros(1, 2, 16),
    }


HUNYUAN_VIDEO15 = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 32,
    "text_embed_2_dim": 24,
    "image_embed_dim": 16,
    "rope_axes_dim": (4, 6, 6),
}


def wan_inputs(text: int = TEXT, **others: torch.Tensor) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, 4, 3, 6, 6, seed=1),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": noise(1, text, 32, seed=2),
        **others,
    }


WAN = {**WAN, "num_attention_heads": 4, "num_layers": 2, "rope_max_seq_len": 32}
I2V = {**WAN, "image_dim": 16, "added_kv_proj_dim": 48}
VACE = {**WAN, "vace_layers": [0, 1], "vace_in_channels": 6}
ltx2_wrapper = partial(wrapper, "transformer_ltx2", "xFuserLTX2VideoTransformer3DWrapper")
wan_wrapper = partial(wrapper, "transformer_wan", "xFuserWanTransformer3DWrapper")

CASES = (
    case(
        "ltx-2, 27 tokens",
        LTX2VideoTransformer3DModel,
        LTX2,
        ltx2_inputs,
        ltx2_wrapper,
    ),
    case("ltx-2.3, 27 tokens", LTX2VideoTransformer3DModel, LTX23, ltx23_inputs, ltx2_wrapper),
    case("ltx-2.5, 27 tokens", LTX2VideoTransformer3DModel, LTX25, ltx23_inputs, ltx2_wrapper),
    case(
        "cosmos3, 27 tokens",
        Cosmos3OmniTransformer,
        COSMOS3,
        cosmos3_inputs,
        partial(made, "transformer_cosmos3", "get_cosmos3_transformer_wrapper_class"),
    ),
    case(
        "ideogram4, 43 tokens",
        Ideogram4Transformer2DModel,
        IDEOGRAM4,
        ideogram4_inputs,
        partial(made, "transformer_ideogram4", "get_ideogram4_transformer_wrapper_class"),
    ),
    case(
        "hunyuanvideo-1.5, 27 tokens",
        HunyuanVideo15Transformer3DModel,
        HUNYUAN_VIDEO15,
        hunyuan_video15_inputs,
        partial(wrapper, "transformer_hunyuan_video15", "xFuserHunyuanVideo15Transformer3DWrapper"),
    ),
    case(
        "wan vace, 27 tokens",
        WanVACETransformer3DModel,
        VACE,
        lambda: wan_inputs(control_hidden_states=noise(1, 6, 3, 6, 6, seed=3)),
        partial(wrapper, "transformer_wan_vace", "xFuserWanVACETransformer3DWrapper"),
    ),
    case(
        "wan ti2v, 27 tokens",
        WanTransformer3DModel,
        WAN,
        lambda: wan_inputs(timestep=torch.arange(27.0)[None] * 30),
        wan_wrapper,
    ),
    case(
        "wan i2v, 27 tokens",
        WanTransformer3DModel,
        I2V,
        lambda: wan_inputs(512, encoder_hidden_states_image=noise(1, 9, 16, seed=3)),
        wan_wrapper,
    ),
)
