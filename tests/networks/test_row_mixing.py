"""Nothing but the layers that patches wrap lets rows meet; whatever else does is refused by name.

The search is by NaN (`tests.support.row_probe`), over all that diffusers, PEFT and torch can do to a U-Net, by their
own lists: what a new version adds fails here until it is looked at.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import cache
from types import MethodType, SimpleNamespace
from typing import Any, cast

import diffusers
import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models import attention_processor
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

from otil_xdit.dryrun.job import ParallelDegrees
from otil_xdit.dryrun.stand_ins import DryRunSession, unet_groups
from otil_xdit.networks.compatibility import ModuleInspector
from otil_xdit.networks.handles import make_order
from otil_xdit.networks.unet.attention import PLAIN_PROCESSORS, check_attention
from otil_xdit.networks.unet.context import LayerContext
from otil_xdit.networks.unet.layers import wrap_layer
from otil_xdit.networks.unet.model import PatchedUNet
from tests.support.communicators import FakeCommunicator
from tests.support.dits.case import Degrees
from tests.support.row_probe import leaks
from tests.support.unets import CONFIGS, Trial, build_unet

nobody: Any = None

SMALL = "small-sd"
"""Three levels, with convolutions, norms and both kinds of attention."""


@cache
def _built() -> UNet2DConditionModel:
    return build_unet(SMALL)


def small() -> UNet2DConditionModel:
    """A U-Net of one's own."""
    return copy.deepcopy(_built())


def leak(unet: UNet2DConditionModel, case: str = SMALL) -> str:
    """The first place where rows meet that is no wrapped layer; empty where there is none."""
    levels = len(unet.config.block_out_channels)
    arguments = next(iter(Trial(case, Degrees(patch=2), 6 * 2 ** (levels - 1), 4 * 2 ** (levels - 1)).calls(unet)))
    sample = arguments.pop("sample")
    return leaks(unet, lambda latent: unet(latent, **arguments, return_dict=False)[0], sample, 2 ** (levels - 1))


def refusal(unet: UNet2DConditionModel) -> str:
    """Why a generation would refuse the network; empty where it would not."""
    groups, session = unet_groups(ParallelDegrees(patches=2), 0), DryRunSession(FakeCommunicator())
    try:
        ModuleInspector("unet", unet, patched=True).check()
        patched = PatchedUNet(session, unet, groups, nobody)
        try:
            patched.prepare()
            patched.prepare()  # as for the next image, when the layers are wrapped already
        finally:
            patched.release()
    except ValueError as error:
        return str(error)
    return ""


OFTEN = ("sd1.5", "sdxl")


@pytest.mark.parametrize(
    "case", [case if case in OFTEN else pytest.param(case, marks=pytest.mark.slow) for case in CONFIGS]
)
def test_only_wrapped_layers_mix_rows(case: str) -> None:
    assert leak(build_unet(case), case) == ""


# ---- adapters --------------------------------------------------------------------------------------------------------

TARGETS = {"convolutions": ["conv1", "conv_in"], "linear layers": ["to_q", "to_v"], "norms": ["norm1"]}
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"r": 4},
    {"feedforward_modules": []},
    {"block_size": 4},
    {"n_frequency": 10},
    {"group_size": 4},
    {"total_step": 10},
)
"""Some kinds want sizes that divide a layer's, or cannot do without a setting."""

CONVOLVES_ITSELF = ("BOFT", "HIRA", "HRA", "LOHA", "LOKR", "OFT")


def adapted(kind: str, targets: list[str]) -> UNet2DConditionModel | None:
    """A U-Net with an adapter of PEFT; None where PEFT has none of this kind for such layers."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    known = inspect.signature(config).parameters
    for settings in SETTINGS if "target_modules" in known else ():
        unet = small()
        try:
            unet.add_adapter(config(target_modules=targets, **settings))
        except Exception:  # each kind has its own way to say so
            continue
        return unet.eval().requires_grad_(False)
    return None


def judged(kind: str, what: str) -> str:
    """Whether such an adapter is refused or keeps rows apart."""
    unet = adapted(kind, TARGETS[what])
    if unet is None:
        return "none"
    if refusal(unet):
        return "refused"
    return leak(unet) or "apart"


@pytest.mark.parametrize("kind", [pytest.param("BOFT", marks=pytest.mark.slow), *CONVOLVES_ITSELF[1:]])
def test_adapters_that_convolve_themselves_are_refused_on_convolutions(kind: str) -> None:
    unet = adapted(kind, TARGETS["convolutions"])
    assert unet is not None and "adapter on the convolution unet.conv_in" in refusal(unet)
    assert "conv_in" in leak(unet)
    assert judged(kind, "linear layers") == "apart"


@pytest.mark.parametrize("kind", ["LORA", "IA3"])
def test_adapters_that_call_layers_keep_rows_apart(kind: str) -> None:
    assert judged(kind, "convolutions") == judged(kind, "linear layers") == "apart"


@pytest.mark.slow
def test_all_adapters_of_peft_keep_rows_apart_or_are_refused() -> None:
    """By PEFT's own table; that weights begin as zeros hides nothing, as NaN times 0 is NaN."""
    found = {(kind.value, what): judged(kind.value, what) for kind in PEFT_TYPE_TO_CONFIG_MAPPING for what in TARGETS}
    print(
        {
            answer: [f"{kind} {what}" for (kind, what), one in found.items() if one == answer]
            for answer in ("apart", "refused")
        }
    )
    assert {*found.values()} == {"none", "apart", "refused"}
    refused = {kind for (kind, what), answer in found.items() if answer == "refused"}
    assert refused == {*CONVOLVES_ITSELF, "LN_TUNING"}
    assert sum(answer == "apart" for answer in found.values()) >= 25


# ---- what diffusers' own methods do ----------------------------------------------------------------------------------


def own_processor(unet: UNet2DConditionModel) -> None:
    kind = type("Own", (attention_processor.AttnProcessor,), {"__module__": "mine"})
    unet.set_attn_processor(kind())


DEEDS: dict[str, Callable[[UNet2DConditionModel], object]] = {
    "add_adapter": lambda unet: unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"])),
    "enable_freeu": lambda unet: unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "enable_gradient_checkpointing": lambda unet: unet.enable_gradient_checkpointing(),
    "enable_layerwise_casting": lambda unet: unet.enable_layerwise_casting(torch.float32, torch.float32),
    "fuse_qkv_projections": lambda unet: unet.fuse_qkv_projections(),
    "set_attention_backend": lambda unet: unet.set_attention_backend("native"),
    "set_attention_slice": lambda unet: unet.set_attention_slice(1),
    "set_attn_processor": own_processor,
    "set_default_attn_processor": lambda unet: unet.set_default_attn_processor(),
}
"""What may change what a network computes, by the method; each is refused, or rows stay apart."""

UNTRIED = {
    "compile_repeated_blocks": "compiles what is there; U-Nets have no repeated blocks",
    "dequantize": "of quantised layers, which are refused",
    "enable_group_offload": "sets forwards, which are refused (tests/workers/compatibility.py)",
    "enable_lora_hotswap": "pads LoRA's weights with zeros",
    "enable_npu_flash_attention": "needs an NPU; its processor is refused",
    "enable_parallelism": "needs process groups; its hooks are refused",
    "enable_xformers_memory_efficient_attention": "needs xformers; its processor computes plain attention",
    "enable_xla_flash_attention": "needs XLA; its processor is refused",
    "load_attn_procs": "LoRA, or CustomDiffusion's processors, which are refused",
    "load_lora_adapter": "add_adapter with weights",
    "set_use_memory_efficient_attention_xformers": "as enable_xformers_memory_efficient_attention",
    "set_use_npu_flash_attention": "as enable_npu_flash_attention",
    "set_use_xla_flash_attention": "as enable_xla_flash_attention",
    "fuse_lora": "changes weights only",
}
"""What may, and is not done here, and why."""

NO_CHANGE = (
    "active_adapters delete_adapters disable_adapters disable_freeu disable_gradient_checkpointing "
    "disable_lora disable_npu_flash_attention disable_xformers_memory_efficient_attention "
    "disable_xla_flash_attention enable_adapters enable_lora extract_init_dict from_config from_pretrained "
    "from_single_file get_aug_embed get_class_embed get_config_dict get_memory_footprint get_time_embed "
    "load_config num_parameters process_encoder_hidden_states push_to_hub register_for_auto_class "
    "register_to_config reset_attention_backend save_attn_procs save_config save_lora_adapter save_pretrained "
    "set_adapter set_adapters to_json_file to_json_string unfuse_lora unfuse_qkv_projections unload_lora "
).split()
"""Read, write, undo, or choose among adapters."""


def test_every_method_of_a_unet_is_looked_at() -> None:
    methods = {name for name in dir(UNet2DConditionModel) if name[0] != "_" and not hasattr(nn.Module, name)}
    methods = {name for name in methods if callable(getattr(UNet2DConditionModel, name))}
    assert methods - {*DEEDS, *UNTRIED, *NO_CHANGE} == set()


@pytest.mark.parametrize("method", DEEDS)
def test_methods_keep_rows_apart_or_are_refused(method: str) -> None:
    unet = small()
    DEEDS[method](unet)
    if method not in ("enable_freeu", "fuse_qkv_projections", "set_attn_processor", "enable_layerwise_casting"):
        assert refusal(unet) == leak(unet) == ""
        return
    assert refusal(unet) != ""
    if method == "enable_freeu":
        assert leak(unet) != "", "its Fourier transform shows that the search finds something"


def test_a_processor_that_is_taken_computes_plain_attention() -> None:
    """On patches no processor is called for self-attention: what another computes would be left out in silence."""
    names = [name for name in dir(attention_processor) if "Attn" in name and "Processor" in name]
    kinds = [kind for name in names if inspect.isclass(kind := getattr(attention_processor, name))]
    unet, taken = small(), set()
    arguments = next(iter(Trial(SMALL, Degrees(patch=2), 8, 8).calls(unet)))
    attention = next(module for module in unet.modules() if isinstance(module, attention_processor.Attention))
    with torch.no_grad():
        expected = unet(**arguments).sample
    for kind in kinds:
        try:
            made = kind(1) if "Sliced" in kind.__name__ else kind()
        except Exception:  # wants sizes, or a package or device that is not here
            continue
        attention.processor = made
        try:
            check_attention(attention, "layer")
        except ValueError:
            continue
        unet.set_attn_processor(made)
        taken.add(kind.__name__)
        if "XFormers" not in kind.__name__:  # not installed here
            with torch.no_grad():
                torch.testing.assert_close(unet(**arguments).sample, expected, atol=1e-4, rtol=1e-4)
    assert taken == {*PLAIN_PROCESSORS}


def test_a_processor_that_is_put_in_place_during_an_image_is_refused() -> None:
    """Some pipelines, and callbacks, do so after the networks have been looked at."""
    attention = attention_processor.Attention(8)
    wrap_layer(attention, LayerContext(cast(Any, SimpleNamespace(running=True, order=make_order())), "mid", 0))
    attention.processor = attention_processor.PAGIdentitySelfAttnProcessor2_0()
    with pytest.raises(ValueError, match="PAGIdentitySelfAttnProcessor2_0 of the layer mid"):
        attention(torch.zeros(1, 4, 8))


# ---- what others do --------------------------------------------------------------------------------------------------


def tiles(unet: UNet2DConditionModel) -> None:
    """Images without a seam, as user interfaces make them: each convolution gets a method of its own."""

    def _conv_forward(
        self: nn.Conv2d, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return functional.conv2d(functional.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias, self.stride)

    for module in unet.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module._conv_forward = MethodType(_conv_forward, module)


def circular(unet: UNet2DConditionModel) -> None:
    for module in unet.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.padding_mode = "circular"


def normed_by_rows(unet: UNet2DConditionModel) -> None:
    unet.down_blocks[1].resnets[0].norm1 = nn.InstanceNorm2d(48)


def pooled(unet: UNet2DConditionModel) -> None:
    unet.down_blocks[1].resnets[0].nonlinearity = nn.AvgPool2d(3, 1, 1)


def class_method(unet: UNet2DConditionModel) -> Callable[[], None]:
    plain = attention_processor.Attention.batch_to_head_dim

    def batch_to_head_dim(self: Any, x: torch.Tensor) -> torch.Tensor:
        return plain(self, x.flip(1))

    batch_to_head_dim.__module__ = "mine"
    attention_processor.Attention.batch_to_head_dim = batch_to_head_dim
    return lambda: setattr(attention_processor.Attention, "batch_to_head_dim", plain)


REFUSED: dict[str, tuple[Callable[[UNet2DConditionModel], Any], str]] = {
    "tiles by _conv_forward": (tiles, "has a method _conv_forward that has been replaced"),
    "tiles by padding_mode": (circular, "padding of the layer"),
    "another norm": (normed_by_rows, "InstanceNorm2d"),
    "a pool as activation": (pooled, "AvgPool2d"),
    "a class's method": (class_method, "a method batch_to_head_dim that mine has put into Attention"),
    "a transposed convolution": (
        lambda unet: setattr(unet.down_blocks[1].resnets[0], "conv1", nn.ConvTranspose2d(48, 48, 3, 1, 1)),
        "ConvTranspose2d",
    ),
    "a convolution over depth": (
        lambda unet: setattr(unet.down_blocks[1].resnets[0], "conv1", nn.Conv3d(48, 48, (1, 3, 3), padding=(0, 1, 1))),
        "Conv3d",
    ),
    "attention of torch": (
        lambda unet: setattr(unet.down_blocks[1], "extra", nn.MultiheadAttention(48, 4)),
        "MultiheadAttention",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_others_change_is_refused_by_name(what: str) -> None:
    unet = small()
    deed, words = REFUSED[what]
    undo = deed(unet)
    said = refusal(unet)
    if callable(undo):
        undo()
    assert words in said


WEIGHTS: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight_norm by hooks": torch.nn.utils.weight_norm,
    "spectral_norm by hooks": torch.nn.utils.spectral_norm,
    "parametrize": lambda layer: parametrize.register_parametrization(layer, "weight", nn.Tanh()),
}


@pytest.mark.parametrize("way", WEIGHTS)
def test_weights_that_are_computed_keep_rows_apart(way: str) -> None:
    unet = small()
    for layer in (unet.conv_in, unet.down_blocks[1].resnets[0].conv1, unet.down_blocks[1].attentions[0].proj_in):
        WEIGHTS[way](layer)
    unet.eval()
    assert refusal(unet) == "" and leak(unet) == ""


def test_hooks_of_others_are_found_by_name() -> None:
    unet = small()
    inspector = ModuleInspector("unet", unet, patched=True)
    inspector.check()
    assert inspector.hooks == {}
    unet.down_blocks[1].register_forward_hook(lambda module, inputs, output: (output[0].roll(1, -2), output[1]))
    assert "down_blocks" in leak(unet)
    inspector.check()
    ((place, names),) = inspector.hooks.items()
    assert place.startswith("unet.down_blocks.1 (") and "test_hooks_of_others" in names[0]


def test_diffusers_has_no_unknown_hooks() -> None:
    """All of them set a forward on a block, which is refused by the hook's name."""
    known = {
        *(
            "context_parallel",
            "faster_cache",
            "first_block_cache",
            "group_offloading",
            "layer_skip",
            "layerwise_casting",
        ),
        *("layerwise_casting_hook", "mag_cache", "pyramid_attention_broadcast", "sea_cache", "taylorseer_cache"),
        *("tensor_parallel", "text_kv_cache"),
    }
    assert {name.removeprefix("apply_") for name in dir(diffusers.hooks) if name.startswith("apply_")} == known
