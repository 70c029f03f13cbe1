"""What must be equal on all ranks of an image, in a few hundred bytes; compared before the first step.

Ranks that differ in one of these would wait for messages that nobody sends, or make a grey image of parts that do not
belong together.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from inspect import Parameter, Signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from otil_xdit.comm.failure_detector import FailureDetector
from otil_xdit.comm.rendezvous import REFUSAL
from otil_xdit.exchange.protocol import Communicator
from otil_xdit.networks.quantised import stored_parts
from otil_xdit.runtime.callbacks import IS_GIVEN, LEGACY, STEP_END
from otil_xdit.runtime.vae_sharing import IS_DECODED
from otil_xdit.runtime.versions import package_versions

Facts = dict[str, str]
"""What is compared, by name. A rank that lacks one is not compared by it."""

_MOST_TEXT, _MOST_NAMED = 48, 5
"""Characters of a value, and differences, that a message shows."""

_SAMPLED_TENSORS, _SAMPLED_VALUES = 16, 4096
"""Of a network's weights: so many tensors, and so many numbers of each."""

_OWN_MATTER = ("output_type", "return_dict", "callback")
"""Beginnings of arguments of a call in which ranks may differ."""

RANDOM_STATE = "the random state (no generator is given)"
"""A fact of calls that draw from torch's own generator."""

_PACKAGES = ("otil-xdit", "xfuser", "torch", "diffusers")


def check_agreement(detector: FailureDetector | None, facts: Facts, refusal: ValueError | None) -> Mapping[int, Facts]:
    """Wait for all ranks to begin a generation, and compare their facts.

    Args:
        detector: the session's; None for a single rank.
        facts: this rank's.
        refusal: why this rank cannot serve the call; None where it can.

    Returns:
        All ranks' facts, by rank.

    Raises:
        ValueError: on every rank, where one of them refuses, or what must be equal is not.
        PipelineBusyError: on every rank that came, where another did not come in time.
        ExchangeTimeout: when another rank fails.
    """
    if detector is None:
        if refusal is not None:
            raise refusal
        return {0: facts}
    by_rank = detector.exchange_facts(facts if refusal is None else {**facts, REFUSAL: str(refusal)})
    if refusal is not None:
        raise refusal
    # What a rank refuses is often what is different there: the better message of the two.
    refused = [f"rank {rank} refuses: {found[REFUSAL]}" for rank, found in by_rank.items() if REFUSAL in found]
    if refused:
        raise ValueError(f"rank {detector.rank}: {'; '.join(refused)}")
    found = differences(by_rank)
    if found:
        raise ValueError(f"rank {detector.rank}: the ranks do not agree: {found}")
    return by_rank


def share_random_state(communicator: Communicator, device: torch.device) -> None:
    """Let every rank draw as the first one does where a call gives no generator: one image, one noise.

    Args:
        device: the networks'; its random state is shared too.
    """
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    first = [communicator.collect(state.to(device), "random-state")[0].cpu() for state in states]
    torch.set_rng_state(first[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(first[1], device)


def differences(by_rank: Mapping[int, Facts]) -> str:
    """Return what is not equal on all ranks, in a line; empty where everything is."""
    known = set().union(*by_rank.values())
    found = []
    for name in sorted(known):
        ranks_of = defaultdict(list)
        for rank in sorted(by_rank):
            if name in by_rank[rank]:
                ranks_of[by_rank[rank][name]].append(str(rank))
        if len(ranks_of) > 1:
            values = (
                f"{value} on rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}"
                for value, ranks in ranks_of.items()
            )
            found.append(f"{name} is {' and '.join(values)}")
    more = f"; and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    return "; ".join(found[:_MOST_NAMED]) + more


@cache
def versions() -> Facts:
    """Return the versions of the packages that compute."""
    return {f"the version of {name}": number for name, number in package_versions(*_PACKAGES).items()}


def facts_of_settings(name: str, config: Any) -> Facts:
    """Return a strategy and its settings as facts; the timeout is every rank's own matter."""
    if not is_dataclass(config):
        return {"the strategy": name, "its settings": _short(repr(config))}
    settings = {one.name: getattr(config, one.name) for one in fields(config) if one.name != "timeout"}
    return {"the strategy": name, **{f"otil_{key}": _short(repr(value)) for key, value in settings.items()}}


def facts_of_call(signature: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Facts:
    """Return the arguments of a pipeline's call as facts; none where they do not fit: the call will say so.

    Args:
        signature: of the pipeline's ``__call__``.
        args, kwargs: what it is called with, `self` among `args`.
    """
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    named = dict(_flattened(signature, bound.arguments))
    facts = {name: text for name, value in named.items() if (text := described(value)) is not None}
    if named.get("generator") is None and named.get("latents") is None:
        facts[RANDOM_STATE] = f"{_sum(torch.get_rng_state()):08x}"
    if named.get(STEP_END) is not None or named.get(LEGACY) is not None:
        facts[IS_GIVEN] = "given"
    if named.get("output_type", "latent") != "latent":
        facts[IS_DECODED] = "yes"
    return {name: text for name, text in facts.items() if not name.startswith(_OWN_MATTER)}


class NetworkFacts:
    """Facts of networks and of what steps them; remembers the sums of weights that have not changed."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[nn.Module, _Weights] = WeakKeyDictionary()

    def of(self, pipe: Any, networks: Mapping[str, nn.Module]) -> Facts:
        """Return facts of a pipeline's denoising networks, text encoders and scheduler."""
        facts = {"the pipeline": type(pipe).__name__}
        scheduler = getattr(pipe, "scheduler", None)
        if scheduler is not None:
            facts["the scheduler"] = type(scheduler).__name__
            facts.update(_config("the scheduler's", scheduler))
        encoders = {name: getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")}
        for name, network in {**networks, **encoders}.items():
            if isinstance(network, nn.Module):
                if network not in self._known:
                    self._known[network] = _Weights(network)
                facts[f"weights of the {name}"] = self._known[network].sum()
                facts.update(lora_facts(name, network))
        for name, network in networks.items():
            facts.update(_config(f"the {name}'s", network))
        return facts


def described(value: Any) -> str | None:
    """Return a short text, equal for equal values; None for what has no such thing (functions, objects)."""
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return _short(repr(value))
    if isinstance(value, torch.Tensor):
        kind = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        # What devices of different make have computed may differ in its last bits.
        exact = value.device.type == "cpu" or not value.is_floating_point()
        return f"{kind} {_sum(value):08x}" if exact else kind
    if isinstance(value, torch.Generator):
        return f"seed {value.initial_seed()}, state {_sum(value.get_state()):08x}"
    if isinstance(value, Mapping):
        parts = [f"{key}: {described(one)}" for key, one in value.items()]
        return _short(f"{{{', '.join(parts)}}}")
    if isinstance(value, (list, tuple)):
        return _short(f"[{', '.join(str(described(one)) for one in value)}]")
    if hasattr(value, "tobytes"):  # images and arrays
        shape = getattr(value, "size" if hasattr(value, "mode") else "shape", "")
        return f"{type(value).__name__} {shape} {zlib.crc32(value.tobytes()):08x}"
    return None


class _Weights:
    """A checksum of some weights of a network, computed again when they have been written to or replaced.

    Places are kept rather than tensors, so that what stands there now is looked at.
    """

    def __init__(self, network: nn.Module) -> None:
        # Weights that are shared out over devices (DTensor) differ from rank to rank.
        places = [
            (holder, name)
            for holder in network.modules()
            for name, tensor in holder.named_parameters(recurse=False)
            if not hasattr(tensor, "_local_tensor")
        ]
        # WeakKeyDictionary's values must not keep its keys: a network of one module is its own holder.
        inner = [(holder, name) for holder, name in places if holder is not network]
        stride = max(1, len(inner) // _SAMPLED_TENSORS)
        self._places = inner[::stride]
        self._state: tuple[object, ...] = ()
        self._sum = ""

    def sum(self) -> str:
        found = [tensor for holder, name in self._places if (tensor := getattr(holder, name, None)) is not None]
        tensors = [part for tensor in found for part in stored_parts(tensor)]
        state = tuple((tensor.data_ptr(), _written(tensor), tensor.dtype) for tensor in tensors)
        if not self._sum or state != self._state:
            total = 0
            for tensor in tensors:
                flat = tensor.detach().reshape(-1)
                total = _sum(flat[:: max(1, flat.numel() // _SAMPLED_VALUES)], total)
            self._state, self._sum = state, f"{total:08x}"
        return self._sum


def _written(tensor: torch.Tensor) -> int:
    """Return how often a tensor has been written to, as far as torch counts."""
    return 0 if tensor.is_inference() else tensor._version


def lora_facts(name: str, network: nn.Module) -> Facts:
    """Return facts of PEFT's adapters: their names, scales, whether they are merged, and a sum of some weights."""
    if not getattr(network, "peft_config", None):
        return {f"LoRA of the {name}": "none"}
    layers: list[Any] = [module for module in network.modules() if hasattr(module, "adapter_layer_names")]
    scales = sorted({f"{key} x {value:g}" for one in layers for key, value in getattr(one, "scaling", {}).items()})
    active = sorted({key for layer in layers if not layer.disable_adapters for key in layer.active_adapters})
    merged = sorted({key for layer in layers for key in layer.merged_adapters})
    total = 0
    for layer in layers[:: max(1, len(layers) // 4)]:
        for part in layer.adapter_layer_names:
            for weights in _parameters_of(getattr(layer, part, None)):
                total = _sum(weights, total)
    told = f"{', '.join(scales)}; active {', '.join(active) or 'none'}"
    return {f"LoRA of the {name}": f"{told}{'; merged ' + ', '.join(merged) if merged else ''}; {total:08x}"}


def _parameters_of(part: Any) -> Iterator[torch.Tensor]:
    """Yield the parameters of a part of an adapter, which PEFT keeps in modules and in lists of parameters."""
    if isinstance(part, nn.Module):
        yield from part.parameters()


def _config(whose: str, thing: Any) -> Facts:
    """Return the settings of a diffusers object as facts; names that begin with "_" tell where it came from."""
    config = getattr(thing, "config", None)
    if not isinstance(config, Mapping):
        return {}
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    return {f"{whose} {key}": text for key, value in public.items() if (text := described(value)) is not None}


def _flattened(signature: Signature, arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield arguments by name, those in ``*args`` by number; without `self`."""
    for place, (name, value) in enumerate(arguments.items()):
        kind = signature.parameters[name].kind
        if kind is Parameter.VAR_KEYWORD:
            yield from value.items()
        elif kind is Parameter.VAR_POSITIONAL:
            yield from ((f"argument {number}", one) for number, one in enumerate(value))
        elif place > 0:
            yield name, value


def _sum(tensor: torch.Tensor, start: int = 0) -> int:
    """Return the CRC-32 of a tensor's bytes."""
    if tensor.device.type == "meta" or tensor.layout is not torch.strided:
        return start
    flat = tensor.detach().contiguous().cpu().view(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data, start) if flat.numel() else start


def _short(text: str) -> str:
    if len(text) <= _MOST_TEXT:
        return text
    return f"{text[:_MOST_TEXT]}... ({len(text)} characters, {zlib.crc32(text.encode()):08x})"
