"""How the calls of xDiT's wrappers differ from those of the diffusers pipelines that they wrap.

Read off xfuser 0.7.0, argument by argument, and measured (`tests/workers/wrapped_calls.py`). What is not exact is
refused by name; a wrapper that is not listed has the whole latent on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from otil_xdit.runtime.callbacks import STEP_END


@dataclass(frozen=True)
class WrappedCall:
    """The calls of one wrapper; see `otil_xdit.runtime.session.CallRules`.

    Attributes:
        latent_dim: the dimension along which it cuts the latent before the first step; None where it does not.
        guidance: which calls must be guided: it has two passes in its loop whatever `guidance_scale` says, or drops the
            prediction without guidance; or that none of an undistilled model may be, as it has no second pass.
        shows_latent: whether it can give a callback the latent; Flux.2's asks for `locals()` inside a comprehension.
        wrong: arguments that it gets wrong unless they are as by default, and how.
        wrong_output: an ``output_type`` that it gets wrong; empty for none.
        decodes_last: whether the last rank alone decodes the latent, after the last step.
    """

    latent_dim: int | None = None
    guidance: Literal["", "two prompts", "always", "distilled only"] = ""
    wrong: tuple[tuple[str, str], ...] = ()
    shows_latent: bool = True
    wrong_output: str = ""
    decodes_last: bool = True

    def check(self, pipe: Any, arguments: Mapping[str, Any]) -> None:
        """Refuse arguments that the wrapper does not treat as diffusers does.

        Raises:
            ValueError: naming the argument.
        """
        inner = type(vars(pipe).get("module", pipe)).__name__
        scale = arguments.get("guidance_scale")
        if self.guidance == "distilled only":
            if isinstance(scale, (int, float)) and scale > 1 and not pipe.config.is_distilled:
                raise ValueError(
                    f"guidance_scale is {scale:g}, and xDiT's wrapper of {inner} leaves out the pass without the "
                    "prompt; give 1 or less, or run on one rank"
                )
        elif self.guidance and isinstance(scale, (int, float)) and not scale > 1:
            if self.guidance == "always" or _prompts(arguments) > 1:
                several = "" if self.guidance == "always" else " where there are several"
                raise ValueError(
                    f"guidance_scale is {scale:g}, which is no guidance, and without it xDiT's wrapper of {inner} "
                    f"makes wrong images or none{several}; give a guidance_scale above 1, or run on one rank"
                )
        for name, how in self.wrong:
            if arguments.get(name) not in (None, 0.0):
                raise ValueError(f"xDiT's wrapper of {inner} {how}; leave {name} out, or run on one rank")
        if self.wrong_output and arguments.get("output_type") == self.wrong_output:
            raise ValueError(
                f"output_type is {self.wrong_output!r}, of which xDiT's wrapper of {inner} makes something else than "
                "diffusers; give another one, or run on one rank"
            )
        if self.latent_dim == 1:
            _check_token_rows(pipe, arguments.get("height"), inner)
        self._check_callback_tensors(arguments, inner)

    def _check_callback_tensors(self, arguments: Mapping[str, Any], inner: str) -> None:
        """Refuse a callback that wants tensors which the wrapper has shared out."""
        callback = arguments.get(STEP_END)
        names = getattr(callback, "tensor_inputs", arguments.get(f"{STEP_END}_tensor_inputs")) or ()
        others = [name for name in names if name != "latents"]
        if callback is not None and others:
            raise ValueError(
                f"{STEP_END} wants {', '.join(others)}, of which xDiT's wrapper of {inner} has this rank's part; ask "
                "for latents only, or run on one rank"
            )


def _check_token_rows(pipe: Any, height: int | None, inner: str) -> None:
    """Refuse a height whose rows of tokens the ranks do not divide: their parts would have different lengths."""
    ranks, side = pipe.engine_config.parallel_config.sp_degree, 2 * pipe.vae_scale_factor
    height = height or pipe.default_sample_size * pipe.vae_scale_factor
    if height // side % ranks:
        raise ValueError(
            f"height is {height}, and xDiT's wrapper of {inner} shares {height // side} rows of tokens among {ranks} "
            f"ranks; give a multiple of {side * ranks}, or use the command line, which takes any"
        )


_RESCALE = ("guidance_rescale", "takes the deviation of guidance_rescale over this rank's rows")
_IMAGE = ("image", "shares the tokens of image out wrongly")
_ATTENTION = ("attention_kwargs", "does not take attention_kwargs")

WRAPPED_CALLS = {
    "xFuserStableDiffusion3Pipeline": WrappedCall(-2, "two prompts"),
    "xFuserPixArtAlphaPipeline": WrappedCall(-2, "always"),
    "xFuserPixArtSigmaPipeline": WrappedCall(-2, "always"),
    "xFuserHunyuanDiTPipeline": WrappedCall(-2, "always", (_RESCALE,)),
    "xFuserCogVideoXPipeline": WrappedCall(-2, "always"),
    "xFuserConsisIDPipeline": WrappedCall(-2, "always"),
    "xFuserFluxPipeline": WrappedCall(1),
    "xFuserPipelineFluxControlPipeline": WrappedCall(1),
    "xFuserFlux2KleinPipeline": WrappedCall(
        1, "distilled only", (_IMAGE, _ATTENTION), shows_latent=False, wrong_output="latent"
    ),
    "xFuserFlux2PipelineBase": WrappedCall(1, wrong=(_IMAGE, _ATTENTION), shows_latent=False),
    "xFuserStableDiffusionXLPipeline": WrappedCall(decodes_last=False),
}
"""By the wrapper's class in xfuser, or a base of it."""


def rules_of(wrapper: Any) -> WrappedCall:
    """Return what is known of a wrapper's calls."""
    names = [kind.__name__ for kind in type(wrapper).__mro__]
    return next((WRAPPED_CALLS[name] for name in names if name in WRAPPED_CALLS), WrappedCall())


def _prompts(arguments: Mapping[str, Any]) -> int:
    """Return how many images a call makes."""
    prompt, embeds = arguments.get("prompt"), arguments.get("prompt_embeds")
    prompts = len(prompt) if isinstance(prompt, list) else 1 if embeds is None else embeds.shape[0]
    return int(prompts * (arguments.get("num_images_per_prompt") or 1))
