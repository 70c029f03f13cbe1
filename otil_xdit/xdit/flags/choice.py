"""What this project's flags mean together with xDiT's own.

`choose` turns parsed values into a `ParallelChoice`, before any process group exists and before weights load.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from otil_xdit.catalog.attention_backends import check_backend, head_sizes
from otil_xdit.catalog.dits import DitRecord
from otil_xdit.catalog.geometry import check_geometry
from otil_xdit.catalog.models import find_record, find_unet
from otil_xdit.catalog.numbers import FLAG_NUMBERS, check_numbers
from otil_xdit.catalog.unets import UnetRecord
from otil_xdit.errors import FlagError
from otil_xdit.method.config import SETTINGS, OtilConfig
from otil_xdit.runtime.strategies import Strategy, get_strategy, strategies
from otil_xdit.xdit.flags.degrees import degree, resolve_patch_degree
from otil_xdit.xdit.flags.options import AUTO, Shares, check_shares, given_settings, options

logger = logging.getLogger(__name__)

T = TypeVar("T")

_REFUSED = {
    "pipefusion_parallel_degree": "PipeFusion cuts the image into patches itself",
    "tensor_parallel_degree": "untested",
    "use_fp8_comms": "it rewrites what the ring slot sends",
    "use_fast_attn": "it skips attention layers, and their exchange with them",
    "vae_parallel_size": "it takes ranks away from the patches",
}
"""xDiT's flags that no strategy works with, and why. A degree counts as set from 2 on, others when they are true."""

_REFUSED_BY_UNETS = {
    **_REFUSED,
    **dict.fromkeys(("cache_method", "use_teacache", "use_fbcache"), "xDiT's step caches are for transformers"),
    **dict.fromkeys(
        ("enable_sequential_cpu_offload", "enable_group_cpu_offload"),
        "it replaces the forward methods that patches replace; --enable_model_cpu_offload moves whole networks",
    ),
}
"""The same for U-Nets that share an image among ranks, whether a strategy is named or not."""

_STEP_CACHES = {"teacache": "FluxTransformer2DModel", "fbcache": "Flux2Transformer2DModel"}
"""xDiT's own step caches, and the network that each is for; what it gives other networks is cache-dit's."""

_SHARING = (
    "ulysses_degree",
    "ring_degree",
    "use_cfg_parallel",
    "pipefusion_parallel_degree",
    "tensor_parallel_degree",
)
"""Flags that put one image on several ranks."""


@dataclass(frozen=True)
class ParallelChoice:
    """What the command line asks for.

    Attributes:
        strategy: the strategy that ``--parallel`` names.
        config: its settings, as its `make_config` built them.
        patch_degree: number of patches; the size of xDiT's ring dimension.
        ulysses_degree: ranks that share a patch's attention heads.
        allow_untested: take models on that nobody has compared with one process.
        report: file for rank 0's report of bytes and waiting time, or None.
        vae: one of `VAE_CHOICES`.
        patch_shares: of the rows or tokens, for each patch, in any unit; empty for equal ones, ``auto`` for measured
            ones.
    """

    strategy: Strategy
    config: Any
    patch_degree: int
    ulysses_degree: int
    report: str | None = None
    allow_untested: bool = False
    vae: str = "patches"
    patch_shares: Shares = ()


def choose(values: Mapping[str, Any], world_size: int | None) -> ParallelChoice | None:
    """Turn parsed flags into a choice, checked as far as can be before any process group exists.

    Args:
        values: parsed flags by name, as ``vars(parser.parse_args())`` gives them; missing ones count as not given.
        world_size: number of processes, or None where it shall follow from the degrees.

    Returns:
        None without ``--parallel``.

    Raises:
        FlagError: for flags that contradict each other, the world or the image's size.
    """
    name, unet = values.get("parallel"), find_unet(values.get("model"))
    _flag_errors(lambda: check_numbers(values, FLAG_NUMBERS, "--"))
    _check_scheduler(values, unet)
    if name is None:
        _check_given_without_parallel(values)
        _check_shared_unet(values, unet)
        return None
    strategy = _flag_errors(lambda: get_strategy(name))
    values, given = implied(values), given_settings(values)
    _check_unsupported(values, f"--parallel {name}", _REFUSED if unet is None else _REFUSED_BY_UNETS)
    _check_step_cache(values, f"--parallel {name}")
    patch_degree, ulysses_degree = _patch_degree(values, world_size, strategy), degree(values, "ulysses_degree")
    config = _flag_errors(lambda: strategy.make_config(given))
    if strategy.requires_cfg_parallel:
        calls_blocks = "in its window the network's blocks are called one by one"
        _check_unsupported(values, f"--parallel {name}", {"use_torch_compile": calls_blocks})
    _check_selector(config, ulysses_degree)
    _check_call(values, config)
    _check_backend(values)
    _check_batch(values)
    shares = values.get("patch_shares") or ()
    by_number = () if shares == AUTO else shares
    _flag_errors(lambda: check_shares(shares, patch_degree, *_why_equal_shares(values)))
    _flag_errors(lambda: check_geometry(values, patch_degree, ulysses_degree, given.get("block_size"), by_number))
    _check_report(values.get("otil_report"))
    _warn_of_unet_settings(given, unet)
    if patch_degree == 1 and (unet is None or ulysses_degree == 1) and not strategy.requires_cfg_parallel:
        logger.warning("--parallel %s has no effect with one patch", name)
    report, allow_untested = values.get("otil_report"), bool(values.get("allow_untested"))
    vae = values.get("vae") or ParallelChoice.vae
    return ParallelChoice(strategy, config, patch_degree, ulysses_degree, report, allow_untested, vae, shares)


def _patch_degree(values: Mapping[str, Any], world_size: int | None, strategy: Strategy) -> int:
    try:
        return resolve_patch_degree(values, world_size)
    except FlagError as error:
        implies = strategy.requires_cfg_parallel
        reason = f"--parallel {strategy.name} implies --use_cfg_parallel: " if implies else ""
        raise FlagError(f"{reason}{error}") from None


def implies_cfg_parallel(values: Mapping[str, Any]) -> bool:
    """Return whether ``--parallel`` names a strategy whose ranks share the passes with and without the prompt."""
    strategy = strategies().get(values.get("parallel") or "")
    return strategy is not None and strategy.requires_cfg_parallel


def implied(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the flags, with those that ``--parallel`` takes as given."""
    return {**values, "use_cfg_parallel": True} if implies_cfg_parallel(values) else values


def _check_given_without_parallel(values: Mapping[str, Any]) -> None:
    given = [f"--{option.flag}" for option in options() if values.get(option.flag) is not None]
    if given:
        raise FlagError(f"{', '.join(given)} given without --parallel; add --parallel {'|'.join(strategies())}")


def _check_unsupported(values: Mapping[str, Any], what: str, refused: Mapping[str, str]) -> None:
    """Refuse one of xDiT's flags in `refused` that is given together with `what`."""
    for flag, reason in refused.items():
        value = values.get(flag)
        if not value or (flag.endswith("_degree") and value == 1):
            continue
        shown = f"--{flag}" if value is True else f"--{flag} {value}"
        raise FlagError(f"{what} and {shown} are not supported together ({reason})")


def _check_step_cache(values: Mapping[str, Any], what: str) -> None:
    """Refuse xDiT's step caches where ranks would decide apart, or nobody has compared them with one process."""
    asked = [method for method in ("fbcache", "teacache") if values.get(f"use_{method}")]
    method = values.get("cache_method") or next(iter(asked), None)
    if method is None:
        return
    record = find_record(values.get("model"))
    kind = record.kind if isinstance(record, DitRecord) else None
    reason = ""
    if kind is None or _STEP_CACHES.get(method) != kind:
        own = ", ".join(f"{cache} for {network}" for cache, network in _STEP_CACHES.items())
        reason = f"of xDiT's caches those decide alike on all ranks: {own}"
    elif values.get("use_cfg_parallel"):
        reason = "with --use_cfg_parallel each half of the ranks has one pass of guidance, and would decide by itself"
    elif values.get("use_torch_compile"):
        reason = "with --use_torch_compile ranks would be asked in the middle of a graph"
    if reason:
        raise FlagError(f"{what} and --cache_method {method} are not supported together ({reason})")


def _check_shared_unet(values: Mapping[str, Any], unet: UnetRecord | None) -> None:
    """Check a U-Net without ``--parallel``: where ranks share an image, it runs as ``--parallel sync`` would."""
    if unet is None:
        return
    if any(degree(values, flag) > 1 for flag in _SHARING):
        _check_unsupported(values, f"--model {values['model']} on several ranks", _REFUSED_BY_UNETS)
    patches, ulysses_degree = degree(values, "ring_degree"), degree(values, "ulysses_degree")
    _flag_errors(lambda: check_geometry(values, patches, ulysses_degree, None))


def _check_scheduler(values: Mapping[str, Any], unet: UnetRecord | None) -> None:
    if values.get("scheduler") is not None and unet is None:
        raise FlagError(
            f"--scheduler {values['scheduler']} is for U-Nets; --model {values.get('model')} is none, and keeps the "
            "scheduler that xDiT gives it"
        )


def _check_selector(config: Any, ulysses_degree: int) -> None:
    select = getattr(config, "select", "")
    if ulysses_degree > 1 and str(select).startswith("latent"):
        raise FlagError(
            f"--otil_select {select} is not supported together with --ulysses_degree {ulysses_degree}: a rank has the "
            "latent of its own rows only; choose kv-cosine or kv-l2"
        )


def _check_call(values: Mapping[str, Any], config: Any) -> None:
    if isinstance(config, OtilConfig):
        steps, scale = values.get("num_inference_steps"), values.get("guidance_scale")
        _flag_errors(lambda: config.check_call(steps, scale, "--guidance_scale"))


def _check_backend(values: Mapping[str, Any]) -> None:
    named = [values[flag] for flag in ("attention_backend", "cross_attention_backend") if values.get(flag)]
    heads = head_sizes(find_record(values.get("model"))) if named else set()
    for name in named:
        _flag_errors(partial(check_backend, name, str(values.get("model")), None, heads))


def _check_batch(values: Mapping[str, Any]) -> None:
    """Refuse prompts of one batch that may have different lengths, where xDiT does not read the mask of each."""
    record, size = find_record(values.get("model")), int(values.get("batch_size") or 1)
    if size < 2 or not isinstance(record, DitRecord) or record.facts.masks != "alike":
        return
    prompts = values.get("prompt")
    if values.get("dataset_path") or (isinstance(prompts, list) and len(set(prompts)) > 1):
        raise FlagError(
            f"--batch_size {size} and different prompts are not supported together with --model {values['model']}: "
            "xDiT would attend to the padding of shorter ones; give --batch_size 1"
        )


def _why_equal_shares(values: Mapping[str, Any]) -> tuple[str, str]:
    """Return the model's name, and why its patches are equal: empty where they need not be, or it is not known."""
    record = find_record(values.get("model"))
    if not isinstance(record, DitRecord):
        return "", ""
    compiled = "" if not values.get("use_torch_compile") else record.facts.why_equal_compiled
    return f"--model {values['model']}", record.facts.why_equal_shares or compiled


def _warn_of_unet_settings(given: Mapping[str, Any], unet: UnetRecord | None) -> None:
    for name in given:
        if unet is None and name in SETTINGS and SETTINGS[name].unet_only:
            logger.warning("--otil_%s has an effect on U-Nets only", name)


def _check_report(report: str | None) -> None:
    if report is not None and not Path(report).absolute().parent.is_dir():
        raise FlagError(f"--otil_report {report}: no such directory")


def _flag_errors(call: Callable[[], T]) -> T:
    """Return what the call returns; its `ValueError` becomes a `FlagError` that names the flag, not the setting."""
    try:
        return call()
    except ValueError as error:
        message = str(error)
        name = message.partition(" is ")[0]
        if name in SETTINGS or name == "quality":
            message = f"--otil_{message}"
        raise FlagError(message) from error
