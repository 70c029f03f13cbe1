"""The Python call: `parallelize` a diffusers pipeline in a torchrun script."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from otil_xdit.catalog.geometry import check_heads
from otil_xdit.catalog.pipelines import check_unet_pipeline
from otil_xdit.catalog.unets import heads_of
from otil_xdit.method.checks import check_choice, check_integer
from otil_xdit.method.config import OtilConfig
from otil_xdit.networks.dit.architectures import check_architecture
from otil_xdit.networks.dit.step_cache import is_of_xdit
from otil_xdit.networks.unet.model import is_unet
from otil_xdit.runtime.network_hooks import NETWORKS
from otil_xdit.runtime.strategies import Strategy, get_strategy, strategies
from otil_xdit.xdit.flags.choice import ParallelChoice
from otil_xdit.xdit.flags.degrees import resolve_patch_degree
from otil_xdit.xdit.flags.options import VAE_CHOICES, Shares, check_given_shares, check_shares
from otil_xdit.xdit.plugin import transformers
from otil_xdit.xdit.plugin.args import carry
from otil_xdit.xdit.plugin.register import register
from otil_xdit.xdit.plugin.sessions import keep_undo, undo

logger = logging.getLogger("otil_xdit")


def parallelize(
    pipe: Any,
    strategy: Strategy | str = "otil",
    config: OtilConfig | None = None,
    *,
    ulysses_degree: int = 1,
    use_cfg_parallel: bool = False,
    allow_untested: bool = False,
    vae: str = ParallelChoice.vae,
    patch_shares: Sequence[int] | str = (),
) -> Any:
    """Run every image of `pipe` on all ranks of this torchrun.

    Args:
        pipe: a diffusers pipeline around a U-Net (`otil_xdit.catalog.pipelines.SUPPORTED`), one whose transformer
            xDiT's command line runs, or one that xDiT has a wrapper for, on this rank's device. It is changed in place:
            use only what is returned.
        strategy: the name of a strategy (`otil_xdit.strategies`), or a `Strategy`.
        config: all settings of the exchange; None for the strategy's own. Where a strategy fixes settings, build it
            with ``get_strategy(NAME).make_config({...})``.
        ulysses_degree: ranks that share the attention heads of a patch.
        use_cfg_parallel: compute the passes with and without the prompt on different halves of the ranks; ``hybridiff``
            does so in any case.
        allow_untested: take a transformer on that nobody has compared with one process; rank 0 warns.
        vae: "patches", where the ranks share the rows of an `AutoencoderKL`, or "whole".
        patch_shares: rows of each patch, or a transformer's tokens, as shares in any unit: (3, 2) for two patches, the
            first on a faster card; "auto" has every rank time a step now; empty for equal ones.

    Returns:
        A pipeline that is called like `pipe`, on every rank with the same arguments. It is `pipe` itself, and every
        rank gets the images, except where xDiT wraps it (SD3, FLUX.1 without an image, Lumina2, PixArt, HunyuanDiT,
        CogVideoX): then, as everywhere in xDiT, the last rank gets the images and the others None. On one rank `pipe`
        itself.

    Raises:
        ValueError: for an unknown strategy, settings that contradict it, degrees that do not fill the world or do not
            divide the attention heads, a transformer with one patch, or a pipeline that cannot be run on patches.
    """
    strategy = check_strategy(strategy)
    config = check_config(strategy, config)
    check_choice("vae", vae, VAE_CHOICES)
    check_integer("ulysses_degree", ulysses_degree, 1)
    shares = check_given_shares(patch_shares)
    choice = ParallelChoice(strategy, config, 1, ulysses_degree, None, allow_untested, vae, shares)
    return parallelize_as(pipe, choice, use_cfg_parallel)


def parallelize_as(pipe: Any, choice: ParallelChoice, use_cfg_parallel: bool) -> Any:
    """Do what `parallelize` does; the number of patches is what the other degrees leave of the world."""
    _check_transformers(pipe, choice)
    if not dist.is_initialized() and "RANK" not in os.environ:
        logger.warning("no torchrun has started this process: the pipeline runs here alone; start it with torchrun")
        return pipe
    register()
    from xfuser import xFuserArgs
    from xfuser.core.distributed import init_distributed_environment, initialize_runtime_state
    from xfuser.model_executor.pipelines.register import xFuserPipelineWrapperRegister

    ulysses_degree, use_cfg_parallel = choice.ulysses_degree, use_cfg_parallel or choice.strategy.requires_cfg_parallel
    unet = getattr(pipe, "unet", None)
    if unet is not None:
        check_unet_pipeline(pipe)
        check_heads(heads_of(unet.config), ulysses_degree, type(pipe).__name__)
    in_place = unet is None and _runs_in_place(pipe, choice.patch_shares)
    if in_place and use_cfg_parallel:
        transformers.check_cfg_parallel(pipe)
    wrapper = None if unet is not None or in_place else xFuserPipelineWrapperRegister.get_class(pipe)
    init_distributed_environment()  # makes what is not there yet: the process group, xDiT's group of the world
    degrees = {"ulysses_degree": ulysses_degree, "use_cfg_parallel": use_cfg_parallel}
    choice = replace(choice, patch_degree=resolve_patch_degree(degrees, dist.get_world_size()))
    check_shares(choice.patch_shares, choice.patch_degree)
    if dist.get_world_size() == 1:
        return pipe
    if unet is None and choice.patch_degree * (1 + use_cfg_parallel) == 1:
        _refuse_one_patch(ulysses_degree)
    args = carry(xFuserArgs(model=type(pipe).__name__, ring_degree=choice.patch_degree, **degrees), choice)
    if dist.get_rank() == 0 and choice.patch_degree > 1:
        from otil_xdit.dryrun.memory_estimate import log_memory_estimate

        log_memory_estimate(pipe, choice.config, choice.patch_degree, ulysses_degree, 1 + use_cfg_parallel)
    engine_config, _ = args.create_config()
    engine_config.runtime_config.dtype = getattr(pipe, "dtype", torch.float32)
    if wrapper is not None:
        return wrapper(pipe, engine_config)
    if in_place:
        _initialize_in_place(pipe, engine_config, use_cfg_parallel)
    else:
        initialize_runtime_state(pipe, engine_config)
    return pipe


def _refuse_one_patch(ulysses_degree: int) -> NoReturn:
    """Refuse a transformer whose ranks all share one patch's heads: xDiT's own wrappers and layers would run unwatched.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"ulysses_degree is {ulysses_degree} for {ulysses_degree} processes, which leaves one patch and the strategy "
        "nothing to do; give a smaller one, or run Ulysses alone by xDiT's command line"
    )


def _initialize_in_place(pipe: Any, engine_config: Any, use_cfg_parallel: bool) -> None:
    """Give a pipeline's transformers xDiT's classes, and attach it."""
    from xfuser.core.distributed import initialize_runtime_state

    undo_conversion = transformers.convert(pipe, use_cfg_parallel)
    try:
        initialize_runtime_state(pipe, engine_config)
        transformers.finish(pipe)
    except Exception:
        undo_conversion()
        raise
    keep_undo(pipe, undo_conversion)


def restore(pipe: Any) -> Any:
    """Undo `parallelize`: give classes, hooks, layers and attributes back as they were, and free the buffers.

    Every rank that called `parallelize` calls this; nothing is sent. Process groups stay, for the next `parallelize`;
    one with other degrees gets new ones, and so does a pipeline of xDiT without a strategy.

    Args:
        pipe: what `parallelize` returned, or the pipeline of any other call that was attached to a strategy.

    Returns:
        The diffusers pipeline, which computes on this rank alone what it did before. It is `pipe`; of an xDiT
        wrapper it is the pipeline that was wrapped, and the wrapper is of no use any more. LoRA that was loaded
        in between stays loaded. A pipeline that is not parallelized is given back as it is.
    """
    return undo(pipe)


def _runs_in_place(pipe: Any, shares: Shares) -> bool:
    """Return whether a pipeline runs as on xDiT's command line: itself, with xDiT's classes of its transformers.

    Args:
        pipe: a diffusers pipeline.
        shares: of the patches; xDiT's wrappers know equal ones alone.
    """
    return transformers.runs_in_place(pipe) and (bool(shares) or type(pipe).__name__ not in _WRAPPED)


_WRAPPED = ("FluxPipeline",)
"""Pipelines that xDiT has a wrapper for, although their transformers can be converted: it shares out the whole loop."""


def _check_transformers(pipe: Any, choice: ParallelChoice) -> None:
    """Refuse, before xDiT wraps it, a transformer that patches cannot serve.

    Raises:
        ValueError: naming the network's class and the reason.
    """
    for name in NETWORKS:
        network = getattr(pipe, name, None)
        if not isinstance(network, torch.nn.Module) or is_unet(getattr(network, "_orig_mod", network)):
            continue
        check_architecture(name, network, choice.allow_untested)
        _check_no_cached_blocks(name, network)
        if not _runs_in_place(pipe, choice.patch_shares):
            _check_no_adapters(name, network)
        _check_nothing_else_attends(pipe, name, network)


def _check_nothing_else_attends(pipe: Any, name: str, network: torch.nn.Module) -> None:
    """Refuse what adds to a transformer's layers for the whole image: xDiT's attention would leave it out, or fail.

    Raises:
        ValueError: naming it.
    """
    if getattr(network, "encoder_hid_proj", None) is not None:
        raise ValueError(
            f"--parallel does not support an IP-Adapter on the pipeline's {name}: xDiT's attention leaves it out; call "
            "pipe.unload_ip_adapter() first"
        )
    if getattr(pipe, "controlnet", None) is not None:
        raise ValueError(
            f"--parallel does not support {type(pipe).__name__}: its ControlNet adds to the tokens of the whole image, "
            "and each rank has a part of them"
        )


def _check_no_cached_blocks(name: str, network: torch.nn.Module) -> None:
    """Refuse a transformer whose blocks are in a step cache of xDiT's already, where xDiT does not find them.

    Raises:
        ValueError: naming the cache, and what to do.
    """
    cached = next((module for module in network.modules() if is_of_xdit(module)), None)
    if cached is not None:
        raise ValueError(
            f"--parallel does not support the {type(cached).__name__} on the pipeline's {name} here: call apply_cache "
            "after parallelize, as xDiT's runner does"
        )


def _check_no_adapters(name: str, network: torch.nn.Module) -> None:
    """Refuse a transformer with adapters of PEFT, fused or not: xDiT's wrappers take plain linear layers only.

    Raises:
        ValueError: naming a layer, and what to do.
    """
    adapted = next(
        (path for path, layer in network.named_modules() if type(layer).__module__.startswith("peft.")), None
    )
    if adapted is not None:
        raise ValueError(
            f"--parallel does not support adapters (LoRA) on the pipeline's {name} ({adapted}): xDiT takes plain "
            "linear layers; call pipe.fuse_lora() and pipe.unload_lora_weights() before parallelize"
        )


def check_strategy(strategy: Strategy | str) -> Strategy:
    """Return the strategy that a name stands for, and a `Strategy` as it is.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(strategy, str):
        return get_strategy(strategy)
    if not isinstance(strategy, Strategy):
        raise ValueError(
            f"strategy is {strategy!r}; give a Strategy or a name (settings are given as config=); choose from "
            f"{', '.join(strategies())}"
        )
    return strategy


def check_config(strategy: Strategy, config: Any) -> Any:
    """Return the settings that a strategy runs with: its own for None, otherwise `config`, where they go together.

    Raises:
        ValueError: naming the settings that are not what the strategy makes of them.
    """
    own = strategy.make_config({})
    if config is None:
        return own
    if not isinstance(config, type(own)):
        kind = "an OtilConfig" if isinstance(own, OtilConfig) else f"a {type(own).__name__}"
        raise ValueError(f"config is {config!r}; give {kind}, or None for the settings of strategy {strategy.name}")
    if not isinstance(config, OtilConfig):
        return config  # another package's, which alone can judge it
    names = [one.name for one in fields(config)]
    made = strategy.make_config({name: getattr(config, name) for name in names if _differs(name, config, own)})
    wrong = [
        f"{name} is {getattr(config, name)!r} and not {getattr(made, name)!r}"
        for name in names
        if _differs(name, config, made)
    ]
    if wrong:
        raise ValueError(
            f"config does not go with strategy {strategy.name}: {'; '.join(wrong)}; give another strategy, or what "
            f"get_strategy({strategy.name!r}).make_config({{...}}) returns"
        )
    return config


def _differs(name: str, one: OtilConfig, other: OtilConfig) -> bool:
    """Tell whether a setting is not the same in both."""
    return bool(getattr(one, name) != getattr(other, name))
