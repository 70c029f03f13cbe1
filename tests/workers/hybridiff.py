"""Two stages on the ranks of a torchrun, on the shipped models: prints a JSON line for each model.

    torchrun --standalone --nproc_per_node 2 tests/workers/hybridiff.py tiny-sd tiny-dit

Each rank's figures stand in its place of a list. FLOPs are counted by torch's FlopCounterMode over the whole call.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import otil_xdit  # noqa: E402
from otil_xdit import OtilConfig, get_strategy  # noqa: E402
from otil_xdit.catalog.bundled import model_folder  # noqa: E402
from otil_xdit.catalog.folders import load_pipe  # noqa: E402
from otil_xdit.hybridiff.tracing import CPU_ATTENTION  # noqa: E402
from otil_xdit.runtime.network_hooks import networks_of  # noqa: E402
from otil_xdit.xdit.plugin.sessions import session_of  # noqa: E402
from tests.support.in_rank import leave_groups  # noqa: E402

STEPS, FIRST, LAST = 10, 4, 6
CALL = {
    "prompt": "a large red circle on the left, striped background",
    "height": 128,
    "width": 128,
    "num_inference_steps": STEPS,
    "guidance_scale": 4.0,
    "output_type": "latent",
}


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    logging.disable(logging.WARNING)
    otil_xdit.register()
    for model in sys.argv[1:]:
        line = measured(model)
        if dist.get_rank() == 0:
            print(json.dumps({"model": model, **line}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def measured(model: str) -> dict[str, Any]:
    alone = latents(load(model))
    cfg = run(otil_xdit.parallelize(load(model), "sync", use_cfg_parallel=True))
    closed = run(otil_xdit.parallelize(load(model), "hybridiff", hybridiff(window_steps=0)))
    open_ = run(otil_xdit.parallelize(load(model), "hybridiff", hybridiff(window=f"{FIRST}:{LAST}")))
    return {
        "closed_to_cfg": error(closed["latents"], cfg["latents"]),
        "closed_to_one": error(closed["latents"], alone),
        "open_to_one": error(open_["latents"], alone),
        "scale": 0.0 if alone is None else alone.abs().max().item(),
        **{f"closed_{name}": gathered(closed[name]) for name in ("flops", "report")},
        **{f"open_{name}": gathered(open_[name]) for name in ("flops", "report", "cut")},
        "windowed": gathered(windowed(model)),
        "differing": [name for found in gathered(again(model)) for name in found],
        "left": [name for found in gathered(left_behind(model)) for name in found],
    }


def load(model: str) -> Any:
    return load_pipe(model_folder(model), "own", None)


def hybridiff(**given: Any) -> OtilConfig:
    config: OtilConfig = get_strategy("hybridiff").make_config(given)
    return config


def latents(pipe: Any, **call: Any) -> torch.Tensor | None:
    """The final latents, [1, C, h, w]; None on ranks without them."""
    output = pipe(**{**CALL, **call}, generator=torch.Generator().manual_seed(3))
    return None if output is None else output.images


def run(pipe: Any) -> dict[str, Any]:
    pipe.set_progress_bar_config(disable=True)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        made = latents(pipe)
    session = session_of(pipe)
    report = session.report().to_dict()
    (network,) = networks_of(pipe).values()
    stages = session.cfg_controller.stages_of(network)
    cut = None if stages is None else stages.cut
    session.detach()
    return {
        "latents": made,
        "flops": counter.get_total_flops(),
        "report": report,
        "cut": None
        if cut is None
        else {"flops": cut.flops, "glue": cut.glue, "boundary": sum(form.nbytes for form in cut.forms)},
    }


def windowed(model: str) -> Any:
    """The report of patches that are displaced in a window only, with its curve."""
    leave_groups()
    config = OtilConfig(warmup_codec="raw", window=f"{FIRST}:{LAST}")
    report = run(otil_xdit.parallelize(load(model), config=config))["report"]
    leave_groups()
    return report


def left_behind(model: str) -> list[str]:
    """Modules that `restore` has not given back as they were."""
    pipe = load(model)
    network = pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer
    before = anatomy(network)
    made = otil_xdit.parallelize(pipe, "hybridiff", hybridiff(window=f"{FIRST}:{LAST}"))
    made.set_progress_bar_config(disable=True)
    latents(made)
    during = anatomy(network)
    restored = otil_xdit.restore(made)
    after = anatomy(restored.unet if getattr(restored, "unet", None) is not None else restored.transformer)
    return sorted(before ^ after) + ([] if during != before else ["nothing was wrapped"])


def anatomy(network: torch.nn.Module) -> set[str]:
    """Everything about the modules that `restore` must bring back."""
    found = set()
    for name, module in network.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        found.add(f"{name}: {id(type(module))} {sorted(vars(module))} {hooks}")
    return found


def again(model: str) -> list[str]:
    """Images of one pipeline that are not those of a fresh one, after others and after an exception in the window."""
    different = []
    used = fresh(model)
    wide = latents(used, height=96, width=160)
    plain = latents(used)
    fail_in_window(used)
    after = latents(used)
    for name, made, call in (("wide", wide, {"height": 96, "width": 160}), ("plain", plain, {}), ("after", after, {})):
        other = fresh(model)
        expected = latents(other, **call)
        session_of(other).detach()
        if made is not None and not torch.equal(made, expected):
            different.append(name)
    session_of(used).detach()
    return different


def fresh(model: str) -> Any:
    pipe = otil_xdit.parallelize(load(model), "hybridiff", hybridiff(window=f"{FIRST}:{LAST}"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fail_in_window(pipe: Any) -> None:
    def fail(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == FIRST:
            raise KeyError("callback")
        return tensors

    try:
        latents(pipe, callback_on_step_end=fail, callback_on_step_end_tensor_inputs=[])
    except KeyError:
        return
    raise AssertionError("the callback raises")


def error(made: torch.Tensor | None, expected: torch.Tensor | None) -> float | None:
    """The largest absolute difference, on rank 0 that of any rank."""
    found = gathered(None if made is None or expected is None else (made - expected).abs().max().item())
    return max((one for one in found if one is not None), default=None)


def gathered(value: Any) -> list[Any]:
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, value)
    return everybody


if __name__ == "__main__":
    main()
