"""`LoraShelf`: LoRA by name, read once, switched between images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from otil_xdit.serve.requests import LoraChoice


class LoraShelf:
    """The LoRAs of one pipeline.

    All of them stay loaded once they have been asked for; an image uses those that it names. Without any, the layers
    that PEFT has wrapped call what they wrap and nothing else.

    Args:
        pipe: a U-Net's.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._adapters: dict[str, str] = {}
        self._active: tuple[LoraChoice, ...] = ()

    def switch_to(self, loras: Sequence[LoraChoice]) -> None:
        """Apply these LoRAs, and no others, to the images that follow.

        Raises:
            ValueError: for a file that cannot be read, or does not fit the networks; those before stay applied.
        """
        wanted = tuple(loras)
        if wanted == self._active:
            return
        for lora in wanted:
            self._load(lora)
        if not wanted:
            self._pipe.disable_lora()
        else:
            if not self._active:
                self._pipe.enable_lora()
            self._pipe.set_adapters([self._adapters[lora.name] for lora in wanted], [lora.weight for lora in wanted])
        self._active = wanted

    def _load(self, lora: LoraChoice) -> None:
        if lora.name in self._adapters:
            return
        name = f"lora_{len(self._adapters)}"  # PEFT makes module names of it, which take no dots
        try:
            self._pipe.load_lora_weights(lora.path, adapter_name=name)
        except Exception as error:  # whatever diffusers, PEFT, safetensors and torch raise for a wrong file
            raise ValueError(f"lora: {lora.name} cannot be applied ({' '.join(str(error).split())[:200]})") from error
        self._adapters[lora.name] = name
