"""Pipelines that xDiT's runner cannot load so small, as `otil_xdit.parallelize` gets them: loaded already.

Their text encoders are replaced by what these would return.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLWan,
    ClassifierFreeGuidance,
    CogVideoXDPMScheduler,
    ConsisIDPipeline,
    ConsisIDTransformer3DModel,
    Cosmos3OmniPipeline,
    Cosmos3OmniTransformer,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from PIL import Image
from torch import nn

from tests.support.dits.case import Case
from tests.support.dits.networks import COSMOS3, HUNYUAN_VIDEO15, I2V, IDEOGRAM4, VACE, WAN
from tests.support.dits.packed import HEADS, image, tiny_levels
from tests.support.dits.videos import FRAMES, UNCLIPPED, two_embeds
from tests.support.dits.weights import noise, ones, seeded

TEXT = 7
SMALL = {**FRAMES, "height": 48, "width": 48, "num_frames": 9, "negative_prompt": None}
"""27 tokens, with a VAE that makes an eighth of a side."""


def small_image() -> Image.Image:
    return image().resize((48, 48))


def wan_vae() -> AutoencoderKLWan:
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return seeded(vae)


def flow_solver() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def build_wan_i2v(settings: dict[str, Any], networks: int = 1) -> WanImageToVideoPipeline:
    # The latent, the image's, and a mask of four frames.
    transformers = [seeded(WanTransformer3DModel(**{**settings, "in_channels": 12})) for _ in range(networks)]
    second = {"transformer_2": transformers[1], "boundary_ratio": 0.9} if networks > 1 else {}
    pipe = WanImageToVideoPipeline(None, None, wan_vae(), flow_solver(), transformer=transformers[0], **second)
    pipe.encode_image = lambda image, device: noise(1, 9, 16, seed=5)  # type: ignore[method-assign]
    return pipe


def build_wan_ti2v() -> WanPipeline:
    """Of Wan 2.2's smallest, where each token has its own timestep."""
    return WanPipeline(
        None, None, wan_vae(), flow_solver(), seeded(WanTransformer3DModel(**WAN)), expand_timesteps=True
    )


def i2v_embeds(tokens: int = TEXT) -> dict[str, Any]:
    return {**two_embeds(tokens), "image": small_image()}


def build_vace() -> WanVACEPipeline:
    # The latent's channels twice, and the mask's of 8 x 8 pixels.
    network = WanVACETransformer3DModel(**{**VACE, "vace_in_channels": 2 * 4 + 64})
    return WanVACEPipeline(None, None, wan_vae(), flow_solver(), seeded(network))


def build_hunyuan_video15() -> HunyuanVideo15Pipeline:
    settings = {**HUNYUAN_VIDEO15, "in_channels": 9, "patch_size": 1, "patch_size_t": 1}
    pipe = HunyuanVideo15Pipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=seeded(HunyuanVideo15Transformer3DModel(**settings)),
        vae=AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(32, 32, 32, 32, 32), layers_per_block=1),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder_2=None,
        tokenizer_2=None,
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
    )
    return pipe


def hunyuan_video15_embeds() -> dict[str, Any]:
    embeds: dict[str, Any] = {}
    for sign, seed in (("", 1), ("negative_", 3)):
        embeds |= {
            f"{sign}prompt_embeds": noise(1, TEXT, 32, seed=seed),
            f"{sign}prompt_embeds_mask": ones(1, TEXT),
            f"{sign}prompt_embeds_2": noise(1, 3, 24, seed=seed + 1),
            f"{sign}prompt_embeds_mask_2": torch.tensor([[1, 1, 0]]),
        }
    return embeds


def build_consisid() -> ConsisIDPipeline:
    transformer = ConsisIDTransformer3DModel(
        in_channels=8,
        out_channels=4,
        time_embed_dim=32,
        text_embed_dim=32,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=TEXT + 1,
        use_rotary_positional_embeddings=True,
        cross_attn_interval=1,
        is_train_face=True,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=16,
        LFE_vit_dim=16,
        LFE_depth=5,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=4,
        LFE_output_dim=42,
        LFE_ff_mult=1,
        **HEADS,
    )
    vae = AutoencoderKLCogVideoX(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    return ConsisIDPipeline(None, None, seeded(vae), seeded(transformer), CogVideoXDPMScheduler(**UNCLIPPED))


def consisid_embeds() -> dict[str, Any]:
    return {
        **two_embeds(TEXT + 1),
        "image": image().resize((64, 64)),
        "id_vit_hidden": [noise(1, 3, 16, seed=10 + level) for level in range(5)],
        "id_cond": noise(1, 16, seed=9),
    }


class Words:
    """Stands for a tokenizer: how many tokens a text has follows from its length."""

    eos_token_id = 2

    def convert_tokens_to_ids(self, token: str) -> int:
        return 3

    def apply_chat_template(self, messages: Any, **kwargs: Any) -> Any:
        text = str(messages)
        return SimpleNamespace(input_ids=self(text)["input_ids"][0].tolist()) if kwargs.get("tokenize", True) else text

    def __call__(self, text: str, **kwargs: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.arange(4, 9 + len(text) % 3)[None]}


class Nothing(nn.Module):
    """Stands for a text encoder that is on the CPU."""

    device = torch.device("cpu")


def build_cosmos3() -> Cosmos3OmniPipeline:
    network = seeded(Cosmos3OmniTransformer(**COSMOS3))
    return Cosmos3OmniPipeline(network, Words(), wan_vae(), flow_solver(), enable_safety_checker=False)


def build_ideogram4() -> Ideogram4Pipeline:
    networks = [seeded(Ideogram4Transformer2DModel(**IDEOGRAM4)) for _ in range(2)]
    vae = AutoencoderKLFlux2(**tiny_levels())
    pipe = Ideogram4Pipeline(FlowMatchEulerDiscreteScheduler(), vae, Nothing(), Words(), *networks)
    pipe._get_text_encoder_hidden_states = lambda encoder, ids, *others: [noise(*ids.shape, 32, seed=1)]
    return pipe


IDEOGRAM4_CALL = {
    "prompt": "a prompt",
    "height": 112,
    "width": 112,
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "guidance_schedule": None,
    "max_sequence_length": 10,
}
VIDEO15 = {name: value for name, value in SMALL.items() if name != "guidance_scale"}

CASES = (
    Case("wan i2v", lambda: build_wan_i2v(I2V), lambda: i2v_embeds(512), SMALL, cfg=True),
    Case("wan2.2 i2v", lambda: build_wan_i2v(WAN, 2), i2v_embeds, SMALL, cfg=True),
    Case("wan ti2v", build_wan_ti2v, lambda: two_embeds(TEXT), SMALL),
    Case("wan vace", build_vace, lambda: two_embeds(TEXT), SMALL),
    Case("hunyuanvideo-1.5", build_hunyuan_video15, hunyuan_video15_embeds, VIDEO15),
    Case("cosmos3", build_cosmos3, dict, {**SMALL, "prompt": "a prompt"}, cfg=True),
    Case("ideogram4", build_ideogram4, dict, IDEOGRAM4_CALL, cfg=True),
)
"""Wan 2.1 I2V tells the first 512 tokens from the others, which are the image's."""

CONSISID = Case("consisid", build_consisid, consisid_embeds, {**FRAMES, "negative_prompt": None}, cfg=True)
"""Needs the package cv2, without which diffusers and xDiT have no such pipeline."""
