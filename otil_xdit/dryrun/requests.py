"""The requests of a network's layers to the communicator in one pass, without weights and without other ranks.

A U-Net is run whole, on "meta", by the code that runs it on patches (`otil_xdit.networks.unet`), with a communicator
that writes the requests down. Of a DiT, which xDiT runs, its attention layers are listed.

Shapes: B batch, C channels, S tokens of a patch, d features of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch.nn import functional

from otil_xdit.dryrun.blocks import BlockWatch
from otil_xdit.dryrun.flops import call_controls, call_network
from otil_xdit.dryrun.job import Job, ParallelDegrees, Pass, Request
from otil_xdit.dryrun.launches import LaunchCounter, Launches, as_on_cuda, launches_of_network
from otil_xdit.dryrun.networks import META, Layer, attention_layers, check_size
from otil_xdit.dryrun.recorder import FOREIGN, Log, Message, Pattern, ShapesOnly
from otil_xdit.dryrun.stand_ins import DryRunSession, RecordingCommunicator, unet_groups
from otil_xdit.exchange.halo import HaloRows
from otil_xdit.exchange.protocol import Communicator
from otil_xdit.method.grid import TokenLayout
from otil_xdit.networks.dit.architectures import architecture_of
from otil_xdit.networks.unet.control_calls import ControlCalls
from otil_xdit.networks.unet.controlnet import PatchedControlNet
from otil_xdit.networks.unet.model import PatchedNetwork, PatchedUNet

_ROWS_OF_A_PAIR = 2
"""Launches that make a neighbour's rows into what a norm's convolution reads: the norm, and the activation."""

_JOINS = 3
"""Launches of xDiT in an attention layer of a DiT: text and image of queries, keys and values are joined again."""

_PROJECTIONS = 2
"""Launches that give an attention layer the keys and values of the text, which are kept from step to step."""


def requests_of(
    job: Job,
    degrees: ParallelDegrees,
    place: int,
    watch: BlockWatch | None = None,
    counts_launches: bool = False,
    calls_blocks: bool = False,
) -> Pass:
    """Return what one rank does in a step.

    Args:
        job: the step.
        degrees: of the ranks that share it.
        place: the rank's, from the top of the image, among patches x Ulysses.
        watch: sees which block makes which request; attention is then computed, for its operations to be seen.
        counts_launches: whether the kernels are counted as well, without a `watch`.
        calls_blocks: whether the run has steps in two stages (`otil_xdit.hybridiff`).

    Raises:
        ValueError: where so many ranks cannot share the job, or launches are to be counted of a DiT whose call is not
            known here.
    """
    check_size(job.network, job.height, job.width)
    if not job.network.is_unet:
        return _dit_pass(job, degrees, place, watch, counts_launches)
    return _unet_pass(job, degrees, place, watch, LaunchCounter() if counts_launches else None, calls_blocks)


def replay(requests: list[Request], communicator: Communicator, log: Log, counter: LaunchCounter | None = None) -> None:
    """Make all requests to a communicator, as the network's layers would at the step that its clock shows.

    Where a norm's convolution cannot have its rows together with the moments, both are requested by themselves, as
    `otil_xdit.networks.unet.model` does.

    Args:
        requests: of one pass.
        communicator: answers them.
        log: counts them; the communicator's collectives add their messages to it.
        counter: counts the exchange's launches, where it is given.
    """
    prefetched: dict[str, HaloRows] = {}
    rooms: dict[str, torch.Tensor] = {}
    with ShapesOnly() if counter is None else nullcontext():
        for method, args in requests:
            log.request += 1
            if method == "norm_halo":
                names, mean, var, share = args[:4]
                found = communicator.norm_halo(*args)
                if found is None:
                    communicator.moments(names[0], mean, var, share)
                else:
                    prefetched[names[1]] = found[2]
                    if counter is not None:
                        counter.found += Launches(_ROWS_OF_A_PAIR * sum(rows is not None for rows in found[2]))
            elif method == "halo":
                name, x, above, below = args
                communicator.halo(name, rooms.pop(name, x), above, below, prefetched.pop(name, None))
            elif method == "room_for":
                rooms[args[0]] = communicator.room_for(*args)
            else:
                getattr(communicator, method)(*args)
    log.request += 1


# ---- U-Nets ----------------------------------------------------------------------------------------------------------


def _unet_pass(
    job: Job,
    degrees: ParallelDegrees,
    place: int,
    watch: BlockWatch | None,
    counter: LaunchCounter | None,
    calls_blocks: bool,
) -> Pass:
    job.cast_network()  # once an image, so nothing that a step launches
    messages: list[Message] = []
    communicator = RecordingCommunicator(degrees, place)
    session = DryRunSession(communicator, calls_blocks)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        messages.extend(_ulysses_messages(query, key, value, degrees.ulysses))
        if degrees.patches > 1:
            communicator.gather(session.layer, *(_over_heads(part, degrees.ulysses) for part in (key, value)))
        if counter is not None:
            counter.found += Launches(1)
        if watch is None:
            return query
        tokens = degrees.rows * key.shape[2] if session.kept_keys is None else len(session.kept_keys)
        everybody = key.new_empty(*key.shape[:2], tokens, key.shape[3])
        return functional.scaled_dot_product_attention(query, everybody, everybody)

    groups, controls = unet_groups(degrees, place), ControlCalls()
    patched: list[PatchedNetwork] = [PatchedUNet(session, job.network.module, groups, attend, controls)]
    for name, control in job.network.controls.items():
        patched.append(PatchedControlNet(session, control, groups, attend, controls, name))
    try:
        for network in patched:
            network.prepare()
        with torch.no_grad(), nullcontext() if counter is None else as_on_cuda(counter):
            residuals = call_controls(job)
            with nullcontext() if watch is None else watch.over(communicator.requests, messages):
                call_network(job, residuals)
        texts = sum(len(network.text_cache) for network in patched)
    finally:
        for network in patched:
            network.release()
    if counter is None:
        return Pass(communicator.requests, messages)
    # The recorder answers every norm with rows; a replay adds those of the norms that are given some in its step.
    once = _PROJECTIONS * texts + _ROWS_OF_A_PAIR * communicator.neighbours_rows
    return Pass(communicator.requests, messages, counter.found.count - once)


# ---- DiTs ------------------------------------------------------------------------------------------------------------


def _dit_pass(job: Job, degrees: ParallelDegrees, place: int, watch: BlockWatch | None, counts_launches: bool) -> Pass:
    requests: list[Request] = []
    messages: list[Message] = []
    batch = job.batch_of_rank(degrees)
    layers = attention_layers(job.network, job.height, job.width, degrees.cut, job.text)
    for number, layer in enumerate(layers):
        with nullcontext() if watch is None else watch.inside(watch.number_of(layer.path), requests, messages):
            requests += _attention_requests(job, degrees, layer, number, messages, batch)
    joined = _output_messages(job, degrees, batch)
    if degrees.cfg > 1:
        shown = torch.empty(joined[-1].nbytes, dtype=torch.uint8, device=META)
        requests.append(("count", (shown, "guidance")))
    # The network launches as much on fewer tokens; of ranks that share none, xDiT leaves text and image joined.
    joins = _JOINS * len(layers) if degrees.rows > 1 and architecture_of(job.network.module).text != "none" else 0
    launches = launches_of_network(job).count + joins if counts_launches else 0
    return Pass(requests, messages + joined, launches)


def _attention_requests(
    job: Job, degrees: ParallelDegrees, layer: Layer, number: int, messages: list[Message], batch: int
) -> Iterator[Request]:
    """Yield one attention layer's requests: the tokens of a patch are those of as many ranks as share its heads."""
    degree, layout = degrees.ulysses, layer.layout
    if layer.heads % degree:
        raise ValueError(f"--ulysses_degree {degree} cannot share out {layer.heads} attention heads")
    own = torch.empty(batch, layer.heads, layer.tokens, layer.width // layer.heads, dtype=job.dtype, device=META)
    messages.extend(_ulysses_messages(own, own, own, degree))
    if degrees.patches > 1:
        latent = None
        if layout.rows:
            rows, cols = layout.rows * layout.pixels, layout.cols * layout.pixels
            channels = job.network.module.config.in_channels
            latent = torch.empty(batch, channels, rows, cols, dtype=job.dtype, device=META)
        chunked = TokenLayout(layout.rows, layout.cols, layout.pixels, layout.text, degree)
        yield "observe", (latent, chunked)
        # Two tensors, as keys and values are: what launches move is counted for each tensor once.
        yield "gather", (f"layer {number}", _over_heads(own, degree), _over_heads(own, degree))


def _output_messages(job: Job, degrees: ParallelDegrees, batch: int) -> list[Message]:
    """Return what xDiT joins after a DiT's pass: of packed tokens every rank needs all; and the passes of guidance."""
    rows, cols = job.latent
    ranks = degrees.rows
    packed = not architecture_of(job.network.module).rows
    # A packed token's channels are those of its latent pixels.
    places = max(degrees.cut.sizes(rows * cols // job.network.patch**2)) if packed else rows * cols // ranks
    share = batch * places * job.network.module.config.in_channels * job.dtype.itemsize
    found = [_foreign("output", "all-gather", share, ranks)] if packed and ranks > 1 else []
    whole = share * (ranks if packed else 1)
    return found + ([_foreign("output", "all-gather", whole, degrees.cfg)] if degrees.cfg > 1 else [])


# ---- xDiT's own messages ---------------------------------------------------------------------------------------------


def _over_heads(part: torch.Tensor, degree: int) -> torch.Tensor:
    """Return what Ulysses makes of [B, heads, S, d]: fewer heads of more tokens."""
    batch, heads, tokens, width = part.shape
    return part.new_empty(batch, heads // degree, tokens * degree, width)


def _ulysses_messages(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, degree: int) -> list[Message]:
    """Return those of queries, keys and values there, and of the output, which is like the queries, back."""
    sent = (query, key, value, query) if degree > 1 else ()
    return [_foreign("ulysses", "all-to-all", part.nbytes, degree) for part in sent]


def _foreign(kind: str, pattern: Pattern, nbytes: int, ranks: int) -> Message:
    """Return a message that xDiT sends and waits for."""
    return Message(kind, pattern, nbytes, ranks, FOREIGN, awaited=True)
