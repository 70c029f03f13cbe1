"""A pipeline's VAE on two real ranks: shared by default, exact, and left alone where the ranks do not call it alike."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.support.torchrun import lines_of


@cache
def found() -> list[dict[str, Any]]:
    """What each rank has found."""
    (line,) = lines_of(2, "vae_sharing.py")
    return line["ranks"]


@pytest.mark.parametrize("how", ["patches", "whole", "encoded"])
def test_images_are_those_of_one_process(how: str) -> None:
    assert max(line["error"][how] for line in found()) <= 1e-4


def test_what_is_sent_is_counted_and_whole_sends_nothing() -> None:
    for line in found():
        assert line["sent"]["patches"]["steady"] > 10_000 and line["sent"]["whole"] is None
        assert "vae" not in line["whole"]["patches"] and "vae" in line["whole"]["whole"]


@pytest.mark.parametrize("name", ["wan", "hunyuan-video", "hunyuanvideo-1.5"])
def test_clips_are_those_of_one_process(name: str) -> None:
    for line in found():
        clip = line["clips"][name]
        assert clip["error"] <= 1e-4 * clip["deviation"] and clip["sent"]["steady"] > 10_000


def test_a_clip_s_last_rank_decodes_with_all_others_in_several_calls() -> None:
    first, last = (line["clips"]["cogvideox"] for line in found())
    assert first["error"] is None and last["error"] <= 1e-4 * last["deviation"]
    assert min(line["sent"]["steady"] for line in (first, last)) > 10_000


def test_a_preview_on_one_rank_does_not_wait_for_the_others() -> None:
    first, second = found()
    assert (first["previews"], second["previews"]) == (4, 0)
    assert max(line["with_previews"] for line in found()) <= 1e-4


def test_a_rank_that_wants_latents_keeps_nobody_waiting() -> None:
    first, second = found()
    assert first["one_decodes"] == [3, None] and second["one_decodes"] == [4, None]


def test_a_dit_s_last_rank_decodes_with_all_others() -> None:
    first, last = (line["dit"] for line in found())
    for vae in ("patches", "whole"):
        assert first[vae]["error"] is None and last[vae]["error"] <= 1e-4
    for line in (first, last):
        assert line["patches"]["sent"]["steady"] > 10_000 and line["whole"]["sent"] is None
        assert "vae" not in line["patches"]["whole"] and "vae" in line["whole"]["whole"] and line["left"] == 0


def test_a_dit_s_callbacks_see_the_latent_and_do_not_keep_the_others_waiting() -> None:
    """The last rank decodes alone, and its callback's calls of the VAE are its own; at the end all ranks meet."""
    first, last = (line["dit"] for line in found())
    for vae in ("patches", "whole"):
        for callback in ("previewed", "halved"):
            assert first[vae][callback] is None and last[vae][callback] <= 1e-4


def test_a_dit_with_one_patch_is_refused() -> None:
    """It would run as xDiT's wrapper alone has it, whose calls nobody checks."""
    for line in found():
        assert "ulysses_degree is 2 for 2 processes, which leaves one patch" in line["dit"]["one patch"]


def test_tiles_are_each_rank_s_own_and_nothing_is_left_behind() -> None:
    assert all(line["tiled"] is None and line["left"] == 0 for line in found())
