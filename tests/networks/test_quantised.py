"""Quantised weights: what the ranks compare of them, and what is let through; `tests/workers/quantised.py` draws."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from otil_xdit.networks.attention_weights import attention_weights
from otil_xdit.networks.compatibility import ModuleInspector
from otil_xdit.networks.quantised import quantises_input, stored_parts
from otil_xdit.networks.unet.text_cache import tensor_state
from otil_xdit.runtime.agreement import NetworkFacts
from tests.support.torchrun import lines_of
from tests.support.unets.configs import build_unet

PACKAGES = ("torchao", "gguf", "bitsandbytes")


def quantised() -> nn.Module:
    """A U-Net with a weight of two parts, as torchao's have numbers and scales."""
    network = build_unet("sd1.5")
    layer = network.mid_block.attentions[0].transformer_blocks[0].attn1.to_k
    layer.weight = nn.Parameter(TwoTensor(layer.weight.detach(), torch.ones_like(layer.weight)), requires_grad=False)
    return network


def test_the_parts_of_a_weight_are_what_is_compared() -> None:
    network = quantised()
    layer = network.mid_block.attentions[0].transformer_blocks[0].attn1.to_k
    assert len(stored_parts(layer.weight)) == 2 and stored_parts(layer.bias or torch.ones(1))
    before, pipe = tensor_state(layer.weight), SimpleNamespace()
    first = NetworkFacts().of(pipe, {"unet": layer})
    stored_parts(layer.weight)[1].mul_(2)
    assert tensor_state(layer.weight) != before
    inner = nn.Sequential(layer)
    assert NetworkFacts().of(pipe, {"unet": inner})["weights of the unet"]
    assert first["LoRA of the unet"] == "none"


def test_coordinates_of_a_quantised_layer_are_measured() -> None:
    """Its weights would have to be unpacked, all at once."""
    whole, found = attention_weights(build_unet("sd1.5")), attention_weights(quantised())
    assert set(whole) - set(found) == {"mid_block.attentions.0.transformer_blocks.0.attn1"}


@pytest.mark.parametrize("attribute", ["act_quant_kwargs", "act_quant_scale"])
def test_quantised_inputs_are_refused_by_name(attribute: str) -> None:
    network = quantised()
    weight = network.mid_block.attentions[0].transformer_blocks[0].attn1.to_k.weight
    look = ModuleInspector("unet", network, patched=True)
    setattr(weight, attribute, None)
    look.check()
    setattr(weight, attribute, torch.ones(2))
    assert quantises_input(weight)
    with pytest.raises(ValueError, match=r"unet\.mid_block.*to_k \(Linear\): it quantises its input too"):
        look.check()


@pytest.mark.slow
@pytest.mark.skipif(not any(map(find_spec, PACKAGES)), reason=f"needs one of {', '.join(PACKAGES)}")
def test_quantised_networks_are_exact_on_patches() -> None:
    lines = {(line["network"], line["kind"]): line for line in lines_of(2, "quantised.py", timeout=550)}
    assert lines
    for (_, kind), line in lines.items():
        assert line["changed"] > 1e-3, line
        if kind == "torchao int8, inputs too":
            assert "quantises its input too" in line["refused"], line
        else:
            assert line["refused"] is None and line["error"] <= 2e-4, line
