"""A rank's first image, which may be refused for having too few steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from otil_xdit.serve.ranks.loop import Worker


class FakePainter:
    """Makes images of six steps and more."""

    def __init__(self) -> None:
        self.pipe = SimpleNamespace()
        self.steps: list[int] = []

    def draw(self, requests: Any, control: Any, on_latent: Any) -> list[str]:
        self.steps.append(requests[0].steps)
        if requests[0].steps < 6:
            raise ValueError("window_steps is 5; give at most 3")
        return ["image"]


def test_the_first_image_has_as_few_steps_as_the_strategy_takes() -> None:
    painter = FakePainter()
    worker = Worker(cast(Any, painter), None, 0, 1)
    worker.warm_up({"prompt": ["a"], "num_inference_steps": 28})
    assert painter.steps == [4, 28]
    with pytest.raises(ValueError, match="window_steps"):
        worker.warm_up({"prompt": ["a"], "num_inference_steps": 3})
