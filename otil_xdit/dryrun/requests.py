"""What the layers of a network ask of the communicator in one pass, without weights and without other ranks.

A U-Net is run whole, on "meta", by the code that runs it on patches (`otil_xdit.networks.unet`), with a communicator
that writes the requests down. Of a DiT, which xDiT runs, its attention layers are listed.

Shapes: B batch, C channels, h rows of this rank, W columns, S tokens of a patch, D features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from otil_xdit.comm.groups import PatchGroup, UnetGroups
from otil_xdit.dryrun.blocks import UnitWatch
from otil_xdit.dryrun.networks import META, Layer, Network, check_size, layers_in_order
from otil_xdit.dryrun.recorder import FOREIGN, Log, Message, Pattern, ShapesOnly
from otil_xdit.exchange.communicator import OtilCommunicator
from otil_xdit.exchange.halo import HaloRows
from otil_xdit.method.grid import TokenLayout
from otil_xdit.method.schedule import Clock
from otil_xdit.networks.dit.architectures import architecture_of
from otil_xdit.networks.unet.model import PatchedUNet

Request = tuple[str, tuple[Any, ...]]
"""A method of the communicator, and what it is called with."""


@dataclass(frozen=True)
class ParallelDegrees:
    """How many ranks share the two passes of guidance, the attention heads, and the rows."""

    cfg: int = 1
    ulysses: int = 1
    patches: int = 1

    @property
    def ranks(self) -> int:
        return self.cfg * self.ulysses * self.patches

    def __str__(self) -> str:
        parts = {"cfg": self.cfg, "ulysses": self.ulysses, "patch": self.patches}
        return " x ".join(f"{name} {degree}" for name, degree in parts.items() if degree > 1) or "one process"


@dataclass(frozen=True)
class Job:
    """One denoising step of a picture.

    Attributes:
        network: without weights.
        height, width: in pixels.
        batch: images in one pass, those without the prompt included.
        dtype: of the network.
        text: text tokens in a pass.
        with_both: whether `batch` is half with and half without the prompt, where the network is guided that way.
    """

    network: Network
    height: int
    width: int
    batch: int
    dtype: torch.dtype
    text: int
    with_both: bool = True

    @property
    def is_guided(self) -> bool:
        """Whether each step computes with and without the prompt."""
        return self.with_both and self.network.batch == 2 and self.batch % 2 == 0

    @property
    def latent(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.height // self.network.vae, self.width // self.network.vae


@dataclass(frozen=True, eq=False)
class Pass:
    """What one rank does in a call of the network.

    Attributes:
        asks: requests of its layers in order.
        others: messages that xDiT sends by itself (Ulysses' all-to-alls; with a DiT what joins the passes of guidance,
            and packed tokens), which no communicator counts.
    """

    asks: list[Request]
    others: list[Message]


def asks_of(job: Job, composition: ParallelDegrees, place: int, watch: UnitWatch | None = None) -> Pass:
    """What one rank does in a step.

    Args:
        job: what is made.
        composition: by how many ranks.
        place: the rank's, from the top of the picture, among patches x ulysses.
        watch: is told which unit asks for what; attention is then computed, for its operations to be seen.

    Raises:
        ValueError: where so many ranks cannot share the job.
    """
    check_size(job.network, job.height, job.width)
    batch = job.batch // composition.cfg if job.batch % composition.cfg == 0 else job.batch
    rows = composition.patches * composition.ulysses
    log: list[Message] = []
    if job.network.is_unet:
        asks = _unet_asks(job, composition, place, log, watch)
    else:
        layers = layers_in_order(job.network, job.height, job.width, rows, job.text)
        asks = []
        for number, layer in enumerate(layers):
            with nullcontext() if watch is None else watch.inside(watch.number_of(layer.path), asks, log):
                asks += _dit_asks(job, composition, layer, number, log, batch)
        joined = _dit_output(job, composition, batch)
        if composition.cfg > 1:
            shown = torch.empty(joined[-1].nbytes, dtype=torch.uint8, device=META)
            asks.append(("count", (shown, "guidance")))
        log += joined
    return Pass(asks, log)


def replay(asks: list[Request], run: OtilCommunicator, log: Log) -> None:
    """Ask `run` for all of it, as the network's layers would at the step that its clock shows.

    Where a norm's convolution cannot have its rows together with the moments, both are asked for by themselves, as
    `otil_xdit.networks.unet.model` does.
    """
    with ShapesOnly():
        _replay(asks, run, log)


def _replay(asks: list[Request], run: OtilCommunicator, log: Log) -> None:
    rows: dict[str, HaloRows] = {}
    for method, args in asks:
        log.ask += 1
        if method == "norm_halo":
            names, mean, var, share = args[:4]
            found = run.norm_halo(*args)
            if found is None:
                run.moments(names[0], mean, var, share)
            else:
                rows[names[1]] = found[2]
        elif method == "halo":
            name, x, above, below = args
            run.halo(name, x, above, below, rows.pop(name, None))
        else:
            getattr(run, method)(*args)
    log.ask += 1


class _Asked:
    """A communicator that writes down what it is asked for, and gives tensors of the right shapes."""

    def __init__(self, composition: ParallelDegrees, place: int) -> None:
        self.asks: list[Request] = []
        self.clock = Clock()
        self._composition = composition
        self._place = place

    def observe(self, latent: torch.Tensor | None, layout: TokenLayout) -> None:
        self.asks.append(("observe", (latent, layout)))

    def gather(self, name: str, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.asks.append(("gather", (name, key, value)))
        return key, value

    def halo(self, name: str, x: torch.Tensor, above: int, below: int, given: HaloRows | None = None) -> torch.Tensor:
        self.asks.append(("halo", (name, x, above, below)))
        return x.new_empty(*x.shape[:2], above + x.shape[2] + below, x.shape[3])

    def moments(
        self, name: str, mean: torch.Tensor, var: torch.Tensor, share: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.asks.append(("moments", (name, mean, var, share)))
        return mean, var

    def norm_halo(
        self,
        names: tuple[str, str],
        mean: torch.Tensor,
        var: torch.Tensor,
        share: torch.Tensor,
        x: torch.Tensor,
        above: int,
        below: int,
    ) -> tuple[torch.Tensor, torch.Tensor, HaloRows]:
        self.asks.append(("norm_halo", (names, mean, var, share, x, above, below)))
        last = self._composition.patches * self._composition.ulysses - 1
        beyond = (x[:, :, :above] if self._place > 0 else None, x[:, :, :below] if self._place < last else None)
        return mean, var, beyond

    def collect(self, part: torch.Tensor, kind: str = "output") -> torch.Tensor:
        self.asks.append(("collect", (part, kind)))
        return part.new_empty(self._composition.ranks, *part.shape)


class _EveryPass:
    """Stands for `CfgController` where a rank computes its own pass alone."""

    def begin_call(self, network: Any) -> bool:
        return False

    def call(self, network: Any, call: Callable[[Any], Any], inputs: Any) -> Any:
        return call(inputs)

    def record_prediction(self, prediction: torch.Tensor) -> torch.Tensor:
        return prediction


class _SessionProtocol:
    """What a U-Net needs of a session."""

    is_active = True

    def __init__(self, communicator: _Asked) -> None:
        self.communicator = communicator
        self.cfg_controller = _EveryPass()
        self.name = ""
        self.kept_keys: torch.Tensor | None = None

    @contextmanager
    def attention(self, name: str, layout: TokenLayout, kept_keys: torch.Tensor | None) -> Iterator[None]:
        self.communicator.observe(None, layout)
        self.name, self.kept_keys = name, kept_keys
        yield


def _unet_asks(
    job: Job, composition: ParallelDegrees, place: int, log: list[Message], watch: UnitWatch | None
) -> list[Request]:
    asked = _Asked(composition, place)
    host = _SessionProtocol(asked)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        log.extend(_ulysses_messages(query, key, value, composition.ulysses))
        if composition.patches > 1:
            asked.gather(host.name, *(_over_heads(part, composition.ulysses) for part in (key, value)))
        if watch is None:
            return query
        tokens = rows * key.shape[2] if host.kept_keys is None else len(host.kept_keys)
        everybody = key.new_empty(*key.shape[:2], tokens, key.shape[3])
        return functional.scaled_dot_product_attention(query, everybody, everybody)

    nobody: Any = None
    rows = composition.patches * composition.ulysses
    places = tuple((half, row) for half in range(composition.cfg) for row in range(rows))
    groups = UnetGroups(PatchGroup(nobody, place, rows), composition.ulysses, composition.cfg, 0, places)
    patches = PatchedUNet(host, job.network.module, groups, attend)
    try:
        patches.prepare()
        with torch.no_grad(), nullcontext() if watch is None else watch.over(asked.asks, log):
            call_unet(job)
    finally:
        patches.release()
    return asked.asks


def call_unet(job: Job) -> None:
    """One pass of a U-Net with everything that it is to be given, on "meta"."""
    network, config = cast(job), job.network.module.config

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=job.dtype, device=META)

    added: dict[str, torch.Tensor] = {}
    if config.addition_embed_type == "text_time":
        times = config.addition_time_embed_dim
        ids = 5 if (config.projection_class_embeddings_input_dim - 5 * times) % times else 6
        pooled = config.projection_class_embeddings_input_dim - ids * times
        added = {"text_embeds": empty(job.batch, pooled), "time_ids": empty(job.batch, ids)}
    network(
        empty(job.batch, config.in_channels, *job.latent),
        torch.empty((), device=META),
        encoder_hidden_states=empty(job.batch, job.text, config.cross_attention_dim),
        added_cond_kwargs=added,
        return_dict=False,
    )


def cast(job: Job) -> Any:
    """The job's network, its weights of the job's type."""
    return nn.Module.to(job.network.module, job.dtype)  # diffusers' own warns of layers that it would keep in float32


def _dit_asks(
    job: Job, composition: ParallelDegrees, layer: Layer, number: int, log: list[Message], batch: int
) -> Iterator[Request]:
    """Of one attention layer: the tokens of a patch are those of as many ranks as share its heads."""
    degree, layout = composition.ulysses, layer.layout
    if layer.heads % degree:
        raise ValueError(f"--ulysses_degree {degree} cannot share out {layer.heads} attention heads")
    own = torch.empty(batch, layer.heads, layer.tokens, layer.width // layer.heads, dtype=job.dtype, device=META)
    log.extend(_ulysses_messages(own, own, own, degree))
    if composition.patches > 1:
        latent = None
        if layout.rows:
            rows, cols = layout.rows * layout.pixels, layout.cols * layout.pixels
            channels = job.network.module.config.in_channels
            latent = torch.empty(batch, channels, rows, cols, dtype=job.dtype, device=META)
        chunked = TokenLayout(layout.rows, layout.cols, layout.pixels, layout.text, degree)
        yield "observe", (latent, chunked)
        part = _over_heads(own, degree)
        yield "gather", (f"layer {number}", part, part)


def _over_heads(part: torch.Tensor, degree: int) -> torch.Tensor:
    """What Ulysses makes of [B, heads, S, D]: fewer heads of more tokens."""
    batch, heads, tokens, width = part.shape
    return part.new_empty(batch, heads // degree, tokens * degree, width)


def _ulysses_messages(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, degree: int) -> list[Message]:
    """Queries, keys and values there, and the output, which is like the queries, back."""
    sent = (query, key, value, query) if degree > 1 else ()
    return [_foreign("ulysses", "all-to-all", part.nbytes, degree) for part in sent]


def _dit_output(job: Job, composition: ParallelDegrees, batch: int) -> list[Message]:
    """What xDiT joins after a DiT's pass: of packed tokens every rank needs all; and the passes of guidance."""
    rows, cols = job.latent
    ranks = composition.patches * composition.ulysses
    packed = not architecture_of(job.network.module).rows
    # A packed token's channels are those of its latent pixels.
    numbers = rows * cols * job.network.module.config.in_channels // (job.network.patch**2 if packed else 1)
    share = batch * numbers * job.dtype.itemsize // ranks
    found = [_foreign("output", "all-gather", share, ranks)] if packed and ranks > 1 else []
    whole = share * (ranks if packed else 1)
    return found + ([_foreign("output", "all-gather", whole, composition.cfg)] if composition.cfg > 1 else [])


def _foreign(kind: str, pattern: Pattern, nbytes: int, ranks: int) -> Message:
    """A message that xDiT sends and waits for."""
    return Message(kind, pattern, nbytes, ranks, FOREIGN, awaited=True)
