"""Edits with DiTs on the ranks of a server, beside diffusers' pipelines in one process.

    torchrun --standalone --nproc_per_node 2 tests/workers/served_edits.py [--cases flux qwen-image z-image]

Prints a JSON line for each case and kind of edit: the largest difference of the images in steps of 255, on the rank
that differs most, and how far the edited image is from the given one; and after which step ranks leave a cancelled one.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from otil_xdit.xdit.cpu import enable_cpu_ranks  # noqa: E402

enable_cpu_ranks()

from xfuser.core.distributed import init_distributed_environment  # noqa: E402

from otil_xdit.comm.store import default_store  # noqa: E402
from otil_xdit.serve.engine import Cancelled  # noqa: E402
from otil_xdit.serve.ranks.drawing import Painter, pixels_of  # noqa: E402
from otil_xdit.serve.ranks.previews import Previews  # noqa: E402
from otil_xdit.serve.ranks.relay import Relay  # noqa: E402
from otil_xdit.serve.ranks.steps import StepControl  # noqa: E402
from otil_xdit.serve.requests import ImageRequest, Pixels  # noqa: E402
from tests.support.dits import CASES, Case, Degrees, packed  # noqa: E402
from tests.support.dits.exchanges import EXCHANGES  # noqa: E402
from tests.support.dits.routes import allow_missing_encoders, loaded_runner, xdit_flags  # noqa: E402
from tests.support.in_rank import leave_groups  # noqa: E402

EDITED = {
    "flux": ("FluxImg2ImgPipeline", "FluxInpaintPipeline"),
    "qwen-image": ("QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
    "z-image": ("ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
}
STEPS, STRENGTH = 6, 0.7


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--cases", nargs="*", default=list(EDITED), choices=list(EDITED))
    names = parser.parse_args().cases
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo")
    init_distributed_environment()
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            edits_of(CASES[name], Path(scratch))
            leave_groups()
        dist.barrier()  # rank 0 removes the folder that the others read
    dist.destroy_process_group()


def edits_of(case: Case, scratch: Path) -> None:
    """Make and compare all edits of one case; every rank takes part."""
    folder = [str(scratch / case.name)]
    if dist.get_rank() == 0:
        built(case).save_pretrained(folder[0])
    dist.broadcast_object_list(folder)
    for kind in EDITED[case.name]:
        give_embeddings(getattr(diffusers, kind), case)
    requests = {"image": request(case, None), "inpaint": request(case, mask())}
    wanted = {kind: plainly(case, kind, one) for kind, one in requests.items()}
    case.prepare()
    allow_missing_encoders(Path(folder[0]))
    exchange, degrees = EXCHANGES["plugin"], Degrees(patch=dist.get_world_size())
    with exchange.active(), torch.no_grad():
        runner, values = loaded_runner(case, Path(folder[0]), xdit_flags(case, degrees, exchange))
        painter = Painter(runner.model, values)
        relay = Relay(default_store(), dist.get_rank(), dist.get_world_size())
        for kind, one in requests.items():
            painter.check(one)
            shown: list[Pixels] = []
            previews = Previews(2, painter.size_of(one), shown.append) if dist.get_rank() == 0 else None
            (made,) = painter.draw([one], control(relay, lambda: False), previews)
            off = int(np.abs(np.asarray(made, dtype=int) - wanted[kind]).max())
            assert one.image is not None
            away = np.abs(np.asarray(made, dtype=int) - given(one.image)).mean()
            report(case=case.name, kind=kind, off=off, away=round(float(away), 1), previews=[p.width for p in shown])
        left = leave_early(painter, requests["image"], relay)
        report(case=case.name, kind="cancelled", left=left)


def control(relay: Relay, is_cancelled: Any) -> StepControl:
    relay.publish(b"") if dist.get_rank() == 0 else relay.receive()
    return StepControl(relay, dist.get_rank() == 0, is_cancelled, lambda step, steps: None, 60)


def leave_early(painter: Painter, one: ImageRequest, relay: Relay) -> str:
    try:
        painter.draw([one], control(relay, lambda: True), None)
    except Cancelled as error:
        return str(error)
    return "not at all"


def built(case: Case) -> Any:
    """The case's pipeline, whose VAE makes more than one colour."""
    pipe = case.build()
    packed.seeded(pipe.vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def give_embeddings(pipeline: type, case: Case) -> None:
    """Have a pipeline take the case's embeddings for any prompt: it has no text encoder."""
    call = pipeline.__call__

    def __call__(self: Any, **arguments: Any) -> Any:
        return call(self, **{**arguments, "prompt": None, "negative_prompt": None, **case.embeds()})

    pipeline.__call__ = __call__


def request(case: Case, painted: Pixels | None) -> ImageRequest:
    (guidance,) = (value for name, value in case.call.items() if name in ("guidance_scale", "true_cfg_scale"))
    return ImageRequest(
        prompt="a prompt",
        seed=5,
        steps=STEPS,
        guidance_scale=guidance,
        image=pixels_of(packed.image()),
        mask=painted,
        strength=STRENGTH,
    )


def mask() -> Pixels:
    values = np.zeros((128, 128), np.uint8)
    values[:, 64:] = 255
    return Pixels(128, 128, "L", values.tobytes())


def given(pixels: Pixels) -> np.ndarray:
    return np.frombuffer(pixels.data, np.uint8).reshape(pixels.height, pixels.width, -1).astype(int)


@torch.no_grad()
def plainly(case: Case, kind: str, one: ImageRequest) -> np.ndarray:
    """What diffusers makes in this process alone."""
    pipe = built(case)
    edits = getattr(diffusers, EDITED[case.name][kind == "inpaint"])(**pipe.components)
    edits.set_progress_bar_config(disable=True)
    masks = {} if one.mask is None else {"mask_image": packed.Image.fromarray(given(one.mask)[..., 0].astype(np.uint8))}
    call = {name: value for name, value in case.call.items() if name.endswith("_scale")}
    output = edits(
        image=packed.image(),
        **masks,
        **call,
        height=128,
        width=128,
        strength=STRENGTH,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(one.seed),
    )
    return np.asarray(output.images[0].convert("RGB"), dtype=int)


def report(**values: Any) -> None:
    lines: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lines, values)
    if dist.get_rank() == 0:
        off = max(line.get("off", 0) for line in lines)
        same = len({json.dumps({**line, "off": 0, "previews": []}) for line in lines}) == 1
        print(json.dumps({**values, "off": off, "ranks_agree": same}), flush=True)


if __name__ == "__main__":
    main()
