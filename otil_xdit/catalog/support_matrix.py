"""What is known of each model under ``--parallel``; `docs/models.md` has the measurements and the reasons.

"exact" means: a tiny network of that architecture with random weights gave the latents of plain diffusers (float32,
gloo, ``--parallel sync``; 2 and 4 patches, 2 x 2 with Ulysses, and 2 x 2 with CFG parallelism where xDiT has it).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

from packaging.version import Version

State = Literal["exact", "refused", "untested"]


@dataclass(frozen=True)
class Support:
    """What is known of some models.

    Attributes:
        models: names in xfuser's registry, without the owner, in lower case; or a pipeline class of xfuser.
        state: what happens under ``--parallel``.
        note: the conditions, or why not.
        from_diffusers: a refusal holds from this version of diffusers on.
    """

    models: tuple[str, ...]
    state: State
    note: str = ""
    from_diffusers: str = "0"


ULYSSES_ONLY = "xDiT cuts it by Ulysses only; use --ulysses_degree"

RUNNERS = (
    Support(("tiny-dit",), "exact", "SD3's architecture; ships with this package"),
    Support(("tiny-sd",), "exact", "SD1.5's architecture; ships with this package"),
    Support(("tiny-sdxl",), "exact", "SDXL's architecture; ships with this package"),
    Support(("sd1.5", "stable-diffusion-v1-5"), "exact"),
    Support(("sd2.1", "stable-diffusion-2-1"), "exact", "--ulysses_degree 5 is the only one that divides its heads"),
    Support(("sdxl", "stable-diffusion-xl-base-1.0"), "exact"),
    Support(("sd3.5", "stable-diffusion-3.5-large"), "exact", "3.5-medium fails in xfuser, with --ulysses_degree too"),
    Support(("flux.1-dev",), "exact", "refused where the ranks do not divide the prompt's tokens"),
    Support(("flux.2-dev",), "exact"),
    Support(("flux.2-klein-4b", "flux.2-klein-9b"), "untested", "FLUX.2-dev's transformer wrapper"),
    Support(("qwen-image", "qwen-image-2512"), "exact", "refused where the ranks do not divide the prompt's tokens"),
    Support(("wan2.1-t2v", "wan2.1-t2v-14b-diffusers"), "exact"),
    Support(("hunyuanvideo",), "exact"),
    Support(
        ("z-image", "z-image-turbo"),
        "refused",
        "xfuser 0.7.0 cannot run Z-Image with diffusers 0.42; use an older diffusers",
        from_diffusers="0.42",
    ),
    Support(("lumina2", "lumina-image-2.0"), "refused", ULYSSES_ONLY),
    Support(("krea-2-raw", "krea-2-turbo"), "refused", ULYSSES_ONLY),
)
"""Models of xfuser's registry; those that are not here are untested."""

PIPELINES = (
    Support(("xFuserPixArtAlphaPipeline", "xFuserPixArtSigmaPipeline"), "exact"),
    Support(("xFuserHunyuanDiTPipeline",), "exact"),
    Support(("xFuserCogVideoXPipeline",), "exact"),
    Support(("xFuserConsisIDPipeline",), "untested", "needs a face encoder"),
    Support(("xFuserSanaPipeline",), "refused", "its linear attention does not use the ring slot"),
    Support(("xFuserLattePipeline",), "refused", "wrong under sequence parallelism in xfuser 0.7.0, Ulysses too"),
)
"""Pipelines that xfuser wraps but has no runner for: a script of one's own, see `examples/xdit_args.py`."""


def support_of(model: str) -> Support:
    """What is known of a model by its name in xfuser's registry."""
    name = model.rsplit("/", 1)[-1].lower()
    return next((known for known in RUNNERS if name in known.models), Support((name,), "untested"))


def refusal(model: str) -> str | None:
    """Why the model does not run under ``--parallel`` with what is installed, or None."""
    known = support_of(model)
    holds = known.state == "refused" and Version(version("diffusers")) >= Version(known.from_diffusers)
    return known.note if holds else None
