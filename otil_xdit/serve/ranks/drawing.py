"""`Painter`: from a request to the call of the pipeline that `xfuser` itself would make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from PIL import Image

from otil_xdit.catalog.geometry import check_geometry
from otil_xdit.catalog.models import find_record, find_unet
from otil_xdit.catalog.numbers import CALL_NUMBERS, check_numbers
from otil_xdit.catalog.schedulers import SCHEDULERS, make_scheduler
from otil_xdit.serve.ranks.loras import LoraShelf
from otil_xdit.serve.ranks.steps import StepControl
from otil_xdit.serve.requests import ImageRequest, ModelFacts, Pixels
from otil_xdit.xdit.flags.degrees import degree
from otil_xdit.xdit.models.editing import EditingPipelines
from otil_xdit.xdit.plugin.args import choice_of


class Painter:
    """A loaded model of xDiT's, for one image after the other; the same calls on every rank.

    Args:
        model: xDiT's, initialized.
        values: the runner's flags by name, with the model's own values for those that were not given.
    """

    def __init__(self, model: Any, values: Mapping[str, Any]) -> None:
        self._model, self._values = model, values
        self._record = find_record(model.config.model)
        self._is_unet = find_unet(model.config.model) is not None
        self._editing = EditingPipelines(model.pipe)
        self._loras = LoraShelf(model.pipe) if self._is_unet else None

    @property
    def pipe(self) -> Any:
        """Return the pipeline of text to image."""
        return self._model.pipe

    def facts(self, ranks: int, parallel: str) -> ModelFacts:
        """Return what the server should know of the model."""
        values = self._values
        inner = vars(self.pipe).get("module", self.pipe)
        return ModelFacts(
            model=self._model.config.model,
            pipeline=_own_name(inner),
            parallel=parallel,
            ranks=ranks,
            width=values.get("width"),
            height=values.get("height"),
            steps=values.get("num_inference_steps"),
            guidance_scale=values.get("guidance_scale"),
            negative_prompt=values.get("negative_prompt"),
            edits=self._editing.kinds,
            schedulers=tuple(SCHEDULERS) if self._is_unet else (),
            scheduler=_own_name(getattr(inner, "scheduler", None)),
            takes_lora=self._is_unet,
            takes_batches=self._is_unet,
        )

    def size_of(self, request: ImageRequest) -> tuple[int | None, int | None]:
        """Return height and width of an image; None for the pipeline's own."""
        values = self._values_of(request)
        return values.get("height"), values.get("width")

    def check(self, request: ImageRequest) -> None:
        """Refuse what this model cannot make, before any rank begins.

        Raises:
            ValueError: naming the argument.
        """
        values = self._values_of(request)
        check_numbers(values, CALL_NUMBERS)
        if request.image is not None and _kind(request) not in self._editing.kinds:
            raise ValueError(f"this server's model, {self._model.config.model}, does not edit images")
        if request.scheduler is not None and not self._is_unet:
            raise ValueError("scheduler: this model keeps its own; leave it out")
        if request.loras and self._loras is None:
            raise ValueError("lora: this model takes none; leave it out")
        flags = {**values, "model": self._model.config.model}
        patches = getattr(choice_of(self._model.config), "patch_degree", degree(values, "ring_degree"))
        try:
            check_geometry(flags, patches, degree(values, "ulysses_degree"), None)
        except ValueError as error:
            raise ValueError(str(error).replace("--", "")) from error
        self._model._validate_args(values)

    def draw(
        self, requests: Sequence[ImageRequest], control: StepControl, on_latent: Callable[..., Any] | None
    ) -> list[Any]:
        """Make images in one call of the pipeline.

        Args:
            requests: one, or several that go with each other.
            control: of the steps.
            on_latent: for ``callback_on_step_end``; None for none.

        Returns:
            The images, of Pillow's; none on a rank that xDiT leaves without.

        Raises:
            Cancelled: by `control`.
            ValueError: for what the pipeline, or the ranks, refuse.
        """
        request, values = requests[0], self._values_of(requests[0])
        extra: dict[str, Any] = {} if on_latent is None else {"callback_on_step_end": on_latent}
        if len(requests) > 1:
            all_values = list(map(self._values_of, requests))
            values |= {name: [one[name] for one in all_values] for name in ("prompt", "negative_prompt")}
            if not any(values["negative_prompt"]):
                values["negative_prompt"] = None
            extra["generator"] = [self._model._make_generator(one["seed"]) for one in all_values]
        with ExitStack() as stack:
            if self._loras is not None:
                self._loras.switch_to(request.loras)
            stack.enter_context(self._scheduler(request.scheduler))
            if request.image is None:
                pipe = self.pipe
            else:
                pipe, extra = self._editing.get(_kind(request)), extra | _images_of(request)
            stack.enter_context(control.of(pipe))
            if request.image is not None and self._is_unet:
                return self._edit(pipe, values, extra)
            stack.enter_context(_calling(self._model, pipe, extra))
            self._model._validate_args(values)
            self._model.prepare_run(values)
            output = self._model._run_pipe(values)
            return list(output.images or ())

    def _edit(self, pipe: Any, values: dict[str, Any], extra: dict[str, Any]) -> list[Any]:
        """Edit with a U-Net: its pipelines do not all take the size, so that xDiT's call of them would not do."""
        pipe.scheduler = self.pipe.scheduler
        if "mask_image" in extra:
            extra = {"height": values["height"], "width": values["width"], **extra}
        output = pipe(
            prompt=values["prompt"],
            num_inference_steps=values["num_inference_steps"],
            guidance_scale=values["guidance_scale"],
            generator=self._model._make_generator(values["seed"]),
            **({"negative_prompt": values["negative_prompt"]} if values["negative_prompt"] else {}),
            **extra,
        )
        return list(output.images)

    def _values_of(self, request: ImageRequest) -> dict[str, Any]:
        """Return the runner's flags for one image."""
        asked = {
            "negative_prompt": request.negative_prompt,
            "width": request.width,
            "height": request.height,
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance_scale,
        }
        given = {name: value for name, value in asked.items() if value is not None}
        return {**self._values, **given, "prompt": request.prompt, "seed": request.seed}

    @contextmanager
    def _scheduler(self, name: str | None) -> Iterator[None]:
        """Let the pipeline sample with another scheduler within."""
        own = self.pipe.scheduler
        if name is not None:
            self.pipe.scheduler = make_scheduler(name, own)
        try:
            yield
        finally:
            self.pipe.scheduler = own


class _CallWith:
    """A pipeline whose call gets some more arguments."""

    def __init__(self, pipe: Any, extra: Mapping[str, Any]) -> None:
        self._pipe, self._extra = pipe, extra

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._pipe(*args, **{**kwargs, **self._extra})


@contextmanager
def _calling(model: Any, pipe: Any, extra: Mapping[str, Any]) -> Iterator[None]:
    """Let xDiT's model call that pipeline, with more arguments, within: its own call knows no callbacks, no images."""
    own = model.pipe
    model.pipe = _CallWith(pipe, extra) if extra else pipe
    try:
        yield
    finally:
        model.pipe = own


def _kind(request: ImageRequest) -> str:
    """Return what an edit starts from, as `EditingPipelines.kinds` has it."""
    return "image" if request.mask is None else "inpaint"


def _images_of(request: ImageRequest) -> dict[str, Any]:
    """Return the arguments of an edit that text to image has not."""
    assert request.image is not None, "it is an edit"
    images: dict[str, Any] = {"image": _image(request.image)}
    if request.mask is not None:
        images["mask_image"] = _image(request.mask)
    if request.strength is not None:
        images["strength"] = request.strength
    return images


def pixels_of(image: Any) -> Pixels:
    """Return an image of Pillow's as bytes."""
    image = image.convert("RGB")
    return Pixels(image.width, image.height, "RGB", image.tobytes())


def _image(pixels: Pixels) -> Image.Image:
    return Image.frombytes(pixels.mode, (pixels.width, pixels.height), pixels.data)


def _own_name(thing: Any) -> str:
    """Return the name of diffusers' class of an object, whose own may be a subclass that the session made."""
    names = [kind.__name__ for kind in type(thing).__mro__ if kind.__module__.startswith("diffusers.")]
    return names[0] if names else type(thing).__name__
