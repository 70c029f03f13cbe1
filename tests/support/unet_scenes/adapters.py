"""LoRA, loaded before and after parallelising, and IP-Adapter."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig, get_peft_model_state_dict

from tests.support.dits.weights import noise
from tests.support.unet_scenes.parts import TEXT_WIDTH, pipeline, unet
from tests.support.unet_scenes.scene import Scene, calling, images

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv2", "conv_in", "proj_in", "conv_shortcut", "conv"]
IMAGE_WIDTH = 20


def lora(case: str, targets: list[str], seed: int) -> dict[str, torch.Tensor]:
    """A LoRA for that U-Net as a file would hold it, large enough to be seen."""
    network = unet(case)
    network.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    state = get_peft_model_state_dict(network)
    numbered = enumerate(sorted(state))
    return {f"unet.{name}": 0.15 * noise(*state[name].shape, seed=seed + number) for number, name in numbered}


def sd() -> Any:
    return pipeline(StableDiffusionPipeline)


def with_lora() -> Any:
    pipe = sd()
    pipe.load_lora_weights(lora("sd1.5", ATTENTION + CONVOLUTIONS, 100), adapter_name="a")
    return pipe


def sdxl_with_lora() -> Any:
    pipe = pipeline(StableDiffusionXLPipeline, "sdxl")
    pipe.load_lora_weights(lora("sdxl", ATTENTION + ["ff.net.0.proj", *CONVOLUTIONS], 100), adapter_name="a")
    return pipe


def loaded_later(pipe: Any) -> list[torch.Tensor]:
    """One image without, then with attention's LoRA, then with the convolutions' too, then without again."""
    found = [images(pipe)]
    pipe.load_lora_weights(lora("sd1.5", ATTENTION, 100), adapter_name="a")
    found.append(images(pipe))
    pipe.load_lora_weights(lora("sd1.5", CONVOLUTIONS, 500), adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.8, 0.6])
    found.append(images(pipe))
    pipe.set_adapters(["b"], [1.1])
    found.append(images(pipe))
    pipe.disable_lora()
    found.append(images(pipe))
    pipe.enable_lora()
    pipe.delete_adapters("b")
    pipe.set_adapters(["a"])
    found.append(images(pipe))
    pipe.unload_lora_weights()
    return [*found, images(pipe)]


def fused(pipe: Any) -> list[torch.Tensor]:
    pipe.fuse_lora(lora_scale=0.7)
    found = [images(pipe)]
    pipe.unfuse_lora()
    found.append(images(pipe))
    pipe.fuse_lora(lora_scale=1.3)
    found.append(images(pipe))
    pipe.unload_lora_weights()  # with the weights still fused
    return [*found, images(pipe)]


def scaled(pipe: Any) -> list[torch.Tensor]:
    return [images(pipe, cross_attention_kwargs={"scale": scale}) for scale in (0.5, 1.0)]


def switched_midway(pipe: Any) -> list[torch.Tensor]:
    """The text's keys and values depend on the adapter, within a generation too."""

    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe.set_adapters(["a"], [0.2 + 0.4 * step])
        return {}

    return [images(pipe, callback_on_step_end=on_step_end)]


def fused_midway(pipe: Any) -> list[torch.Tensor]:
    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            pipe.fuse_lora(lora_scale=0.5)
        elif step == 1:
            pipe.unfuse_lora()
            pipe.fuse_lora(lora_scale=1.5)
        return {}

    return [images(pipe, callback_on_step_end=on_step_end)]


def load_ip_adapter(pipe: Any, seed: int = 900) -> None:
    """An IP-Adapter as its file would hold it."""
    adapter: dict[str, torch.Tensor] = {}
    for number, name in enumerate(pipe.unet.attn_processors):
        if "attn2" in name:
            width = pipe.unet.get_submodule(name.removesuffix(".processor")).inner_dim
            for part in ("k", "v"):
                weight = noise(width, pipe.unet.config.cross_attention_dim, seed=seed + len(adapter))
                adapter[f"{number}.to_{part}_ip.weight"] = weight / TEXT_WIDTH**0.5
    width = pipe.unet.config.cross_attention_dim
    projection = {
        "proj.weight": noise(4 * width, IMAGE_WIDTH, seed=seed - 1) / IMAGE_WIDTH**0.5,
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    pipe.load_ip_adapter(
        {"image_proj": projection, "ip_adapter": adapter}, subfolder="", weight_name="", image_encoder_folder=None
    )


def sd_with_ip_adapter() -> Any:
    pipe = sd()
    load_ip_adapter(pipe)
    return pipe


def guided_by_image(pipe: Any) -> list[torch.Tensor]:
    embeds = torch.cat([torch.zeros(1, 1, IMAGE_WIDTH), noise(1, 1, IMAGE_WIDTH, seed=5)])
    found = []
    for scale in (0.5, 1.0):
        pipe.set_ip_adapter_scale(scale)
        found.append(images(pipe, ip_adapter_image_embeds=[embeds]))
    return [*found, images(pipe, ip_adapter_image_embeds=[embeds], num_images_per_prompt=2)]


def ip_adapter_later(pipe: Any) -> list[torch.Tensor]:
    before = images(pipe)
    load_ip_adapter(pipe)
    found = [before, *guided_by_image(pipe)]
    pipe.unload_ip_adapter()
    return [*found, images(pipe)]


SCENES = (
    Scene("LoRA before", with_lora, calling()),
    Scene("LoRA after, several, deleted", sd, loaded_later),
    Scene("LoRA fused and unfused", with_lora, fused),
    Scene("LoRA scaled by the call", with_lora, scaled),
    Scene("LoRA switched midway", with_lora, switched_midway),
    Scene("LoRA fused midway", with_lora, fused_midway),
    Scene("SDXL LoRA", sdxl_with_lora, calling(cross_attention_kwargs={"scale": 0.8})),
    Scene("IP-Adapter", sd_with_ip_adapter, guided_by_image),
    Scene("IP-Adapter after", sd, ip_adapter_later),
)
