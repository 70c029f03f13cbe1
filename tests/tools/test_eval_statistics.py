"""`otil-xdit eval --stats`: figures of known tensors, and of every self-attention of a pipeline."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from otil_xdit.tools import main as tools
from otil_xdit.tools.eval.statistics import LayerStatistics, TensorStatistics, Tracked, summary


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def statistics(steps: list[torch.Tensor]) -> TensorStatistics:
    tracked = Tracked()
    for values in steps:
        tracked.add(values)
    return tracked.statistics()


def test_spreads_are_those_of_the_scales() -> None:
    scales = torch.tensor([[1.0, 1.0, 1.0, 8.0], [2.0, 2.0, 2.0, 2.0]])
    values = normal(2, 2, 4096, 4).sign() * scales[None, :, None]  # every channel's size is exactly its scale
    found = statistics([values])
    assert found.channel_spread == pytest.approx(scales.log().std(unbiased=False).item(), rel=1e-5)
    assert found.largest_channel == pytest.approx(4.0) and math.isnan(found.predicted)
    assert found.head_spread == pytest.approx((67 / 4) ** 0.5 / 2)  # 1 + 1 + 1 + 64 over 4; the other head's is 2


def test_what_goes_on_as_before_is_predicted() -> None:
    start, velocity, noise = normal(3, 1, 2, 512, 8)
    steady = statistics([start + step * velocity for step in range(4)])
    assert steady.predicted == pytest.approx(1.0, abs=1e-6)
    moved = [start, start + velocity, start + 2 * velocity + noise]
    once = statistics(moved)
    assert once.predicted == pytest.approx(0.5, abs=0.05), "as much noise as velocity"
    assert once.residual_kurtosis == pytest.approx(3.0, abs=0.2)
    loud = torch.ones(8)
    loud[0] = 30.0
    scaled = statistics([values * loud for values in moved])
    assert scaled.residual_kurtosis > 15 and scaled.channel_kurtosis == pytest.approx(3.0, abs=0.2)


def test_the_table_has_the_median_and_the_largest_layer() -> None:
    figures = [TensorStatistics(*(float(value),) * 6) for value in (1, 2, 9)]
    text = summary([LayerStatistics("a", 4, 2, 8, one, one) for one in figures])
    assert "3 layers" in text and text.count("| 2.00 |") and text.count("9.00") == 12


def test_a_pipeline_is_seen_as_it_is_and_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["eval", "--stats", "tiny-dit", "--size", "64", "--samplers", "own:4", "--out", str(tmp_path)]
    assert tools.main([*run, "--variant", "outliers:32"]) == 0
    assert "### tiny-dit outliers:32" in capsys.readouterr().out
    shipped, changed = json.loads((tmp_path / "stats.json").read_text())
    assert (shipped["network"], changed["network"]) == ("", "outliers:32")
    assert len(shipped["layers"]) == len(changed["layers"]) > 3
    for before, after in zip(shipped["layers"], changed["layers"], strict=True):
        assert before["name"] == after["name"] and before["heads"] * before["size"] > 0
        assert after["values"]["largest_channel"] > 5 * before["values"]["largest_channel"]
        assert 0 <= before["keys"]["predicted"] < 1
