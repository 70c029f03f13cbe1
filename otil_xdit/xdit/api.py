"""The Python call: `parallelize` a diffusers pipeline in a torchrun script."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from otil_xdit.catalog.geometry import check_heads
from otil_xdit.catalog.pipelines import check_unet_pipeline
from otil_xdit.catalog.unets import heads_of
from otil_xdit.method.config import OtilConfig
from otil_xdit.runtime.strategies import get_strategy
from otil_xdit.xdit.flags.choice import ParallelChoice
from otil_xdit.xdit.flags.degrees import resolve_patch_degree
from otil_xdit.xdit.plugin.register import carry, register, undo


def parallelize(
    pipe: Any, how: OtilConfig | str = "otil", *, ulysses_degree: int = 1, use_cfg_parallel: bool = False
) -> Any:
    """Run every image of `pipe` on all ranks of this torchrun.

    Args:
        pipe: a diffusers pipeline around a U-Net (`otil_xdit.catalog.pipelines.SUPPORTED`) or one that xDiT has a
        wrapper
            for, on this rank's device. It is changed in place: use only what is returned.
        how: settings of the exchange, or the name of a strategy (`otil_xdit.strategies`) with its defaults.
        ulysses_degree: ranks that share the attention heads of a patch.
        use_cfg_parallel: compute the passes with and without the prompt on different halves of the ranks; ``hybridiff``
            does so in any case.

    Returns:
        A pipeline that is called like `pipe`, on every rank with the same arguments. Around a U-Net it is `pipe`
        itself, and every rank gets the images; otherwise, as everywhere in xDiT, the last rank gets the images and the
        others None. On one rank `pipe` itself.

    Raises:
        ValueError: for an unknown strategy, degrees that do not fill the world or do not divide the attention heads, or
            a pipeline that cannot be run on patches.
    """
    register()
    from xfuser import xFuserArgs
    from xfuser.core.distributed import init_distributed_environment, initialize_runtime_state
    from xfuser.model_executor.pipelines.register import xFuserPipelineWrapperRegister

    strategy = get_strategy(how if isinstance(how, str) else "otil" if how.stages == 1 else "hybridiff")
    config = strategy.make_config({}) if isinstance(how, str) else how
    use_cfg_parallel = use_cfg_parallel or strategy.requires_cfg_parallel
    unet = getattr(pipe, "unet", None)
    if unet is not None:
        check_unet_pipeline(pipe)
        check_heads(heads_of(unet.config), ulysses_degree, type(pipe).__name__)
    wrapper = None if unet is not None else xFuserPipelineWrapperRegister.get_class(pipe)
    init_distributed_environment()  # makes what is not there yet: the process group, xDiT's group of the world
    degrees = {"ulysses_degree": ulysses_degree, "use_cfg_parallel": use_cfg_parallel}
    patch_degree = resolve_patch_degree(degrees, dist.get_world_size())
    if dist.get_world_size() == 1:
        return pipe
    args = xFuserArgs(model=type(pipe).__name__, ring_degree=patch_degree, **degrees)
    carry(args, ParallelChoice(strategy, config, patch_degree, ulysses_degree))
    if dist.get_rank() == 0 and patch_degree > 1:
        from otil_xdit.dryrun.memory_estimate import tell_footprint

        tell_footprint(pipe, config, patch_degree, ulysses_degree, 1 + use_cfg_parallel)
    engine_config, _ = args.create_config()
    engine_config.runtime_config.dtype = getattr(pipe, "dtype", torch.float32)
    if wrapper is not None:
        return wrapper(pipe, engine_config)
    initialize_runtime_state(pipe, engine_config)
    return pipe


def restore(pipe: Any) -> Any:
    """Undo `parallelize`: give classes, hooks, layers and attributes back as they were, and free the buffers.

    Every rank that called `parallelize` calls this; nothing is sent. Process groups stay, for the next `parallelize`.

    Args:
        pipe: what `parallelize` returned, or the pipeline of any other call that was attached to a strategy.

    Returns:
        The diffusers pipeline, which computes on this rank alone what it did before. Around a U-Net it is `pipe`; of
        an xDiT wrapper it is the pipeline that was wrapped, and the wrapper is of no use any more. LoRA that was loaded
        in between stays loaded. A pipeline that is not parallelized is given back as it is.
    """
    return undo(pipe)
