"""What attention backends take, and the heads that models have."""

import pytest
from diffusers import UNet2DConditionModel

from otil_xdit.catalog.attention_backends import BACKENDS, check_backend, head_sizes, head_sizes_of_config
from otil_xdit.catalog.models import find_record

HEADS = {"SDXL": {64}, "SD1.5": {40, 80, 160}, "SD2.1": {64}, "FLUX.1-dev": {128}, "SD3": {64}}


@pytest.mark.parametrize("model", ["SD1.5", "SDXL", "FLUX.1-dev"])
def test_a_published_model_has_the_heads_of_its_paper(model: str) -> None:
    assert head_sizes(find_record(model)) == HEADS[model]


def test_a_network_s_heads_are_those_of_its_layers() -> None:
    config = {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "norm_num_groups": 8,
        "cross_attention_dim": 16,
    }
    unet = UNet2DConditionModel(**config)
    layers = [layer for layer in unet.modules() if hasattr(layer, "to_q")]
    assert head_sizes_of_config(unet.config) == {layer.inner_dim // layer.heads for layer in layers} == {16}


@pytest.mark.parametrize(
    ("name", "dtype", "heads", "tokens", "reason"),
    [
        ("CUDNN", "float32", {64}, 4096, "computes in float32"),
        ("cudnn", "float16", {160}, 4096, "has heads of 160"),
        ("CUDNN", "float16", {36, 64}, 4096, "has heads of 36"),
        ("CUDNN", "bfloat16", {64}, 1, "has a sequence of 1"),
        ("FLASH", "float32", {64}, None, "computes in float32"),
        ("SDPA_FLASH", "float16", {20}, None, "has heads of 20"),
        ("SAGE", "float16", {160}, None, "has heads of 160"),
    ],
)
def test_what_a_backend_does_not_take_is_refused(
    name: str, dtype: str, heads: set[int], tokens: int | None, reason: str
) -> None:
    with pytest.raises(ValueError, match=f"^--attention_backend {name} takes .*the network {reason}.*give SDPA"):
        check_backend(name, "the network", dtype, heads, tokens)


@pytest.mark.parametrize("name", [None, "SDPA", "SDPA_MATH", "AITER"])
def test_other_backends_are_not_checked(name: str | None) -> None:
    check_backend(name, "the network", "float32", {36, 300}, 1)


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_takes_sdxl_in_half_precision(name: str) -> None:
    check_backend(name, "SDXL", "float16", head_sizes(find_record("SDXL")), 1024)
