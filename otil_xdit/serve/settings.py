"""The server's own flags; all others are the launcher's."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from otil_xdit.errors import FlagError
from otil_xdit.xdit.flags.parsing import take_values_with_minus

API_KEY_VARIABLE = "XFUSER_SERVE_API_KEY"
"""Environment variable that ``--api_key`` is read from where it is not given: other users see a command line."""


@dataclass(frozen=True)
class ServeSettings:
    """How the server behaves; see `FLAGS` for each.

    Attributes:
        model: as ``--model`` names it.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    api_key: str | None = None
    max_queue: int = 32
    request_timeout: float = 600.0
    max_pixels: int = 4096 * 4096
    max_steps: int = 150
    max_images: int = 10
    max_body: int = 32 << 20
    max_batch: int = 1
    lora_dir: str | None = None
    shutdown_timeout: float = 30.0
    max_restarts: int = 5
    silence_timeout: float = 30.0
    load_timeout: float = 3600.0
    warmup_prompt: str = "a photo"

    @property
    def name(self) -> str:
        """Return the model's name as clients know it."""
        return self.served_model_name or self.model


def _number(low: float, high: float, whole: bool) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            kind = "a whole number" if whole else "a number"
            raise argparse.ArgumentTypeError(f"{text!r}; give {kind} from {low:g} to {high:g}")
        return value

    return parse


def _folder(text: str) -> str:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no such directory")
    return str(Path(text).resolve())


def _text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; give a text")
    return text


_SECONDS = _number(0.1, 1e6, whole=False)

FLAGS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "host": ("ADDRESS", _text, "Address to listen on; 0.0.0.0 for all of this machine's."),
    "port": ("N", _number(0, 65535, whole=True), "Port to listen on; 0 for a free one, which is printed."),
    "served_model_name": ("NAME", _text, "What clients call the model. Default: what --model is."),
    "api_key": ("KEY", _text, f"What clients must send as bearer token. Default: ${API_KEY_VARIABLE}, or none."),
    "max_queue": ("N", _number(0, 100_000, whole=True), "Requests that may wait; more are answered 429."),
    "request_timeout": ("SECONDS", _SECONDS, "What a request may take, waiting included; then its image is cancelled."),
    "max_pixels": ("N", _number(64 * 64, 2**31, whole=True), "Width times height of an image, made or sent, at most."),
    "max_steps": ("N", _number(1, 10_000, whole=True), "Steps of an image at most."),
    "max_images": ("N", _number(1, 1000, whole=True), "Images of one request at most."),
    "max_body": ("BYTES", _number(1024, 2**40, whole=True), "Bytes of a request at most; more are answered 413."),
    "max_batch": ("N", _number(1, 64, whole=True), "Images of alike requests to make in one call of the pipeline."),
    "lora_dir": ("FOLDER", _folder, "Its *.safetensors may be named by requests, without the ending."),
    "shutdown_timeout": ("SECONDS", _SECONDS, "What running and waiting requests have to end after SIGTERM."),
    "max_restarts": (
        "N",
        _number(0, 10_000, whole=True),
        "Restarts of the ranks without an image in between.",
    ),
    "silence_timeout": ("SECONDS", _number(5, 1e6, whole=False), "Silence after which a rank counts as lost."),
    "load_timeout": ("SECONDS", _SECONDS, "What the ranks may take to load the model and warm up."),
    "warmup_prompt": ("TEXT", _text, "Prompt of the image that is made before the first request."),
}
"""Flags of the server: what ``--help`` shows for the value, how it is read, and a line on it."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise FlagError(message)


def parser_of_flags() -> argparse.ArgumentParser:
    """Return a parser of the server's own flags."""
    parser = _Parser(prog="xfuser serve", add_help=False, allow_abbrev=False)
    take_values_with_minus(parser)
    group = parser.add_argument_group("Server options")
    for name, (metavar, parse, text) in FLAGS.items():
        default = getattr(ServeSettings, name)
        told = text if default is None else f"{text} Default: {default}."
        group.add_argument(f"--{name}", metavar=metavar, type=parse, help=told.replace("%", "%%"))
    return parser


def read_settings(arguments: Sequence[str]) -> tuple[ServeSettings, list[str]]:
    """Return the server's settings, and the arguments that are the launcher's.

    Raises:
        FlagError: naming flag, value and what is accepted.
    """
    # A dash inside a flag's name means an underscore, as everywhere in xDiT.
    underscored = [_underscored(argument) for argument in arguments]
    values, others = parser_of_flags().parse_known_args(underscored)
    given = {name: value for name, value in vars(values).items() if value is not None}
    if "api_key" not in given and os.environ.get(API_KEY_VARIABLE):
        given["api_key"] = os.environ[API_KEY_VARIABLE]
    models = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    models.add_argument("--model", default="")
    try:
        model = models.parse_known_args(others)[0].model
    except argparse.ArgumentError as error:
        raise FlagError(str(error)) from error
    return ServeSettings(model=model, **given), others


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"
