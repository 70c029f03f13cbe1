"""Runner models around U-Nets: ``xfuser --model SDXL``, and ``--model FOLDER`` for those in diffusers' format."""

from __future__ import annotations

import re
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch

from otil_xdit.catalog.bundled import BUNDLED_UNETS, model_folder
from otil_xdit.catalog.folders import dtype_argument
from otil_xdit.catalog.models import find_unet, unet_records
from otil_xdit.catalog.pipelines import check_unet_pipeline
from otil_xdit.catalog.schedulers import make_scheduler
from otil_xdit.catalog.trust import add_trust_args, check_trust
from otil_xdit.catalog.unets import UnetRecord, read_folder
from otil_xdit.catalog.weight_files import check_weights, variant_of
from otil_xdit.errors import FlagError
from otil_xdit.xdit.cpu import has_accelerator
from otil_xdit.xdit.flags.options import add_unet_args

HUB_SECONDS = 10.0
"""How long the hub may take to say that it has a model."""


def register_unet_models() -> None:
    """Add the U-Nets known by name to `MODEL_REGISTRY`, and their flags to the runner's; xfuser must be importable."""
    from xfuser import xFuserArgs

    for record in unet_records():
        register_unet(record)
    add_runner_args = xFuserArgs.add_runner_args

    @wraps(add_runner_args)
    def add(parser: Any) -> Any:
        parser = add_runner_args(parser)
        add_unet_args(parser)
        add_trust_args(parser)
        return parser

    xFuserArgs.add_runner_args = staticmethod(add)


def register_folder(model: str) -> None:
    """Add a folder in diffusers format to `MODEL_REGISTRY` under its path; nothing for names that are there already.

    Raises:
        FlagError: for a folder that holds no text-to-image U-Net.
    """
    from xfuser.model_executor.models.runner_models.base_model import MODEL_REGISTRY

    if model not in MODEL_REGISTRY and Path(model).is_dir():
        register_unet(read_folder(model))


def source_of(model: str, record: UnetRecord) -> str:
    """The folder or repository that ``--model`` loads."""
    if record.source in BUNDLED_UNETS:
        return model_folder(record.source)
    return model if "/" in model else record.source


def check_source(model: str, allow_pickle: bool = False) -> None:
    """Refuse a U-Net that can be neither read from the disk nor fetched, before any rank starts; others pass.

    Raises:
        FlagError: with what the hub, or its cache, says, or the file that is missing or cut off.
    """
    record = find_unet(model)
    if record is None:
        return
    source = source_of(model, record)
    if Path(source).is_dir():
        check_weights(source, allow_pickle)
        return
    if record.source in BUNDLED_UNETS:
        raise FlagError(f"--model {model}: {source} is missing; install otil-xdit again")
    import huggingface_hub

    if isinstance(huggingface_hub.try_to_load_from_cache(source, "model_index.json"), str):
        return
    try:
        huggingface_hub.HfApi().model_info(source, timeout=HUB_SECONDS)
    except Exception as error:  # whatever the hub's HTTP library of this version raises
        raise _not_found(model, source, error) from error


def _not_found(model: str, source: str, error: Exception) -> FlagError:
    reason = " ".join(str(error).split())
    if Path(source).is_dir():
        return FlagError(f"--model {model}: {source} cannot be loaded ({reason[:200]})")
    return FlagError(
        f"--model {model}: {source} is neither in the hub's cache nor can it be fetched; "
        f"give a folder in diffusers format, or download it with `hf download {source}` ({reason[:200]})"
    )


def register_unet(record: UnetRecord) -> None:
    """Add a U-Net to xfuser's `MODEL_REGISTRY` under each of its names; xfuser must be importable."""
    from xfuser.model_executor.models.runner_models.base_model import (
        DefaultInputValues,
        ModelSettings,
        register_model,
    )

    members = {
        "record": record,
        "default_input_values": DefaultInputValues(
            height=record.height,
            width=record.width,
            num_inference_steps=record.steps,
            guidance_scale=record.guidance,
        ),
        "settings": ModelSettings(
            model_name=source_of(record.label, record),
            output_name=re.sub(r"\W+", "_", Path(record.label).resolve().name.lower()),
            model_output_type="image",
            resolution_divisor=8,
        ),
        "__doc__": f"{record.label}: a {record.pipeline} on patches.",
    }
    model = type("UNetModel", (_runner_class(),), members)
    for name in record.names:
        register_model(name)(model)


@cache
def _runner_class() -> Any:
    """What all U-Nets of xDiT's runner have in common, made when xfuser may be imported."""
    from diffusers import DiffusionPipeline
    from xfuser.model_executor.models.runner_models.base_model import DiffusionOutput, ModelCapabilities, xFuserModel

    class UNetModel(xFuserModel):
        """A text-to-image U-Net: the pipeline is diffusers' own, attached in place, and every rank gets its images."""

        record: UnetRecord
        capabilities = ModelCapabilities(
            ulysses_degree=True,
            ring_degree=True,
            data_parallel_degree=True,
            use_cfg_parallel=True,
            use_parallel_vae=True,
            enable_slicing=True,
            enable_tiling=True,
        )

        def _customize_settings(self, config: Any) -> None:
            self.settings.model_name = source_of(config.model, self.record)

        def initialize(self, input_args: dict[str, Any]) -> None:
            self._values = input_args
            super().initialize(input_args)

        def _load_model(self) -> Any:
            dtype = torch.float16 if has_accelerator() else torch.float32
            name, values = self.settings.model_name, self._values
            check_trust(name, type(self), values)
            try:
                pipe = DiffusionPipeline.from_pretrained(
                    name,
                    **dtype_argument(dtype),
                    variant=variant_of(name) if Path(name).is_dir() else None,
                    use_safetensors=None if values.get("allow_pickle") else True,
                    trust_remote_code=bool(values.get("trust_remote_code")),
                )
            except OSError as error:
                raise _not_found(self.config.model, self.settings.model_name, error) from error
            check_unet_pipeline(pipe)
            return pipe

        def _post_load_and_state_initialization(self, input_args: dict[str, Any]) -> None:
            if input_args.get("scheduler") is not None:
                self.pipe.scheduler = make_scheduler(input_args["scheduler"], self.pipe.scheduler)
            super()._post_load_and_state_initialization(input_args)

        def _get_compiled_pipe_components(self) -> list[str]:
            return ["unet"]

        def _validate_args(self, input_args: dict[str, Any]) -> None:
            super()._validate_args(input_args)
            if input_args.get("negative_prompt") and self.record.pipeline.startswith("LatentConsistencyModel"):
                raise FlagError("--negative_prompt: a latent consistency model has no branch for it; leave it out")

        def _run_pipe(self, input_args: dict[str, Any]) -> Any:
            prompt, negative = input_args["prompt"], input_args["negative_prompt"]
            if isinstance(prompt, list) and isinstance(negative, str):
                negative = [negative] * len(prompt)  # diffusers wants as many
            output = self.pipe(
                prompt=prompt,
                height=input_args["height"],
                width=input_args["width"],
                num_inference_steps=input_args["num_inference_steps"],
                guidance_scale=input_args["guidance_scale"],
                generator=self._make_generator(input_args["seed"]),
                **({"negative_prompt": negative} if negative else {}),
            )
            return DiffusionOutput(images=output.images, pipe_args=input_args)

    return UNetModel
