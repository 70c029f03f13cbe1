"""The pipeline of one rank: a shipped model or a wider copy of its network, shared out as a strategy says."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from otil_xdit.catalog.folders import load_pipe
from otil_xdit.dryrun.networks import wider_settings
from otil_xdit.tools.bench.plan import ALONE, Strategy

SEED = 0
"""Of the weights of a wider network; the same on every rank."""


def network_name(pipe: Any) -> str:
    """Return the name of the component that denoises."""
    return "unet" if getattr(pipe, "unet", None) is not None else "transformer"


def load(folder: str, sampler: str, width: int) -> Any:
    """Return the diffusers pipeline of a folder with its network `width` times as wide; float32, in eval mode."""
    pipe = load_pipe(folder, sampler, None)
    if width > 1:
        name = network_name(pipe)
        old = getattr(pipe, name)
        setattr(pipe, name, wider(old, width).to(old.device))
    return pipe


def wider(network: Any, times: int) -> Any:
    """Return a network of the same config, `times` as wide (`wider_settings`), with random weights."""
    torch.manual_seed(SEED)
    return type(network).from_config(wider_settings(network.config, times)).eval()


def share_out(pipe: Any, strategy: Strategy) -> Any:
    """Return the pipeline that makes an image with all ranks of the process group; called like `pipe`.

    Raises:
        ValueError: where xDiT or this package refuses.
    """
    if strategy.text == ALONE:
        return pipe
    if strategy.variant is None and network_name(pipe) == "transformer":
        return _by_xdit(pipe, strategy.text)
    import otil_xdit

    if strategy.variant is None:
        assert strategy.text == "cfg", f"{strategy.text} has no U-Nets"
        return otil_xdit.parallelize(pipe, "sync", use_cfg_parallel=True)
    return otil_xdit.parallelize(pipe, strategy.variant.strategy)


def _by_xdit(pipe: Any, way: str) -> Any:
    """Share the pipeline out by xDiT alone, without this package's hooks."""
    from otil_xdit.xdit.cpu import enable_cpu_ranks

    enable_cpu_ranks()
    from xfuser import xFuserArgs
    from xfuser.core.distributed import init_distributed_environment
    from xfuser.model_executor.pipelines.register import xFuserPipelineWrapperRegister

    init_distributed_environment()
    ranks = dist.get_world_size()
    degrees: dict[str, dict[str, Any]] = {
        "cfg": {"use_cfg_parallel": True},
        "ulysses": {"ulysses_degree": ranks},
        "ring": {"ring_degree": ranks},
        "pipefusion": {"pipefusion_parallel_degree": ranks, "num_pipeline_patch": ranks},
    }
    engine_config, _ = xFuserArgs(model=type(pipe).__name__, **degrees[way]).create_config()
    engine_config.runtime_config.dtype = torch.float32
    return xFuserPipelineWrapperRegister.get_class(pipe)(pipe, engine_config)
