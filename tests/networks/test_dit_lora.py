"""LoRA on DiTs that keep their pipeline: loaded before and after `parallelize`, and unloaded, on real ranks."""

from __future__ import annotations

import pytest

from tests.support.torchrun import lines_of

TOLERANCE = 5e-5


@pytest.mark.slow
def test_an_adapter_is_that_of_one_process_whenever_it_is_loaded() -> None:
    lines = lines_of(2, "dit_lora.py", timeout=400)
    assert len(lines) == 5
    for line in lines:
        for found in line["ranks"]:
            assert "stopped" not in found, (line["case"], found)
            assert found["changes"] > 0.05, "the adapter changes nothing that this test sees"
            for moment in ("before", "after", "unloaded", "restored"):
                assert found[moment] <= TOLERANCE, (line["case"], moment)
