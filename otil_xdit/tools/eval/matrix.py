"""What `otil-xdit eval` makes, as frozen data, and the parsing of it; all is checked before any process starts.

A case is one row of the table: a model, a sampler with its steps, a variant and a number of ranks; each case makes the
same images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch

from otil_xdit.catalog.folders import OWN, Model
from otil_xdit.catalog.schedulers import SCHEDULERS
from otil_xdit.tools.common.variants import Variant, check_guidance
from otil_xdit.tools.eval.equivalents import Equivalent, parse_equivalent

PROMPTS = Path(__file__).with_name("prompts.txt")
"""One prompt a line, of the kind that the shipped models were trained on."""

VIDEO_PROMPTS = PROMPTS.with_name("video_prompts.txt")
"""The same for clips: one shape and where it goes."""

REORDERED = parse_equivalent("reordered:0")
"""The change of a network whose image is at the noise floor: nothing but the order of sums is another."""


@dataclass(frozen=True)
class Sampler:
    """A scheduler by its name here, and the number of steps."""

    name: str
    steps: int

    def __str__(self) -> str:
        return f"{self.name}:{self.steps}"


@dataclass(frozen=True)
class Call:
    """One image."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Case:
    """One row: the images of a variant; of plain diffusers in one process where the variant is None.

    Attributes:
        ranks: that share an image; of one process, those of the rows that it stands among.
        equivalent: what the network is changed to; None for the model as it is.
        cfg_parallel: whether the passes with and without the prompt are on different halves of the ranks.
    """

    model: Model
    sampler: Sampler
    variant: Variant | None = None
    ranks: int = 1
    equivalent: Equivalent | None = None
    cfg_parallel: bool = False

    @property
    def reference(self) -> Case:
        """One process's case that it is compared with: of the model as it is, whose equivalents draw the same."""
        return Case(self.model, self.sampler)

    @property
    def patches(self) -> int:
        """How many the image is cut into."""
        return 1 if self.variant is None else self.variant.patches(self.ranks, self.cfg_parallel)

    def __str__(self) -> str:
        halves = " in two halves" if self.cfg_parallel else ""
        name = "one process" if self.variant is None else f"{self.variant.text} on {self.ranks} ranks{halves}"
        changed = "" if self.equivalent is None else f" {self.equivalent.text}"
        return f"{self.model.label}{changed}, {self.sampler}, {name}"


@dataclass(frozen=True)
class Matrix:
    """Everything that is to be made.

    Attributes:
        models, variants, ranks, samplers: their product is the cases; a DiT takes its own sampler only.
        calls: the images of each case.
        guidance: guidance scale.
        size: height and width in pixels.
        frames: of a clip; one, and as many for each latent frame after the first.
        lora: a file of LoRA weights, or None.
        equivalents: what each model's network is changed to in turn; None for the model as it is.
        cfg_parallel: whether the passes with and without the prompt are on different halves of the ranks.
        dtype: of the weights and of all that is computed with them.

    Raises:
        ValueError: for a combination that cannot run, naming the flag and what would be accepted.
    """

    models: tuple[Model, ...]
    variants: tuple[Variant, ...]
    ranks: tuple[int, ...]
    samplers: tuple[Sampler, ...]
    calls: tuple[Call, ...]
    guidance: float = 4.0
    size: int = 128
    frames: int = 9
    lora: str | None = None
    equivalents: tuple[Equivalent | None, ...] = (None,)
    cfg_parallel: bool = False
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for model in self.models:
            if not self.samplers_of(model):
                given = " ".join(map(str, self.samplers))
                raise ValueError(f"--samplers {given}: {model.name} is a DiT and has its own only; add {OWN}:STEPS")
            check_guidance(model, self.guidance)
            for ranks, variant, sampler in product(self.ranks, self.variants, self.samplers_of(model)):
                variant.check_image(model, self.size, ranks, sampler.steps, self.guidance, self.cfg_parallel)
        self._check_clips()
        if self.cfg_parallel and self.guidance <= 1:
            raise ValueError(
                f"--guidance {self.guidance:g}: --use_cfg_parallel has a half of the ranks for the pass without the "
                "prompt, which only guidance needs; give more than 1"
            )
        if self.lora is not None and len(self.models) > 1:
            names = " ".join(model.name for model in self.models)
            raise ValueError(f"--lora fits one architecture, and --models {names} are several; give one model")

    def _check_clips(self) -> None:
        videos = [model for model in self.models if model.frames]
        if videos and len(videos) < len(self.models):
            names = " ".join(model.name for model in self.models)
            raise ValueError(f"--models {names}: {videos[0].name} draws clips and others images; give them apart")
        for model in videos:
            if self.frames < 1 or self.frames % model.frames != 1 % model.frames:
                raise ValueError(
                    f"--frames {self.frames}: {model.name} has one frame and {model.frames} for each latent frame "
                    f"after it; give 1, {1 + model.frames}, {1 + 2 * model.frames}, ..."
                )
            halves = [variant.text for variant in self.variants if variant.requires_cfg_parallel]
            if self.cfg_parallel or halves:
                given = "--use_cfg_parallel" if self.cfg_parallel else f"--presets {halves[0]}"
                raise ValueError(f"{given}: xDiT has no CFG parallelism for {model.name}; leave it out")
            if any(self.equivalents):
                raise ValueError(
                    f"--variant {next(filter(None, self.equivalents)).text}: equivalents of {model.name} are not known "
                    "here; leave it out"
                )

    def samplers_of(self, model: Model) -> tuple[Sampler, ...]:
        """Return those of the samplers that a model takes."""
        return tuple(sampler for sampler in self.samplers if model.is_unet or sampler.name == OWN)

    @property
    def references(self) -> tuple[Case, ...]:
        """The cases of one process."""
        return tuple(Case(model, sampler) for model in self.models for sampler in self.samplers_of(model))

    def floors(self, ranks: int) -> tuple[Case, ...]:
        """Return the cases of one process that differ from the references in the order of sums only.

        In float32 their images are one process's to a hundred decibels, so there are none.
        """
        if self.dtype == torch.float32:
            return ()
        return tuple(replace(reference, ranks=ranks, equivalent=REORDERED) for reference in self.references)

    def cases(self, ranks: int) -> tuple[Case, ...]:
        """Return all variants of every model, equivalent and sampler on `ranks` ranks."""
        return tuple(
            replace(reference, variant=variant, ranks=ranks, equivalent=equivalent, cfg_parallel=self.cfg_parallel)
            for reference, equivalent, variant in product(self.references, self.equivalents, self.variants)
        )


def parse_sampler(text: str) -> Sampler:
    """Parse a sampler from ``NAME:STEPS``.

    Raises:
        ValueError: naming what is accepted.
    """
    name, _, steps = text.partition(":")
    if name not in (OWN, *SCHEDULERS):
        raise ValueError(f"--samplers {text}: {name!r} is not a sampler; choose from {', '.join((OWN, *SCHEDULERS))}")
    if not steps.isdecimal() or int(steps) < 1:
        raise ValueError(f"--samplers {text}: give the number of steps after a colon, say {name}:15")
    return Sampler(name, int(steps))


def read_prompts(file: Path = PROMPTS) -> list[str]:
    """Return the prompts of a file, one a line; by default those that ship.

    Raises:
        ValueError: for a file that cannot be read.
    """
    try:
        text = file.read_text()
    except OSError as error:
        raise ValueError(f"--prompt_file {file}: {error.strerror}; give a text file, a prompt a line") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def make_calls(prompts: Sequence[str], count: int, seeds: int) -> tuple[Call, ...]:
    """Return every seed of the first `count` prompts.

    Raises:
        ValueError: for more prompts than there are, or a number below 1.
    """
    if not 1 <= count <= len(prompts):
        raise ValueError(
            f"--prompts {count}: there are {len(prompts)}; give 1 to {len(prompts)}, or --prompt_file FILE"
        )
    if seeds < 1:
        raise ValueError(f"--seeds {seeds}: give a whole number from 1 up")
    return tuple(Call(prompt, seed) for prompt in prompts[:count] for seed in range(seeds))
