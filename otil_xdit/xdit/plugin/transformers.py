"""Give a diffusers transformer, in place, the class that xDiT's runner would have loaded it as.

xDiT has a pipeline wrapper for some pipelines only. The others it runs as diffusers' own pipeline round a subclass of
diffusers' transformer, which its runner loads from a folder. A pipeline that is loaded already gets the same here: its
transformer keeps its identity, weights, hooks and adapters, and gets xDiT's class and attention processors.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from otil_xdit.runtime.network_hooks import networks_of
from otil_xdit.runtime.session import PatchSession

MODELS = "xfuser.model_executor.models.transformers"
_PIPELINES = "xfuser.model_executor.pipelines"
_AFTERWARDS = ("install_xdit_attention_processors", "_install_xfuser_processors")
"""What xDiT calls where it loads a class that has no `__init__` of its own."""


@dataclass(frozen=True)
class RunnerTransformer:
    """What xDiT's runner makes of a transformer.

    Attributes:
        module: the module of xfuser, below `model_executor.models.transformers`.
        name: xDiT's class in there, or the function that makes it.
        shares_passes: whether it shares a batch of passes with and without the prompt among CFG-parallel ranks.
        pipelines: for pipelines that run one pass after the other, module and class (or its function) of those of
            xDiT that share them among CFG-parallel ranks.
    """

    module: str
    name: str
    shares_passes: bool = False
    pipelines: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def find(self) -> type:
        """Return xDiT's class of the network."""
        return _class_at(f"{MODELS}.{self.module}", self.name)


RUNNER_TRANSFORMERS = {
    "Flux2Transformer2DModel": RunnerTransformer("transformer_flux2", "xFuserFlux2Transformer2DWrapper"),
    "FluxTransformer2DModel": RunnerTransformer("transformer_flux", "xFuserFlux1Transformer2DWrapper"),
    "QwenImageTransformer2DModel": RunnerTransformer(
        "transformer_qwen",
        "xFuserQwenImageTransformerWrapper",
        pipelines={"QwenImageEditPipeline": ("pipeline_qwen_image_edit", "xFuserQwenImageEditPipeline")},
    ),
    "ZImageTransformer2DModel": RunnerTransformer(
        "transformer_z_image", "xFuserZImageTransformer2DWrapper", shares_passes=True
    ),
    "Krea2Transformer2DModel": RunnerTransformer("transformer_krea2", "xFuserKrea2Transformer2DWrapper"),
    "Ideogram4Transformer2DModel": RunnerTransformer(
        "transformer_ideogram4",
        "get_ideogram4_transformer_wrapper_class",
        pipelines={"Ideogram4Pipeline": ("pipeline_ideogram4", "get_ideogram4_pipeline_class")},
    ),
    "WanTransformer3DModel": RunnerTransformer(
        "transformer_wan",
        "xFuserWanTransformer3DWrapper",
        pipelines={"WanImageToVideoPipeline": ("pipeline_wan_i2v", "xFuserWanImageToVideoPipeline")},
    ),
    "WanVACETransformer3DModel": RunnerTransformer("transformer_wan_vace", "xFuserWanVACETransformer3DWrapper"),
    "HunyuanVideoTransformer3DModel": RunnerTransformer(
        "transformer_hunyuan_video", "xFuserHunyuanVideoTransformer3DWrapper"
    ),
    "HunyuanVideo15Transformer3DModel": RunnerTransformer(
        "transformer_hunyuan_video15", "xFuserHunyuanVideo15Transformer3DWrapper"
    ),
    "LTX2VideoTransformer3DModel": RunnerTransformer("transformer_ltx2", "xFuserLTX2VideoTransformer3DWrapper"),
    "Cosmos3OmniTransformer": RunnerTransformer(
        "transformer_cosmos3",
        "get_cosmos3_transformer_wrapper_class",
        pipelines={"Cosmos3OmniPipeline": ("pipeline_cosmos3_omni", "get_cosmos3_pipeline_class")},
    ),
}
"""By the class that diffusers gives the network."""


@dataclass
class _Conversion:
    """What was done to a network.

    Attributes:
        own: its class before.
        undo: gives it back.
        users: how many pipelines share the network.
    """

    own: type
    undo: Callable[[], None]
    users: int = 0


_CONVERSION = "_otil_conversion"


def _kind_of(network: nn.Module) -> str:
    """Return the name of diffusers' class of a network, converted or not."""
    found: _Conversion | None = vars(network).get(_CONVERSION)
    return (type(network) if found is None else found.own).__name__


def runs_in_place(pipe: Any) -> bool:
    """Return whether all denoising networks of a pipeline can be given xDiT's class, or have it."""
    networks = networks_of(pipe)
    return bool(networks) and all(_kind_of(network) in RUNNER_TRANSFORMERS for network in networks.values())


def check_cfg_parallel(pipe: Any) -> None:
    """Check that xDiT shares the passes with and without the prompt of a pipeline that runs in place.

    Raises:
        ValueError: naming the pipeline.
    """
    networks = networks_of(pipe).values()
    facts = [RUNNER_TRANSFORMERS[_kind_of(network)] for network in networks]
    if not all(one.shares_passes or type(pipe).__name__ in one.pipelines for one in facts):
        raise ValueError(
            f"use_cfg_parallel is True, and xDiT has no CFG parallelism for {type(pipe).__name__}; leave it out"
        )


def convert(pipe: Any, use_cfg_parallel: bool) -> Callable[[], None]:
    """Give a pipeline's denoising networks, and where passes are shared out the pipeline, xDiT's classes.

    Args:
        pipe: a diffusers pipeline for which `runs_in_place`; it is changed in place.
        use_cfg_parallel: whether ranks share the passes with and without the prompt.

    Returns:
        What undoes it.
    """
    undo: list[Callable[[], None]] = []
    for network in {id(one): one for one in networks_of(pipe).values()}.values():
        facts = RUNNER_TRANSFORMERS[_kind_of(network)]
        if use_cfg_parallel and type(pipe).__name__ in facts.pipelines:
            undo.append(partial(setattr, pipe, "__class__", type(pipe)))
            pipe.__class__ = pipeline_class(facts.pipelines[type(pipe).__name__])
        if _CONVERSION not in vars(network):
            own = type(network)
            vars(network)[_CONVERSION] = _Conversion(own, _convert_network(network, facts.find()))
        vars(network)[_CONVERSION].users += 1
        undo.append(partial(_release, network))

    def undo_all() -> None:
        for one in reversed(undo):
            one()

    return undo_all


def _release(network: nn.Module) -> None:
    """Give a network its class back where no other pipeline needs xDiT's."""
    conversion: _Conversion = vars(network)[_CONVERSION]
    conversion.users -= 1
    if conversion.users == 0:
        conversion.undo()
        del vars(network)[_CONVERSION]


def finish(pipe: Any) -> None:
    """Say to converted networks, and to xDiT's state, what xDiT's runner would say before a call."""
    from xfuser.core.distributed import get_runtime_state

    state = get_runtime_state()
    if not hasattr(state, "max_condition_sequence_length"):
        state.max_condition_sequence_length = 0  # read by all Flux attention, and used under PipeFusion only
    for network in networks_of(pipe).values():
        learn_place: Any = getattr(network, "_init_sp_state", None)
        if learn_place is not None:
            learn_place()


def pipeline_class(place: tuple[str, str]) -> type:
    """Return xDiT's class of a pipeline; see `RunnerTransformer.pipelines`."""
    module, name = place
    return _class_at(f"{_PIPELINES}.{module}", name)


def _class_at(module: str, name: str) -> type:
    found: Any = getattr(importlib.import_module(module), name)
    kind: type = found if isinstance(found, type) else found()
    return kind


def _convert_network(network: nn.Module, kind: type) -> Callable[[], None]:
    """Give a network xDiT's subclass `kind` of its class; what is returned undoes that."""
    own = type(network)
    before = {module: [dict(owner) for owner in _attributes(module)] for module in network.modules()}
    network.__class__ = kind
    if "__init__" in vars(kind):
        init: Any = vars(kind)["__init__"]
        names = inspect.signature(init).parameters
        takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in names.values())
        config = {name: value for name, value in vars(network)["_internal_dict"].items() if not name.startswith("_")}
        with _without_init(own):
            init(network, **{name: value for name, value in config.items() if takes_all or name in names})
    for name in _AFTERWARDS:
        getattr(network, name, _nothing)()
    network.register_forward_pre_hook(_check_session)
    changes = [
        (owner, key, old.get(key, _ABSENT), value)
        for module, copies in before.items()
        for owner, old in zip(_attributes(module), copies, strict=False)
        for key, value in owner.items()
        if old.get(key, _ABSENT) is not value
    ]

    def undo() -> None:
        network.__class__ = own
        for owner, key, old, new in changes:
            if owner.get(key, _ABSENT) is not new:
                continue  # somebody else has changed it since
            if old is _ABSENT:
                del owner[key]
            else:
                owner[key] = old

    return undo


def _nothing() -> None:
    """Stand for a method that a class has not."""


def _check_session(network: nn.Module, args: tuple[Any, ...]) -> None:
    """Refuse a call that no parallelized pipeline makes: xDiT's class would exchange in a way that is not exact."""
    if PatchSession.active() is None:
        raise ValueError(
            f"this {vars(network)[_CONVERSION].own.__name__} belongs to a pipeline that was parallelized, and another "
            "calls it, or none; parallelize the other pipeline too, bracket your own loop by "
            "otil_xdit.generation, or call otil_xdit.restore"
        )


_ABSENT = object()


def _attributes(module: nn.Module) -> list[dict[Any, Any]]:
    """Return a module's attributes, and those of them that hold others: layers, parameters, hooks."""
    own = vars(module)
    return [own, *(value for value in own.values() if isinstance(value, dict))]


@contextmanager
def _without_init(kind: Any) -> Iterator[None]:
    """Have a class's `__init__` do nothing: the network that it would make is there already."""
    init = kind.__init__
    kind.__init__ = lambda self, *args, **kwargs: None
    try:
        yield
    finally:
        kind.__init__ = init
