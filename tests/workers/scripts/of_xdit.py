"""A script as xDiT's `*_usp_example.py` are written: it replaces a transformer's forward by one that shares tokens out.

python -m otil_xdit.run tests/workers/scripts/of_xdit.py --model x --case flux --parallel sync --patch_degree 2

Rank 0 prints the difference of each of two images from one process's.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from xfuser import xFuserArgs
from xfuser.config import FlexibleArgumentParser
from xfuser.core.distributed import (
    get_runtime_state,
    get_sequence_parallel_rank,
    get_sequence_parallel_world_size,
    get_sp_group,
    initialize_runtime_state,
)
from xfuser.model_executor.layers.attention_processor import xFuserCogVideoXAttnProcessor2_0
from xfuser.model_executor.models.transformers.transformer_flux import xFuserFluxAttnProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tests.support.dits import CASES  # noqa: E402
from tests.support.dits.routes import run_plain  # noqa: E402


def share(tensor: torch.Tensor) -> torch.Tensor:
    return torch.chunk(tensor, get_sequence_parallel_world_size(), dim=-2)[get_sequence_parallel_rank()]


def split_text(text: torch.Tensor) -> bool:
    splits = text.shape[-2] % get_sequence_parallel_world_size() == 0
    get_runtime_state().split_text_embed_in_sp = splits
    return splits


def parallelize_flux(pipe: DiffusionPipeline) -> None:
    network = pipe.transformer
    forward = network.forward

    def new_forward(
        self: Any, hidden_states: Any, encoder_hidden_states: Any, img_ids: Any, txt_ids: Any, **kwargs: Any
    ):
        splits = split_text(encoder_hidden_states)
        text, txt_ids = (share(one) if splits else one for one in (encoder_hidden_states, txt_ids))
        output = forward(share(hidden_states), text, img_ids=share(img_ids), txt_ids=txt_ids, **kwargs)
        return (get_sp_group().all_gather(output[0], dim=-2),)

    network.forward = new_forward.__get__(network)
    for block in [*network.transformer_blocks, *network.single_transformer_blocks]:
        block.attn.processor = xFuserFluxAttnProcessor()


def parallelize_cogvideox(pipe: DiffusionPipeline) -> None:
    network = pipe.transformer
    forward, embed = network.forward, network.patch_embed.forward

    def new_forward(self: Any, hidden_states: Any, encoder_hidden_states: Any, image_rotary_emb: Any, **kwargs: Any):
        splits, frames = split_text(encoder_hidden_states), hidden_states.shape[1]
        rotary = tuple(share(one.unflatten(0, (frames, -1))).flatten(0, 1) for one in image_rotary_emb)
        for block in network.transformer_blocks:
            block.attn1.processor = xFuserCogVideoXAttnProcessor2_0()
        text = share(encoder_hidden_states) if splits else encoder_hidden_states
        output = forward(share(hidden_states), text, image_rotary_emb=rotary, **kwargs)
        return (get_sp_group().all_gather(output[0].contiguous(), dim=-2),)

    def new_embed(self: Any, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        text, image = (get_sp_group().all_gather(one.contiguous(), dim=-2) for one in (text, image))
        both, frames = embed(text, image), image.shape[1]
        image = share(both[:, text.shape[1] :].unflatten(1, (frames, -1))).flatten(1, 2)
        return torch.cat([share(both[:, : text.shape[1]]), image], dim=1)

    network.forward = new_forward.__get__(network)
    network.patch_embed.forward = new_embed.__get__(network.patch_embed)


@torch.no_grad()
def main() -> None:
    parser = FlexibleArgumentParser(allow_abbrev=False)
    parser.add_argument("--case")
    args = xFuserArgs.add_cli_args(parser).parse_args()
    case = CASES[args.case]
    engine_config, input_config = xFuserArgs.from_cli_args(args).create_config()
    pipe = case.build()
    pipe.set_progress_bar_config(disable=True)
    initialize_runtime_state(pipe, engine_config)
    height, width = (case.call.get(side, getattr(input_config, side)) for side in ("height", "width"))
    size = {"height": height, "width": width, "batch_size": 1, "num_inference_steps": 3}
    if "flux" in args.case:
        get_runtime_state().set_input_parameters(**size, max_condition_sequence_length=512)
        parallelize_flux(pipe)
    else:
        get_runtime_state().set_video_input_parameters(**size, num_frames=case.call["num_frames"])
        parallelize_cogvideox(pipe)
    reference = run_plain(case)
    errors = [(pipe(**case.arguments())[0] - reference).abs().max().item() for _ in range(2)]
    if os.environ["RANK"] == "0":
        print(json.dumps({"errors": errors}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


main()
