"""Sessions and pipelines: which session an engine config has, and how a pipeline is attached to it and undone."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist

from otil_xdit.catalog.dits import DitRecord
from otil_xdit.catalog.models import find_record
from otil_xdit.catalog.pipelines import check_unet_pipeline
from otil_xdit.hybridiff.staged_networks import check_stages
from otil_xdit.networks.compatibility import check_processors
from otil_xdit.networks.dit.architectures import (
    architecture_of,
    check_architecture,
    cuts_tokens_itself,
    is_untested,
)
from otil_xdit.networks.unet.model import is_unet
from otil_xdit.runtime.network_hooks import NETWORKS, networks_of
from otil_xdit.runtime.session import PatchSession
from otil_xdit.runtime.strategies import SYNC
from otil_xdit.xdit.flags.choice import ParallelChoice
from otil_xdit.xdit.flags.options import AUTO
from otil_xdit.xdit.plugin.adapters import take_adapters
from otil_xdit.xdit.plugin.args import choice_of
from otil_xdit.xdit.plugin.backends import check_backends, hook_backends, use_sdpa_unless_named
from otil_xdit.xdit.plugin.group_lifetime import LIFETIME, degrees_of, degrees_of_groups
from otil_xdit.xdit.plugin.groups import connect
from otil_xdit.xdit.plugin.measured_shares import measure_shares
from otil_xdit.xdit.plugin.mends import without_ring
from otil_xdit.xdit.plugin.rows import allow_any_height, hook_heights, rows_of
from otil_xdit.xdit.plugin.token_shares import check_unequal_shares, hook_token_cuts
from otil_xdit.xdit.plugin.unwrap import parts_of, processors_of, unwrap
from otil_xdit.xdit.plugin.wrapped_calls import WrappedCall, rules_of

logger = logging.getLogger(__name__)

_SESSION = "otil_session"
_UNDO = "_otil_undo"


def session_of(pipe: Any) -> PatchSession | None:
    """Return the session that a pipeline (or xDiT wrapper of one) is attached to; None for no session."""
    return vars(pipe).get("_otil_session")


def share_session(pipe: Any, other: Any) -> None:
    """Attach `other`, a pipeline of the same networks, to the session of `pipe`, where that has one."""
    session = session_of(pipe)
    if session is not None:
        _attach(session, other)


def undo(pipe: Any) -> Any:
    """Give the pipeline back as it was before xDiT wrapped it and a session took it; see `otil_xdit.restore`."""
    inner = vars(pipe).get("module", pipe)
    for one in (pipe, inner):
        session = session_of(one)
        if session is not None:
            session.detach()
        LIFETIME.released_by(one)
    vars(pipe).pop(_UNDO, _nothing)()
    return inner


def keep_undo(pipe: Any, undo_more: Callable[[], None]) -> None:
    """Have `undo` call `undo_more` for a pipeline that xDiT has not wrapped."""
    vars(pipe)[_UNDO] = undo_more


def _nothing() -> None:
    """Undo the wrapping of a pipeline that xDiT has not wrapped."""


def hook_runtime_state() -> None:
    """Attach a pipeline for which xDiT initializes its state; lift the limits of ring attention on backends."""
    from xfuser.core import distributed
    from xfuser.core.distributed import runtime_state

    initialize = runtime_state.initialize_runtime_state

    @wraps(initialize)
    def initialize_runtime_state(pipeline: Any = None, engine_config: Any = None) -> None:
        parallel = getattr(engine_config, "parallel_config", None)
        if parallel is not None:
            LIFETIME.give_up(parallel)
        initialize(pipeline, engine_config)
        session = _session_for(engine_config, pipeline)
        if parallel is not None and pipeline is not None:
            LIFETIME.used_by(pipeline, session)
        if session is not None and choice_of(engine_config.parallel_config) is None:
            use_sdpa_unless_named(runtime_state.get_runtime_state(), engine_config)
        if session is not None and pipeline is not None:
            state = runtime_state._RUNTIME
            session.surroundings = partial(_in_state, runtime_state, state)
            dits = [network for network in networks_of(pipeline).values() if not is_unet(network)]
            by_rows = [network for network in dits if architecture_of(network).call == "rows"]
            if dits and all(network in by_rows or cuts_tokens_itself(network) for network in dits):
                allow_any_height(state)
            if by_rows:
                session.rows = partial(rows_of, state)
            session.splits_text = partial(getattr, state, "split_text_embed_in_sp", False)
            _attach(session, pipeline)

    _replace_everywhere(initialize, initialize_runtime_state)
    assert distributed.initialize_runtime_state is initialize_runtime_state

    hook_heights()
    hook_backends(runtime_state.RuntimeState)


def hook_pipelines() -> None:
    """Attach what xDiT wraps a pipeline in, and keep what `undo` needs to unwrap it."""
    from xfuser.model_executor.pipelines.base_pipeline import xFuserPipelineBaseWrapper

    init = xFuserPipelineBaseWrapper.__init__

    @wraps(init)
    def __init__(self: Any, pipeline: Any, engine_config: Any, *args: Any, **kwargs: Any) -> None:
        choice = choice_of(getattr(engine_config, "parallel_config", None))
        if choice is not None:
            for name in NETWORKS:
                if isinstance(network := getattr(pipeline, name, None), torch.nn.Module):
                    check_processors(name, network)
        parts = parts_of(pipeline)
        vars(self)[_UNDO] = partial(unwrap, pipeline, parts, processors_of(parts))
        vars(self)["module"] = pipeline  # as xDiT's own last line does; for `undo`, should it not get there
        try:
            with without_ring() if choice is not None else nullcontext():
                init(self, pipeline, engine_config, *args, **kwargs)
            session = _session_for(self.engine_config, self)
            if session is not None:
                _attach(session, self, rules_of(self))
                take_adapters(self, parts)
        except Exception:
            undo(self)
            raise

    xFuserPipelineBaseWrapper.__init__ = __init__


def hook_models() -> None:
    """Attach the second pipelines of xDiT's models, and lift the limits of ring attention on models."""
    from xfuser.model_executor.models.runner_models.base_model import xFuserModel

    validate, loaded = xFuserModel._validate_config, xFuserModel._post_load_and_state_initialization

    @wraps(validate)
    def _validate_config(self: Any, config: Any) -> None:
        record = find_record(config.model)
        if choice_of(config) is not None and isinstance(record, DitRecord) and record.needs_no_ring:
            self.capabilities = replace(self.capabilities, ring_degree=True)
        validate(self, config)

    @wraps(loaded)
    def _post_load_and_state_initialization(self: Any, input_args: dict[str, Any]) -> None:
        loaded(self, input_args)
        session = session_of(self.pipe)
        if session is None:
            return
        for other in vars(self).values():
            if other is not self.pipe and networks_of(other):
                _attach(session, other)

    xFuserModel._validate_config = _validate_config
    xFuserModel._post_load_and_state_initialization = _post_load_and_state_initialization


def _session_for(engine_config: Any, pipeline: Any) -> PatchSession | None:
    """Return the one session of an engine config; None where nothing is shared out.

    xDiT initializes its state for a wrapper and for what it wraps, so this is called more than once.
    A U-Net has nothing in xDiT that would share it out, so it has a session with any degree, and without a strategy
    one that is as exact as xDiT's own for DiTs.
    """
    parallel = getattr(engine_config, "parallel_config", None)
    if parallel is None:
        return None
    choice = choice_of(parallel)
    if choice is not None:
        _check_groups(parallel)
    if getattr(pipeline, "unet", None) is not None:
        if parallel.sp_degree * parallel.cfg_degree == 1:
            return None
        check_unet_pipeline(pipeline)
        choice = choice or ParallelChoice(SYNC, SYNC.make_config({}), parallel.ring_degree, parallel.ulysses_degree)
    elif choice is None or choice.patch_degree * parallel.cfg_degree == 1:
        return None
    for name, network in networks_of(pipeline).items():
        if is_unet(network):
            continue
        check_architecture(name, network, choice.allow_untested)
        if choice.patch_shares:
            check_unequal_shares(name, network)
        if choice.strategy.requires_cfg_parallel:
            check_stages(network)
    check_backends(engine_config.runtime_config, pipeline)
    generation, session = getattr(parallel, _SESSION, (None, None))
    if session is None or generation != LIFETIME.generation:
        _warn_of_untested(pipeline)
        if choice.patch_shares == AUTO:
            choice = replace(choice, patch_shares=measure_shares(pipeline, choice.ulysses_degree))
        if choice.patch_shares:
            hook_token_cuts(networks_of(pipeline).values())
        session = connect(choice)
        setattr(parallel, _SESSION, (LIFETIME.generation, session))
    return session


def _warn_of_untested(pipeline: Any) -> None:
    """Say on rank 0 that nobody has compared a network with one process."""
    for network in networks_of(pipeline).values():
        if dist.get_rank() == 0 and not is_unet(network) and is_untested(network):
            logger.warning(
                "nobody has compared %s on patches with one process; the images may be wrong",
                getattr(network, "module_type", type(network)).__name__,
            )


def _check_groups(parallel: Any) -> None:
    """Check that a pipeline asks for the degrees that this process has: xDiT makes its groups once a process.

    Raises:
        ValueError: naming both.
    """
    wanted, made = degrees_of(parallel), degrees_of_groups()
    if made is not None and wanted != made:
        raise ValueError(
            "this pipeline is to run on {} patches x {} Ulysses x {} CFG, and this process's groups were made for {} x "
            "{} x {}, which other pipelines use: give all pipelines of a process the same degrees, or call "
            "otil_xdit.restore for the others first".format(*wanted, *made)
        )


def _attach(session: PatchSession, pipe: Any, rules: WrappedCall | None = None) -> None:
    """Attach a pipeline to its session; only rank 0 keeps the progress bar."""
    session.attach(pipe, rules)
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


def _replace_everywhere(old: object, new: object) -> None:
    """Replace a function wherever it is bound: xfuser's modules import names from each other."""
    for name, module in list(sys.modules.items()):
        if name.startswith("xfuser") and module is not None:
            for attribute, value in list(vars(module).items()):
                if value is old:
                    setattr(module, attribute, new)
