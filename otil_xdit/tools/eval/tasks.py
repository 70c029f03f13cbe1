"""What the ranks of an evaluation do: make whatever image they are asked for.

References are plain diffusers, each rank on its own; variants are made by all ranks together.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import otil_xdit
from otil_xdit.catalog.folders import device, load_pipe
from otil_xdit.runtime.network_hooks import networks_of
from otil_xdit.tools.common.variants import parse_variant
from otil_xdit.tools.common.worker import Answer
from otil_xdit.tools.eval.equivalents import parse_equivalent


@dataclass(frozen=True)
class PipelineSpec:
    """What a pipeline is loaded for; it is kept as long as the same is asked for.

    Attributes:
        folder: of the model, in diffusers format.
        sampler: its name; `otil_xdit.catalog.folders.OWN` for the model's.
        steps: denoising steps of an image.
        lora: a file of LoRA weights, or None.
        variant: its text, or None for plain diffusers in one process.
        equivalent: text of what the network is changed to, or None for the model as it is.
        cfg_parallel: whether the passes with and without the prompt are on different halves of the ranks.
        dtype: of the weights.
    """

    folder: str
    sampler: str
    steps: int
    lora: str | None
    variant: str | None
    equivalent: str | None = None
    cfg_parallel: bool = False
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Question:
    """One image, or one clip.

    Attributes:
        pipeline: that draws it.
        prompt, seed, guidance: what of.
        size: height and width in pixels.
        frames: of a clip; 0 for an image.
    """

    pipeline: PipelineSpec
    prompt: str
    seed: int
    guidance: float
    size: int
    frames: int = 0


class PipelineTask:
    """Ranks that make images of one pipeline after the other."""

    def load(self) -> Callable[[Question | None], Answer]:
        """Return what answers a question with an image, where this rank has it."""
        return _Pipelines().answer


class _Pipelines:
    """The pipeline that was asked for last."""

    def __init__(self) -> None:
        self._spec: PipelineSpec | None = None
        self._pipe: Any = None
        self._session: Any = None

    def answer(self, question: Question | None) -> Answer:
        """Return ``image`` in float32, ``report`` and ``seconds`` as `DrawnImage` has them.

        Of a variant the last rank gives them, which has every pipeline's image; the others give nothing, as does a rank
        that is asked for nothing.
        """
        if question is None:
            return {}
        if question.pipeline != self._spec:
            self._load(question.pipeline)
        image, seconds = self._call(question)
        if self._session is not None and int(os.environ["RANK"]) != int(os.environ["WORLD_SIZE"]) - 1:
            return {}
        assert image is not None, "one process, and the last rank, have the image of every pipeline"
        report = None if self._session is None else self._session.report().to_dict()
        return {"image": image.numpy(), "report": report, "seconds": seconds}

    def _load(self, spec: PipelineSpec) -> None:
        from otil_xdit.xdit.plugin.sessions import session_of

        if self._session is not None:
            self._session.detach()
        self._spec = self._pipe = self._session = None
        if spec.variant is not None:
            otil_xdit.register()
        pipe = load_pipe(spec.folder, spec.sampler, spec.lora, spec.dtype)
        if spec.equivalent is not None:
            for network in networks_of(pipe).values():
                parse_equivalent(spec.equivalent).apply(network)
        if spec.variant is not None:
            strategy = parse_variant(spec.variant).strategy
            pipe = otil_xdit.parallelize(pipe, strategy, use_cfg_parallel=spec.cfg_parallel)
            pipe.set_progress_bar_config(disable=True)
            self._session = session_of(pipe)
            assert self._session is not None, "parallelize attaches a session on more than one rank"
        self._spec, self._pipe = spec, pipe

    def _call(self, question: Question) -> tuple[torch.Tensor | None, float]:
        """Return an image, None on a rank without it, and the seconds that it took."""
        started = time.perf_counter()
        clip = {"num_frames": question.frames} if question.frames else {}
        output = self._pipe(
            question.prompt,
            height=question.size,
            width=question.size,
            num_inference_steps=question.pipeline.steps,
            guidance_scale=question.guidance,
            # On the CPU, so that the noise is the same on every machine.
            generator=torch.Generator().manual_seed(question.seed),
            output_type="pt",
            **clip,
        )
        image = None if output is None else (output.frames if clip else output.images)[0].float().cpu()
        if device().type == "cuda":
            torch.cuda.synchronize()
        return image, time.perf_counter() - started
