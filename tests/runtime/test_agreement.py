"""What must be equal on all ranks, and how a difference is said."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from otil_xdit import OtilConfig
from otil_xdit.runtime.agreement import (
    RANDOM_STATE,
    NetworkFacts,
    described,
    differences,
    facts_of_call,
    facts_of_settings,
)


def test_equal_facts_are_no_difference() -> None:
    assert differences({0: {"a": "1"}, 1: {"a": "1"}}) == ""
    assert differences({0: {"a": "1", "b": "2"}, 1: {"a": "1"}}) == "", "a rank that lacks a fact is not compared"


def test_a_difference_names_field_values_and_ranks() -> None:
    facts = {0: {"a": "1", "b": "x"}, 1: {"a": "2", "b": "x"}, 2: {"a": "1", "b": "x"}}
    assert differences(facts) == "a is 1 on ranks 0, 2 and 2 on rank 1"


def test_many_differences_are_counted() -> None:
    found = differences({rank: {f"fact {number}": str(rank) for number in range(9)} for rank in range(2)})
    assert found.count(" is ") == 5 and found.endswith("; and 4 more")


def test_settings_but_the_timeout_are_compared() -> None:
    ours, theirs = (facts_of_settings("otil", OtilConfig(ratio=ratio, timeout=100 * ratio)) for ratio in (0.5, 0.25))
    assert differences({0: ours, 1: theirs}) == "otil_ratio is 0.5 on rank 0 and 0.25 on rank 1"


class Pipe:
    def __call__(
        self, prompt: str, height: int = 64, generator: Any = None, output_type: str = "pil", **more: Any
    ) -> None:
        raise NotImplementedError


def of_call(*args: Any, **kwargs: Any) -> dict[str, str]:
    return facts_of_call(signature(Pipe.__call__), (Pipe(), *args), kwargs)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"height": 128}, "height"),
        ({"prompt": "a " * 50 + "dog"}, "prompt"),
        ({"generator": torch.Generator().manual_seed(2)}, "generator"),
        ({"eta": 0.5}, "eta"),
        ({"output_type": "latent", "callback_on_step_end": print}, ""),
    ],
)
def test_arguments_of_a_call(changes: dict[str, Any], field: str) -> None:
    usual = {"prompt": "a " * 50 + "cat", "generator": torch.Generator().manual_seed(1), "eta": 0.0}
    found = differences({0: of_call(**usual), 1: of_call(**{**usual, **changes})})
    assert found.partition(" is ")[0] == field


def test_a_generator_that_has_been_used_is_another() -> None:
    used = torch.Generator().manual_seed(1)
    torch.rand(1, generator=used)
    assert described(used) != described(torch.Generator().manual_seed(1))


def test_without_a_generator_the_random_state_counts() -> None:
    torch.manual_seed(0)
    before = of_call("a cat")
    torch.rand(1)
    assert differences({0: before, 1: of_call("a cat")}).startswith(RANDOM_STATE)


def test_arguments_that_do_not_fit_are_left_to_the_call() -> None:
    assert of_call() == {}


def test_tensors_are_told_apart_by_value_shape_and_dtype() -> None:
    texts = {described(torch.zeros(2, 3)), described(torch.zeros(3, 2)), described(torch.zeros(2, 3).half())}
    assert len(texts | {described(torch.ones(2, 3))}) == 4
    assert described(torch.ones(2, 3).t()) == described(torch.ones(3, 2))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(40)))


class Holder:
    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet


def of_network(facts: NetworkFacts, unet: nn.Module) -> dict[str, str]:
    return facts.of(Holder(unet), {"unet": unet})


def test_weights_written_to_or_replaced_are_other_weights() -> None:
    facts, unet = NetworkFacts(), network()
    first = of_network(facts, unet)
    assert of_network(facts, unet) == first == of_network(NetworkFacts(), network())
    with torch.no_grad():
        for weights in unet.parameters():
            weights.mul_(2)
    second = of_network(facts, unet)
    assert differences({0: first, 1: second}).startswith("weights of the unet is")
    for layer in unet:
        layer.weight = nn.Parameter(torch.zeros(8, 8))
    assert of_network(facts, unet) != second


class NothingIsComputed(TorchDispatchMode):
    """Fails at every operation on tensors, which a look at what they hold takes."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        pytest.fail(f"{function} was called")


def test_weights_that_have_not_changed_are_not_read_again() -> None:
    facts, unet = NetworkFacts(), network()
    first = of_network(facts, unet)
    with NothingIsComputed():
        assert of_network(facts, unet) == first
    with NothingIsComputed(), pytest.raises(pytest.fail.Exception, match="was called"):
        of_network(NetworkFacts(), unet)


def test_lora_is_told_by_names_scales_and_weights() -> None:
    peft = pytest.importorskip("peft")

    def adapted(scale: float, seed: int) -> nn.Module:
        unet = network()
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, lora_alpha=2 * scale, target_modules=["0", "1"], init_lora_weights=False)
        return peft.inject_adapter_in_model(config, unet, "style")

    found = [
        of_network(NetworkFacts(), adapted(*how))["LoRA of the unet"] for how in ((1, 0), (1, 0), (0.5, 0), (1, 1))
    ]
    assert found[0] == found[1] and len(set(found)) == 3
    assert found[0].startswith("style x 1; active style")
