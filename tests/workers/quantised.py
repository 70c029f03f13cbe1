"""Networks with quantised weights on the ranks of a torchrun, as JSON lines of rank 0.

    torchrun --standalone --nproc_per_node 2 tests/workers/quantised.py

A line for each kind of network and each package that is installed (torchao, gguf, bitsandbytes): the largest difference
of the latents under `sync` from those of one process with the same weights, or why it was refused; and from those with
the weights as they were.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import otil_xdit  # noqa: E402
from tests.support.in_rank import settle  # noqa: E402
from tests.workers.compatibility import draw_dit, draw_unet  # noqa: E402
from tests.workers.tiny_dit import load  # noqa: E402
from tests.workers.unet_session import pipeline  # noqa: E402


def main() -> None:
    settle()
    for network, (make, draw) in {"unet": (pipeline, draw_unet), "dit": (load, draw_dit)}.items():
        plain = draw(make())
        for kind, (package, quantise) in KINDS.items():
            if importlib.util.find_spec(package) is not None:
                tell(network, kind, compared(make(), quantise, draw, plain))
    dist.barrier()
    dist.destroy_process_group()


def compared(pipe: Any, quantise: Callable[[Any], None], draw: Callable[[Any], Any], plain: torch.Tensor) -> Any:
    quantise(pipe.transformer if getattr(pipe, "unet", None) is None else pipe.unet)
    exact, error, refused = draw(pipe), None, None
    try:
        parallel = otil_xdit.parallelize(pipe, "sync")
        made = draw(parallel)
        error = None if made is None else (made - exact).abs().max().item()
        otil_xdit.restore(parallel)
    except (ValueError, NotImplementedError, RuntimeError, TypeError) as failed:
        refused = f"{type(failed).__name__}: {failed}"
    return {"error": error, "refused": refused, "changed": (exact - plain).abs().max().item()}


def tell(network: str, kind: str, found: dict[str, Any]) -> None:
    """Print what the ranks have found: a DiT's latents are on the last one."""
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, found)
    if dist.get_rank() == 0:
        errors = [one["error"] for one in ranks if one["error"] is not None]
        line = {**ranks[-1], "error": max(errors, default=None)}
        print(json.dumps({"network": network, "kind": kind, **line}), flush=True)


def int8(network: Any) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(network, Int8WeightOnlyConfig())


def int8_of_inputs(network: Any) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(network, Int8DynamicActivationInt8WeightConfig())


def gguf_8_bits(network: Any) -> None:
    """As diffusers does it for a file of Q8_0."""
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0

    def made(layer: nn.Linear) -> nn.Module:
        packed = gguf.quants.quantize(layer.weight.detach().numpy(), kind)
        own = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.float32)
        own.weight = GGUFParameter(torch.from_numpy(packed), quant_type=kind)
        return own

    replace(network, made, 32)


def four_bits(network: Any) -> None:
    import bitsandbytes

    def made(layer: nn.Linear) -> nn.Module:
        sizes = layer.in_features, layer.out_features, layer.bias is not None
        own = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=torch.float32)
        own.weight = bitsandbytes.nn.Params4bit(layer.weight.detach(), requires_grad=False)
        return own.to("cpu")  # which packs the weights

    replace(network, made, 64)


def replace(network: Any, make: Callable[[nn.Linear], nn.Module], multiple: int) -> None:
    """Put a quantised layer in the place of each whose width is a multiple of what is packed together."""
    for path, layer in list(network.named_modules()):
        if type(layer) is nn.Linear and layer.in_features % multiple == 0:
            own = make(layer)
            if layer.bias is not None:
                own.bias = layer.bias
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, own)


KINDS = {
    "torchao int8": ("torchao", int8),
    "torchao int8, inputs too": ("torchao", int8_of_inputs),
    "gguf": ("gguf", gguf_8_bits),
    "bitsandbytes 4 bits": ("bitsandbytes", four_bits),
}

if __name__ == "__main__":
    main()
