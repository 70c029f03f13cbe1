"""LoRA on DiTs that run in place, on the ranks of a torchrun; rank 0 prints a JSON line for each.

    torchrun --standalone --nproc_per_node 2 tests/workers/dit_lora.py [CASE ...]

Loaded after `parallelize` and after an image, and before it. A line: the largest differences from one process with the
same adapter under `sync`, what the adapter changes, and the difference once it is unloaded and the pipeline restored.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model_state_dict

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import otil_xdit  # noqa: E402
from tests.support.dits import CASES  # noqa: E402
from tests.support.in_rank import settle, tell  # noqa: E402

NAMES = ("flux2, 7 text tokens", "qwen-image, 7 text tokens", "wan, 27 tokens", "z-image", "hunyuan-video, 27 tokens")


def main() -> None:
    settle()
    dist.init_process_group("gloo")
    for name in sys.argv[1:] or NAMES:
        try:
            found = compared(name)
        except Exception as error:  # whatever stops a case must not stop the next one
            found = {"stopped": f"{type(error).__name__}: {error}"}
        tell(name, found)
    dist.barrier()
    dist.destroy_process_group()


def compared(name: str) -> dict[str, float]:
    weights, pipe = adapter_of(name), made(name)
    plain = draw(name, pipe)
    pipe.load_lora_weights(dict(weights), adapter_name="one")
    alone = draw(name, pipe)
    before = otil_xdit.parallelize(pipe, "sync")
    found = {"changes": difference(alone, plain), "before": difference(draw(name, before), alone)}
    otil_xdit.restore(before)
    after = otil_xdit.parallelize(made(name), "sync")
    draw(name, after)
    after.load_lora_weights(dict(weights), adapter_name="one")
    found["after"] = difference(draw(name, after), alone)
    after.unload_lora_weights()
    found["unloaded"] = difference(draw(name, after), plain)
    restored = otil_xdit.restore(after)
    found["restored"] = difference(draw(name, restored), plain)
    return found


def made(name: str) -> Any:
    pipe: Any = CASES[name].build()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(name: str, pipe: Any) -> torch.Tensor:
    image: torch.Tensor = pipe(**CASES[name].arguments())[0]
    return image


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


def adapter_of(name: str) -> dict[str, torch.Tensor]:
    """Weights of a LoRA of the attention layers, large enough to matter, as a file has them."""
    network = made(name).transformer
    torch.manual_seed(0)
    network.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    return {f"transformer.{key}": value for key, value in get_peft_model_state_dict(network).items()}


if __name__ == "__main__":
    main()
