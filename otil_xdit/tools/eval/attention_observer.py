"""One image is drawn with the pipeline of any folder, and its self-attention is seen as it calls torch's attention."""

from __future__ import annotations

import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from otil_xdit.catalog.bundled import BUNDLED, model_folder
from otil_xdit.catalog.folders import OWN, load_pipe
from otil_xdit.catalog.trust import check_folder
from otil_xdit.runtime.network_hooks import networks_of
from otil_xdit.tools.common.environment import versions
from otil_xdit.tools.eval.equivalents import Equivalent
from otil_xdit.tools.eval.statistics import LayerStatistics, Tracked, summary

_attention = torch.nn.functional.scaled_dot_product_attention


class _SeesAttention(TorchFunctionMode):
    """Shows every call of torch's attention to `see`, with its keys and values."""

    def __init__(self, see: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]) -> None:
        super().__init__()
        self._see = see
        self._parameters = ("query", "key", "value")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _attention:
            given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
            self._see(*(given[name] for name in self._parameters))
        return func(*args, **kwargs)


class AttentionObserver:
    """Sees the self-attention of a pipeline's denoising networks while it draws.

    Attributes:
        tracked: keys and values of each layer by its name.
        shapes: H, S and d of its keys.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._modules: list[str] = []
        self._calls: defaultdict[str, int] = defaultdict(int)
        self.tracked: dict[str, tuple[Tracked, Tracked]] = {}
        self.shapes: dict[str, torch.Size] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Bracket the drawing of one image; the pipeline is as before afterwards."""
        hooks = []
        for network in networks_of(self._pipe).values():
            for name, module in network.named_modules():
                hooks.append(
                    module.register_forward_pre_hook(lambda module, args, name=name: self._modules.append(name))
                )
                hooks.append(module.register_forward_hook(lambda module, args, out: self._left(), always_call=True))
        scheduler = self._pipe.scheduler
        step = scheduler.step

        def stepped(*args: Any, **kwargs: Any) -> Any:
            self._calls.clear()
            return step(*args, **kwargs)

        scheduler.step = stepped
        try:
            with _SeesAttention(self._see):
                yield
        finally:
            del scheduler.step
            for hook in hooks:
                hook.remove()

    def _left(self) -> None:
        self._modules.pop()

    def _see(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        if not self._modules or query.shape[-2] != key.shape[-2]:
            return  # an encoder's or the VAE's; or attention to the text
        module = self._modules[-1]
        name = f"{module}#{self._calls[module]}" if self._calls[module] else module
        self._calls[module] += 1
        keys, values = self.tracked.setdefault(name, (Tracked(), Tracked()))
        self.shapes[name] = key.shape[1:]
        keys.add(key)
        values.add(value)

    def layers(self) -> list[LayerStatistics]:
        """Return the figures of every layer, in the order in which they were called first."""
        return [
            LayerStatistics(name, tokens, heads, size, *(kind.statistics() for kind in self.tracked[name]))
            for name, (heads, tokens, size) in self.shapes.items()
        ]


@dataclass(frozen=True)
class Drawing:
    """The image that a network's figures are taken from.

    Attributes:
        prompt: of it; the seed is 0.
        sampler: of a U-Net's pipeline; others keep their own.
        steps: denoising steps.
        size: height and width in pixels; None for the pipeline's own.
        guidance: guidance scale, where the pipeline takes one.
        dtype: of the weights.
    """

    prompt: str
    sampler: str
    steps: int
    size: int | None
    guidance: float
    dtype: torch.dtype


def pipeline_folder(name: str) -> str:
    """Return the folder of a pipeline: a bundled model's, or one in diffusers format.

    Raises:
        ValueError: for a folder that is no pipeline, or whose files run code.
    """
    folder = model_folder(name) if name in BUNDLED else name
    if not (Path(folder) / "model_index.json").is_file():
        raise ValueError(f"--stats {name}: no model_index.json there; give a folder in diffusers format")
    check_folder(folder)
    return folder


def measure(folder: str, drawing: Drawing, equivalent: Equivalent | None) -> list[LayerStatistics]:
    """Draw one image in this process and return the figures of its self-attention.

    Args:
        folder: from `pipeline_folder`.
        drawing: the image.
        equivalent: what the networks are changed to first; None for the model as it is.

    Raises:
        ValueError: for a pipeline without a denoising network, or one without self-attention.
    """
    has_unet = "unet" in json.loads((Path(folder) / "model_index.json").read_text())
    pipe = load_pipe(folder, drawing.sampler if has_unet else OWN, None, drawing.dtype)
    networks = networks_of(pipe)
    if not networks:
        raise ValueError(f"--stats {folder}: a {type(pipe).__name__} has no denoising network that is known here")
    for network in networks.values():
        if equivalent is not None:
            equivalent.apply(network)
    size = {"height": drawing.size, "width": drawing.size}
    given = {"guidance_scale": drawing.guidance, "output_type": "latent", **size}
    taken = inspect.signature(type(pipe).__call__).parameters
    call = {name: value for name, value in given.items() if name in taken and value is not None}
    observer = AttentionObserver(pipe)
    with observer.watching(), torch.no_grad():
        pipe(drawing.prompt, num_inference_steps=drawing.steps, generator=torch.Generator().manual_seed(0), **call)
    if not observer.shapes:
        names = ", ".join(type(network).__name__ for network in networks.values())
        raise ValueError(f"--stats {folder}: {names} called no self-attention of torch's")
    return observer.layers()


def write_statistics(
    names: Sequence[str], equivalents: Sequence[Equivalent | None], drawing: Drawing, path: Path
) -> str:
    """Measure pipelines as they are and changed, write all figures as JSON, and return tables of them.

    Args:
        names: as for `pipeline_folder`.
        equivalents: what each is changed to in turn; None for as it is.
        drawing: the image.
        path: of the JSON file.
    """
    folders = [(name, pipeline_folder(name)) for name in names]
    known, found, tables = versions(), [], []
    for (name, folder), equivalent in product(folders, equivalents):
        layers, changed = measure(folder, drawing, equivalent), "" if equivalent is None else equivalent.text
        facts = {"model": name, "network": changed, **asdict(drawing), "dtype": str(drawing.dtype)}
        found.append({**facts, "versions": known, "layers": [asdict(layer) for layer in layers]})
        tables.append(f"### {f'{Path(name).name} {changed}'.rstrip()}\n\n{summary(layers)}\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return "\n".join(tables)
