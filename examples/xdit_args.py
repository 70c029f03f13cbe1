"""The xDiT way: xFuserArgs knows the "Otil options" once the plugin is registered.

    torchrun --nproc_per_node 2 examples/xdit_args.py --model PATH --parallel otil --patch_degree 2 \\
        --prompt "a small blue square on the right, dotted background" --height 128 --width 128

Everything but the `register()` call is an xDiT script as its own examples are written.
"""

from __future__ import annotations

import otil_xdit

otil_xdit.register()

import torch  # noqa: E402
from xfuser import xFuserArgs, xFuserStableDiffusion3Pipeline  # noqa: E402
from xfuser.config import FlexibleArgumentParser  # noqa: E402
from xfuser.core.distributed import get_world_group  # noqa: E402


def main() -> None:
    parser = FlexibleArgumentParser(allow_abbrev=False, description=__doc__)
    args = xFuserArgs.add_cli_args(parser).parse_args()
    engine_config, input_config = xFuserArgs.from_cli_args(args).create_config()
    engine_config.runtime_config.dtype = torch.float32

    pipe = xFuserStableDiffusion3Pipeline.from_pretrained(
        args.model, engine_config=engine_config, dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
    )
    device = f"cuda:{get_world_group().local_rank}" if torch.cuda.is_available() else "cpu"
    pipe.to(device)
    output = pipe(
        prompt=input_config.prompt,
        height=input_config.height,
        width=input_config.width,
        num_inference_steps=input_config.num_inference_steps,
        generator=torch.Generator(device).manual_seed(input_config.seed),
    )
    if output is not None:  # the last rank has the image
        output.images[0].save("image.png")


if __name__ == "__main__":
    main()
