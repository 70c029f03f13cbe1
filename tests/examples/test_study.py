"""The selection study: AUC, regions in latent and image, predictions of the clean latent, and the whole command."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path

import pytest
import selection as selection_study
import study
import torch
import trajectories
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from report import tables
from selection import Measurement, Row, Settings, cells, changes, largest, regions, roc_auc
from torch.nn import functional
from trajectories import SAMPLERS, Trajectory

from otil_xdit.catalog.schedulers import make_scheduler


def auc_by_pairs(scores: list[float], positive: list[bool]) -> float:
    ups = [score for score, is_positive in zip(scores, positive, strict=True) if is_positive]
    downs = [score for score, is_positive in zip(scores, positive, strict=True) if not is_positive]
    won = [1.0 if up > down else 0.5 if up == down else 0.0 for up, down in product(ups, downs)]
    return sum(won) / len(won)


@pytest.mark.parametrize("values", [3, 1000])
def test_auc_is_the_share_of_pairs_in_the_right_order(values: int) -> None:
    """With three values nearly all pairs are ties."""
    generator = torch.Generator().manual_seed(values)
    scores = torch.randint(values, (5, 7, 20), generator=generator).float()
    positive = torch.rand(5, 7, 20, generator=generator) < 0.3
    positive[..., 0], positive[..., 1] = True, False
    found = roc_auc(scores, positive)
    for index in product(range(5), range(7)):
        assert found[index].item() == pytest.approx(auc_by_pairs(scores[index].tolist(), positive[index].tolist()))


def test_auc_of_a_perfect_an_opposite_and_a_constant_score() -> None:
    positive = torch.tensor([True, True, False, False])
    scores = torch.tensor([[4.0, 3, 2, 1], [1.0, 2, 3, 4], [7.0, 7, 7, 7]])
    assert roc_auc(scores, positive.expand(3, 4)).tolist() == [1.0, 0.0, 0.5]


def test_the_largest_are_marked_and_of_equals_the_first() -> None:
    marked = largest(torch.tensor([[1.0, 5, 3, 5], [2.0, 2, 2, 2]]), 2)
    assert marked.tolist() == [[False, True, False, True], [True, True, False, False]]


@pytest.mark.parametrize(("rows", "cols", "block"), [(8, 12, 4), (10, 7, 4), (5, 5, 5)])
def test_regions_are_the_same_places_in_latent_and_image(rows: int, cols: int, block: int) -> None:
    """Every pixel is told its latent pixel by enlarging a map of numbers; the second case does not divide."""
    scale = 4
    latent, pixels = regions(rows, cols, block, scale)
    numbers = torch.arange(rows * cols).reshape(1, 1, rows, cols).float()
    enlarged = functional.interpolate(numbers, scale_factor=scale, mode="nearest").flatten().long()
    for places, region in zip(pixels, latent, strict=True):
        expected = region.reshape(block, block).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        assert torch.equal(enlarged[places].reshape(block * scale, block * scale), expected)


def test_changes_compare_each_step_with_the_one_before() -> None:
    maps = torch.zeros(4, 2, 8, 8)
    maps[2:, :, 4:, :4] = 3.0  # the third region, from step 2 on
    found = changes(maps, regions(8, 8, 4, 4)[0], "l2")
    assert found.tolist() == [[0, 0, 0, 0], [0, 0, 2 * 16 * 9, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "own"] + ["flow"])
def test_the_clean_latent_is_found_in_the_prediction(sampler: str) -> None:
    """A latent made of a known clean one and known noise, and a network that predicts it all: both are given back."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=generator)
    if sampler == "flow":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
        scheduler.set_timesteps(9)
        timestep, predicted = scheduler.timesteps[4], noise - clean
        latent = scheduler.scale_noise(clean, timestep[None], noise)
    else:
        scheduler = make_scheduler(sampler, DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False))
        scheduler.set_timesteps(9)
        timestep, predicted = scheduler.timesteps[4], noise
        latent = scheduler.add_noise(clean, noise, timestep[None])
    plain = scheduler.step
    with trajectories.recorded(scheduler) as seen:
        scheduler.step(predicted, timestep, latent, return_dict=False)
    ((called_with, found),) = seen
    torch.testing.assert_close(found, clean, rtol=1e-4, atol=1e-3)
    shrunk = called_with.std() / latent.std()
    assert shrunk < 0.9 if sampler.startswith("euler") else shrunk == 1, "what the network is called with"
    assert scheduler.step == plain


def test_velocities_and_other_predictions() -> None:
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([500])
    latent, velocity = scheduler.add_noise(clean, noise, timestep), scheduler.get_velocity(clean, noise, timestep)
    torch.testing.assert_close(trajectories.clean_latent(scheduler, velocity, timestep, latent), clean)
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="predicts 'flow'"):
        trajectories.clean_latent(scheduler, velocity, timestep, latent)


def trajectory(steps: int = 4, side: int = 16, scale: int = 4) -> Trajectory:
    """Latents of noise, and images that are the clean latents enlarged: their change is the same, place by place."""
    latents, clean = torch.rand(2, steps, 3, side, side, generator=torch.Generator().manual_seed(3))
    return Trajectory(latents, clean, functional.interpolate(clean, scale_factor=scale, mode="nearest"))


def measured(**settings: object) -> dict[tuple[object, ...], Row]:
    measurement = Measurement(Settings(blocks=(4,), ratios=(1 / 4,), **settings), "made-up")
    for _ in range(2):
        measurement.add(trajectory())
    return {(row.metric, row.source, row.truth): row for row in measurement.rows()}


def test_a_image_that_is_its_clean_latent_is_told_perfectly_and_from_noise_not() -> None:
    rows = measured()
    for metric in ("cosine", "l2", "mi"):
        assert rows[metric, "clean", "same"].auc == 1.0, metric
        assert 0.2 < rows[metric, "latent", "same"].auc < 0.8, metric
    # Neighbours are equal within an enlarged pixel, so its bits are the same ones; ties of the ranking cost a little.
    assert rows["dhash", "clean", "same"].auc > 0.9
    assert rows["cosine", "clean", "l2"].auc < 1.0
    row = rows["l2", "clean", "same"]
    assert (row.regions, row.positives, row.images, row.error, len(row.by_step)) == (16, 4, 2, 0.0, 3)


def test_random_is_chance() -> None:
    measurement = Measurement(Settings(blocks=(1,), ratios=(1 / 4,), metrics=("random",)), "made-up")
    measurement.add(trajectory(steps=40))
    assert all(abs(row.auc - 0.5) < 0.02 for row in measurement.rows())


def test_what_does_not_fit_is_left_out_and_said() -> None:
    settings = Settings(blocks=(4, 16, 64), ratios=(1 / 2, 1 / 8), metrics=("l2", "ssim"))
    possible, notes = cells(settings, 32, 32)
    assert possible == [("l2", 4, [1 / 2, 1 / 8]), ("l2", 16, [1 / 2]), ("ssim", 16, [1 / 2])]
    assert notes == [
        "block 4 is left out for ssim, which needs 8",
        "block 16 has only 4 regions; left out: ratio 1/8",
        "block 64 is left out: the latent has 32 x 32",
    ]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--models", "tiny-dit", "huge-dit"], "--models huge-dit: neither a folder.*tiny-sd"),
        (["--sampler", "heun"], "--sampler is 'heun'; choose from own, ddim"),
        (["--steps", "1"], "--steps is 1; give a whole number from 2 up"),
        (["--prompts", "0"], "--prompts is 0; prompts.txt has 1 to 8"),
        (["--prompts", "9"], "--prompts is 9; prompts.txt has 1 to 8"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--size", "130"], "--size is 130; tiny-sd makes multiples of 4"),
        (["--blocks", "64"], "--size 128: nothing can be measured on tiny-sd: block 64"),
        (["--blocks", "0"], r"--blocks is \[0\]"),
        (["--ratios", "1/1"], "--ratios is .*below 1"),
        (["--ratios", "x"], "'x' is not a ratio"),
        (["--metrics", "psnr"], "--metrics psnr: no such metric; choose from cosine, l2, ssim, mi, dhash, random"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_loaded(
    flags: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(selection_study, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as ended:
        study.main(["--out", str(tmp_path), *flags])
    assert ended.value.code == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_model_whose_own_sampler_is_not_known_needs_another(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"scheduler": ["diffusers", "PNDMScheduler"]}))
    with pytest.raises(ValueError, match="its own sampler is PNDMScheduler; give --sampler one of ddim"):
        trajectories.sampler_of(str(tmp_path), "own")
    assert trajectories.sampler_of(str(tmp_path), "dpm-solver") == "DPMSolverMultistepScheduler"
    assert trajectories.sampler_of("tiny-dit", "dpm-solver") == "FlowMatchEulerDiscreteScheduler"


def test_the_table_has_a_line_for_each_metric_and_blanks_for_what_was_not_measured() -> None:
    settings = Settings(models=("tiny-sd",), blocks=(4, 8), ratios=(1 / 4,), metrics=("ssim", "l2"), prompts=1)
    rows = [
        Row("tiny-sd", "ssim", 8, 1 / 4, "latent", "same", 16, 4, 1, 0.25, 0.0, (0.25,)),
        Row("tiny-sd", "l2", 4, 1 / 4, "latent", "same", 64, 16, 1, 0.75, 0.125, (0.75,)),
        Row("tiny-sd", "l2", 8, 1 / 4, "latent", "same", 16, 4, 1, 0.5, 0.0, (0.5,)),
    ]
    lines = tables(settings, rows).splitlines()
    assert "| model | metric | block 4, 1/4 | block 8, 1/4 |" in lines
    assert lines.index("| tiny-sd | l2 | 0.750 | 0.500 |") + 1 == lines.index("| tiny-sd | ssim |  | 0.250 |")
    assert "0.125" in lines[0] and lines[-1] == "- 32 x 32 latent: block 4 is left out for ssim, which needs 8"


def test_the_last_prediction_is_the_image() -> None:
    """The last flow step goes all the way to the prediction, so the pipeline's own image is the same."""
    pipe = trajectories.load("tiny-dit", "dpm-solver")
    seen = trajectories.generate(pipe, "a small red ring on the left, dotted background", 5, 3, 4.0, 64)
    own = pipe(
        "a small red ring on the left, dotted background",
        height=64,
        width=64,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images
    assert seen.latents.shape == seen.clean.shape == (3, 4, 16, 16) and seen.pixels.shape == (3, 3, 64, 64)
    torch.testing.assert_close(seen.pixels[-1:], own, rtol=0, atol=1e-4)


def test_the_whole_study_on_tiny_dit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    flags = "--models tiny-dit --prompts 1 --steps 3 --blocks 4 --ratios 1/4 --metrics l2 random".split()
    assert study.main([*flags, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "tiny-dit: image 1 of 1" in said.err and "| tiny-dit | l2 |" in said.out
    found = json.loads((out / "study.json").read_text())
    rows = {(row["metric"], row["source"], row["truth"]): row for row in found["rows"]}
    assert len(rows) == len(found["rows"]) == 8 and found["settings"]["steps"] == 3
    assert all(row["regions"] == 64 and len(row["by_step"]) == 2 for row in rows.values())
    # The prediction decodes to the image: where it moves, the image moves. Chance would be 0.5.
    assert rows["l2", "clean", "l2"]["auc"] > 0.8
    for name in ("study.png", "study-steps.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert (out / "table.md").read_text() in said.out
