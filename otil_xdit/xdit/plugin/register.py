"""`register()`: hooks the plugin into xfuser, once.

| what in xfuser 0.7.0 | what it does besides |
|---|---|
| `xFuserArgs.add_runner_args`, `.add_cli_args` (config/args.py) | know the "Otil options" |
| `xFuserArgs.from_runner_args`, `.from_cli_args` (config/args.py) | validate them; ring_degree is the patch degree |
| `xFuserArgs.create_config` (config/args.py) | the choice travels with the parallel config |
| `runtime_state.initialize_runtime_state` (core/distributed/runtime_state.py) | connects the strategy to the pipeline |
| `RuntimeState`'s check of attention backends (same file) | no ring limits |
| `xFuserPipelineBaseWrapper.__init__` (model_executor/pipelines/base_pipeline.py) | its calls are generations |
| `usp.ring_attn` (model_executor/layers/usp.py) | gathers over the patches while a generation runs |
| `usp._get_attention_function` (same file) | its backends leave out keys that are padding |
| `GroupCoordinator.all_gather` (core/distributed/group_coordinator.py) | shows the predictions of CFG parallelism |

Without ``--parallel`` none of them changes anything.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from otil_xdit.catalog.pipelines import check_unet_pipeline
from otil_xdit.comm.failure_detector import FailureDetector
from otil_xdit.comm.groups import PatchGroup, UnetGroups, break_connections, limit_waits
from otil_xdit.method.config import OtilConfig
from otil_xdit.networks.compatibility import check_processors
from otil_xdit.networks.dit.architectures import check_stages
from otil_xdit.runtime.agreement import facts_of_settings, versions
from otil_xdit.runtime.network_hooks import NETWORKS
from otil_xdit.runtime.session import PatchSession
from otil_xdit.runtime.strategies import SYNC
from otil_xdit.xdit.cpu import enable_cpu_ranks
from otil_xdit.xdit.flags.choice import ParallelChoice, choose, implied
from otil_xdit.xdit.flags.options import add_otil_args
from otil_xdit.xdit.plugin.attention import over_patches, without_padding
from otil_xdit.xdit.plugin.unwrap import parts_of, unwrap
from otil_xdit.xdit.versions import warn_if_untested

logger = logging.getLogger("otil_xdit")

_CHOICE = "otil_choice"
_SESSION = "otil_session"
_UNDO = "_otil_undo"
_MARK = "_otil_xdit_registered"

_SETUP_SECONDS = 1800.0
"""What ranks wait for each other before the first generation, while they load weights: torch's default for gloo."""


def register() -> None:
    """Teach xfuser the parallel strategies; calling it again changes nothing.

    Where there is no accelerator, xfuser is made to run on gloo first (`otil_xdit.xdit.cpu`).
    """
    enable_cpu_ranks()
    import xfuser

    if getattr(xfuser, _MARK, False):
        return
    warn_if_untested()
    _hook_args(xfuser.xFuserArgs)
    _hook_runtime_state()
    _hook_pipelines()
    _hook_attention()
    _hook_guidance()
    from otil_xdit.xdit.models.tiny_dit import register_models

    register_models()
    setattr(xfuser, _MARK, True)


def session_of(pipe: Any) -> PatchSession | None:
    """The session that a pipeline (or xDiT wrapper of one) was attached to."""
    return vars(pipe).get("_otil_session")


def undo(pipe: Any) -> Any:
    """The pipeline as it was before it was attached to a strategy and xDiT wrapped it; see `otil_xdit.restore`."""
    inner = vars(pipe).get("module", pipe)
    for one in (pipe, inner):
        session = session_of(one)
        if session is not None:
            session.detach()
    vars(pipe).pop(_UNDO, _nothing)()
    return inner


def _nothing() -> None:
    """What there is to undo of a pipeline that xDiT has not wrapped."""


def connect(choice: ParallelChoice) -> PatchSession:
    """A session over the patches that this process works on one image with; the process groups must exist."""
    from xfuser.core.distributed import parallel_state
    from yunchang.globals import PROCESS_GROUP

    ring, sequence = PROCESS_GROUP.RING_PG, parallel_state.get_sp_group()
    replica = parallel_state.get_model_replica_group()
    connections = _connections(ring, PROCESS_GROUP.ULYSSES_PG, sequence, replica, parallel_state.get_cfg_group())
    limit_waits(connections, _SETUP_SECONDS)
    timeout = getattr(choice.config, "timeout", OtilConfig.timeout)
    detector = _make_detector(replica, connections, timeout)
    rows = PatchGroup(sequence.device_group, sequence.rank_in_group, sequence.world_size, detector=detector)
    place = dist.get_rank(ring) * choice.ulysses_degree + sequence.ulysses_rank
    assert rows.rank == place, "xDiT's sequence ranks are expected in the order ring x Ulysses"
    group = PatchGroup(
        ring,
        dist.get_rank(ring),
        dist.get_world_size(ring),
        choice.ulysses_degree,
        rows,
        PatchGroup(replica.device_group, replica.rank_in_group, replica.world_size, detector=detector),
        detector,
    )
    cfg_rank = parallel_state.get_classifier_free_guidance_rank()
    cfg_degree = parallel_state.get_classifier_free_guidance_world_size()
    places: list[Any] = [None] * replica.world_size
    dist.all_gather_object(places, (cfg_rank, place), group=replica.cpu_group)
    unets = UnetGroups(rows, choice.ulysses_degree, cfg_degree, cfg_rank, tuple(places))
    communicator = choice.strategy.connect(choice.config, group)
    limit_waits(connections, timeout)
    facts = {
        **versions(),
        **facts_of_settings(choice.strategy.name, choice.config),
        "the number of patches": str(group.world_size),
        "the Ulysses degree": str(choice.ulysses_degree),
        "the CFG degree": str(cfg_degree),
    }
    return PatchSession(communicator, group, _reporter(choice), (unets, _attend), facts)


def _connections(*groups: Any) -> list[dist.ProcessGroup]:
    """The process groups, among them those of xDiT's coordinators, on which this rank may wait for others."""
    found: list[dist.ProcessGroup] = []
    for group in groups:
        found += [group.device_group, group.cpu_group] if hasattr(group, "device_group") else [group]
    return [group for group in found if dist.get_world_size(group) > 1]


def _make_detector(replica: Any, groups: list[dist.ProcessGroup], timeout: float) -> FailureDetector | None:
    """What tells the ranks of an image of each other's failures; None for a single rank."""
    if replica.world_size == 1:
        return None
    names: list[Any] = [None] * replica.world_size
    dist.all_gather_object(names, uuid.uuid4().hex, group=replica.cpu_group)
    connections = replica.device_group.group_name
    store = distributed_c10d._get_default_store()  # torch has no public way to it
    host = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
    sever = partial(break_connections, groups)
    return FailureDetector(names[0], connections, replica.ranks, dist.get_rank(), timeout, store, host, sever)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A U-Net's self-attention as xDiT's DiTs have theirs; [B, heads, S, d]."""
    from xfuser.model_executor.layers import usp

    out: torch.Tensor = usp.USP(query, key, value)
    return out


def _reporter(choice: ParallelChoice) -> Callable[[PatchSession], None]:
    """What is said and written after each generation, on rank 0 only."""

    def finished(session: PatchSession) -> None:
        if dist.get_rank() != 0:
            return
        report = session.report()
        logger.info(
            "%s: %d steps (%d warm-up), sent per step and rank after warm-up: %.1f kB of keys and values, %.1f kB of "
            "halo rows and moments, %.1f kB of output; waited %.2f s, buffers %.1f MB",
            choice.strategy.name,
            report.steps,
            report.warmup_steps,
            report.kv_bytes_per_step / 1e3,
            report.small_bytes_per_step / 1e3,
            report.output_bytes_per_step / 1e3,
            report.waited_seconds,
            report.buffer_bytes / 1e6,
        )
        if choice.report is not None:
            Path(choice.report).write_text(
                json.dumps({"strategy": choice.strategy.name, **report.to_dict()}, indent=2) + "\n"
            )

    return finished


def _session_for(engine_config: Any, pipeline: Any) -> PatchSession | None:
    """The one session of an engine config: xDiT initializes its state for a wrapper and for what it wraps.

    A U-Net has nothing in xDiT that would share it out, so it has a session with any degree, and without a strategy
    one that is as exact as xDiT's own for DiTs.
    """
    parallel = getattr(engine_config, "parallel_config", None)
    if parallel is None:
        return None
    choice = getattr(parallel, _CHOICE, None)
    if choice is not None:
        _check_groups(parallel)
    if getattr(pipeline, "unet", None) is not None:
        if parallel.sp_degree * parallel.cfg_degree == 1:
            return None
        check_unet_pipeline(pipeline)
        choice = choice or ParallelChoice(SYNC, SYNC.make_config({}), parallel.ring_degree, parallel.ulysses_degree)
    elif choice is None or choice.patch_degree * parallel.cfg_degree == 1:
        return None
    if choice.strategy.requires_cfg_parallel:
        for name in ("transformer", "transformer_2"):
            if isinstance(network := getattr(pipeline, name, None), torch.nn.Module):
                check_stages(network)
    if getattr(parallel, _SESSION, None) is None:
        setattr(parallel, _SESSION, connect(choice))
    return getattr(parallel, _SESSION)


def _check_groups(parallel: Any) -> None:
    """xDiT makes its process groups once a process, whatever later pipelines ask for."""
    from xfuser.core.distributed import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return
    sequence = parallel_state.get_sp_group()
    wanted = (parallel.ring_degree, parallel.ulysses_degree, parallel.cfg_degree)
    made = (
        sequence.ring_world_size,
        sequence.ulysses_world_size,
        parallel_state.get_classifier_free_guidance_world_size(),
    )
    if wanted != made:
        raise ValueError(
            "this pipeline is to run on {} patches x {} Ulysses x {} CFG, and this process's groups were made for {} x "
            "{} x {}; xDiT makes them once: give all pipelines of a process the same degrees".format(*wanted, *made)
        )


def _attach(session: PatchSession, pipe: Any) -> None:
    session.attach(pipe)
    if dist.get_rank() != 0 and hasattr(pipe, "set_progress_bar_config"):
        owner = pipe.set_progress_bar_config.__self__  # the pipeline that an xDiT wrapper holds
        session.on_detach(partial(_put_back, owner, "_progress_bar_config", vars(owner).get("_progress_bar_config")))
        pipe.set_progress_bar_config(**{**getattr(pipe, "_progress_bar_config", {}), "disable": True})


@contextmanager
def _in_state(module: Any, state: Any) -> Iterator[None]:
    """Let xDiT's one runtime state be that of the pipeline which generates: each new pipeline's replaces it for all."""
    before, module._RUNTIME = module._RUNTIME, state
    try:
        yield
    finally:
        module._RUNTIME = before


def _put_back(owner: Any, attribute: str, value: Any) -> None:
    """Give an attribute its value back; None for one that was not there."""
    if value is None:
        vars(owner).pop(attribute, None)
    else:
        setattr(owner, attribute, value)


def _hook_args(args_class: Any) -> None:
    for name in ("add_runner_args", "add_cli_args"):
        setattr(args_class, name, staticmethod(_with_flags(getattr(args_class, name))))
    from_runner_args, from_cli_args = args_class.from_runner_args.__func__, args_class.from_cli_args.__func__

    @wraps(from_runner_args)
    def from_runner(cls: Any, args: dict[str, Any]) -> Any:
        choice, values = _resolved(args)
        return carry(from_runner_args(cls, values), choice)

    @wraps(from_cli_args)
    def from_cli(cls: Any, args: argparse.Namespace) -> Any:
        choice, values = _resolved(vars(args))
        return carry(from_cli_args(cls, argparse.Namespace(**values)), choice)

    create_config = args_class.create_config

    @wraps(create_config)
    def create(self: Any) -> Any:
        engine_config, input_config = create_config(self)
        choice = getattr(self, _CHOICE, None)
        if choice is not None:
            # EngineConfig is frozen; its parallel config is not, and reaches everything that RuntimeState does.
            setattr(engine_config.parallel_config, _CHOICE, choice)
        return engine_config, input_config

    args_class.from_runner_args = classmethod(from_runner)
    args_class.from_cli_args = classmethod(from_cli)
    args_class.create_config = create


def _with_flags(add_args: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @wraps(add_args)
    def add(parser: Any) -> Any:
        parser = add_args(parser)
        add_otil_args(parser)
        return parser

    return add


def _resolved(values: dict[str, Any]) -> tuple[ParallelChoice | None, dict[str, Any]]:
    """The choice that flags stand for, and the flags with the patch degree in the ring slot."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    choice = choose(values, world_size)
    ring = choice.patch_degree if choice is not None else values.get("ring_degree") or 1
    return choice, {**implied(values), "ring_degree": ring}


def carry(args: Any, choice: ParallelChoice | None) -> Any:
    """Let an `xFuserArgs` take `choice` along to the configs that it creates."""
    setattr(args, _CHOICE, choice)
    return args


def _hook_runtime_state() -> None:
    from xfuser.core import distributed
    from xfuser.core.distributed import runtime_state

    initialize = runtime_state.initialize_runtime_state

    @wraps(initialize)
    def initialize_runtime_state(pipeline: Any = None, engine_config: Any = None) -> None:
        initialize(pipeline, engine_config)
        session = _session_for(engine_config, pipeline)
        if session is not None and pipeline is not None:
            session.surroundings = partial(_in_state, runtime_state, runtime_state._RUNTIME)
            _attach(session, pipeline)

    _replace_everywhere(initialize, initialize_runtime_state)
    assert distributed.initialize_runtime_state is initialize_runtime_state

    check = runtime_state.RuntimeState._check_if_backend_compatible_with_current_configuration

    @wraps(check)
    def check_backend(self: Any, attention_backend: Any) -> None:
        if getattr(self.parallel_config, _CHOICE, None) is None:
            return check(self, attention_backend)
        # Nothing is merged by log-sum-exp under a strategy, so the limits of ring_degree > 1 do not hold.
        without_ring = copy.copy(self)
        without_ring.parallel_config = copy.copy(self.parallel_config)
        without_ring.parallel_config.ring_degree = 1
        return check(without_ring, attention_backend)

    runtime_state.RuntimeState._check_if_backend_compatible_with_current_configuration = check_backend


def _hook_pipelines() -> None:
    from xfuser.model_executor.pipelines.base_pipeline import xFuserPipelineBaseWrapper

    init = xFuserPipelineBaseWrapper.__init__

    @wraps(init)
    def __init__(self: Any, pipeline: Any, engine_config: Any, *args: Any, **kwargs: Any) -> None:
        if getattr(getattr(engine_config, "parallel_config", None), _CHOICE, None) is not None:
            for name in NETWORKS:
                if isinstance(network := getattr(pipeline, name, None), torch.nn.Module):
                    check_processors(name, network)
        vars(self)[_UNDO] = partial(unwrap, pipeline, parts_of(pipeline))
        vars(self)["module"] = pipeline  # as xDiT's own last line does; for `undo`, should it not get there
        try:
            init(self, pipeline, engine_config, *args, **kwargs)
            session = _session_for(self.engine_config, self)
            if session is not None:
                _attach(session, self)
        except Exception:
            undo(self)
            raise

    xFuserPipelineBaseWrapper.__init__ = __init__


def _hook_attention() -> None:
    from xfuser.model_executor.layers import usp

    usp.ring_attn = over_patches(usp.ring_attn)
    usp._get_attention_function = without_padding(usp._get_attention_function)


def _hook_guidance() -> None:
    """CFG groups of ranks show each other their predictions by this alone."""
    from xfuser.core.distributed import parallel_state
    from xfuser.core.distributed.group_coordinator import GroupCoordinator

    all_gather = GroupCoordinator.all_gather

    @wraps(all_gather)
    def gather(self: Any, input_: torch.Tensor, dim: int = 0, separate_tensors: bool = False) -> Any:
        gathered = all_gather(self, input_, dim, separate_tensors)
        session = PatchSession.active()
        if session is None or self.world_size == 1 or self is not parallel_state.get_cfg_group():
            return gathered
        return session.gathered(gathered, dim, input_)

    GroupCoordinator.all_gather = gather


def _replace_everywhere(old: object, new: object) -> None:
    """xfuser's modules import names from each other, so a function is replaced wherever it is bound."""
    for name, module in list(sys.modules.items()):
        if name.startswith("xfuser") and module is not None:
            for attribute, value in list(vars(module).items()):
                if value is old:
                    setattr(module, attribute, new)
