"""U-Nets on the command line: what is refused before anything starts, and what a folder is taken for."""

import copy
import importlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from otil_xdit.catalog.geometry import check_geometry
from otil_xdit.catalog.models import find_unet
from otil_xdit.catalog.schedulers import SCHEDULERS, make_scheduler
from otil_xdit.catalog.unets import UNETS, UnetRecord, heads_of, read_folder
from otil_xdit.errors import FlagError
from otil_xdit.method.grid import LevelGrid
from otil_xdit.xdit.flags.choice import choose
from otil_xdit.xdit.launcher import main as cli
from tests.support.tiny_folder import PIXELS, change_json, save_tiny_sd

pytestmark = pytest.mark.usefixtures("cpu_machine")

WRONG = [
    ("SD1.5 --parallel sync --height 60", "--height 60 is not possible with SD1.5; give a multiple of 8"),
    ("SD1.5 --width 4", "--width 4 is not possible with SD1.5; give a multiple of 8"),
    ("SD1.5 --parallel sync --height 64", "64 cannot be cut into 2 patches: SD1.5 is only 1 high .* at least 72"),
    ("SD1.5 --ring_degree 2 --height 64", "--height 64 cannot be cut into 2 patches"),
    ("tiny-sd --parallel sync --patch_degree 5", "--height 128 cannot be cut into 5 patches.* give at least 136"),
    (
        "tiny-sdxl --parallel otil --patch_degree 8 --otil_block_size 8",
        "--otil_block_size 8 is larger than a patch.* at most 4",
    ),
    ("SD1.5 --parallel sync --ulysses_degree 3", r"--ulysses_degree 3 does not divide .* SD1.5 \(8\); give 1 or 2"),
    ("SD2.1 --ulysses_degree 2", r"--ulysses_degree 2 .* SD2.1 \(5, 10, 20\); give 1 or 5"),
    ("SDXL --parallel sync --patch_degree 1 --ulysses_degree 4", r"SDXL \(10, 20\); give 1 or 2 or 5 or 10"),
    ("SDXL --parallel hybridiff --use_torch_compile", "--parallel hybridiff and --use_torch_compile are not"),
    (
        "SDXL --use_cfg_parallel --enable_sequential_cpu_offload",
        "and --enable_sequential_cpu_offload are not",
    ),
    ("SDXL --parallel otil --patch_degree 2 --patch_shares 3,2,1", "3,2,1: 3 given, and there are 2 patches; give one"),
    (
        "SD3.5 --parallel sync --patch_degree 2 --patch_shares 3,2",
        "3,2 is not possible with --model SD3.5: xDiT's pipe",
    ),
    ("Lumina2 --parallel sync --patch_degree 2 --patch_shares auto", "auto is not possible with --model Lumina2: xDiT"),
    (
        "HunyuanVideo --parallel sync --patch_degree 2 --patch_shares 3,2 --use_torch_compile",
        "3,2 is not possible with --model HunyuanVideo: how many tokens its text has is not known in a graph",
    ),
    *(
        (f"SDXL --parallel otil --patch_degree 2 --patch_shares {shares}", "patch_shares: .*; give .* for each patch")
        for shares in ("3,0", "-3,2", "3,two", "3,,2", "1.5,1", "auto,auto", "2000000,1", "9" * 5000)
    ),
    ("SDXL --parallel otil --patch_degree 2 --patch_shares", r"patch_shares: expected one .*; give N,N,...\|auto"),
    ("SDXL --parallel otil --enable_group_cpu_offload", "--parallel otil and --enable_group_cpu_offload are not"),
    ("SDXL --parallel otil --otil_select latent-l2 --ulysses_degree 2", "choose kv-cosine or kv-l2"),
    ("SDXL --parallel otil --otil_halo old", "--otil_halo is 'old'; choose from fresh, displaced"),
    ("SDXL --pipefusion_parallel_degree 2", "--pipefusion_parallel_degree 2 are not supported together"),
    ("SDXL --scheduler dpm", "'dpm' is not a scheduler; choose from ddim, .*unipc"),
    ("SDXL --data_parallel_degree 2", "--data_parallel_degree 2 needs as many prompts, and 1 given"),
    ("SD1.5 --parallel otil --attention_backend CUDNN", "CUDNN takes float16 or .* SD1.5 has heads of 160; give SDPA"),
    ("FLUX.1-dev --scheduler ddim", "--scheduler ddim is for U-Nets; --model FLUX.1-dev is none"),
]
"""What follows ``--model``, and what is said about it."""


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_wrong_input_is_one_line_before_anything_starts(line: str, message: str, no_start: None) -> None:
    with pytest.raises(FlagError, match=message) as caught:
        cli.plan(["--prompt", "a red circle", "--model", *line.split()], {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "processes"),
    [
        ("SD1.5", "1"),
        ("SD1.5 --use_cfg_parallel --guidance_scale 1", "2"),
        ("SDXL --parallel otil --use_cfg_parallel --patch_degree 2 --scheduler dpm-solver", "4"),
        ("SDXL --parallel sync --ulysses_degree 2 --patch_degree 3 --use_parallel_vae", "6"),
        ("tiny-sd --parallel otil --patch_degree 3 --height 136 --width 72 --otil_halo displaced", "3"),
        ("SDXL --ulysses_degree 2 --ring_degree 2", "4"),
    ],
)
def test_what_may_be_combined(line: str, processes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "check_source", lambda *args: None)
    command = cli.plan(["--prompt", "a red circle", "--model", *line.split()], {}).command
    assert f"--nproc_per_node={processes}" in command


def test_settings_of_unets_are_warned_about_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    flags = {"parallel": "otil", "otil_halo": "displaced", "ring_degree": 2}
    assert choose({"model": "tiny-sd", **flags}, 2) is not None
    assert not caplog.records
    assert choose({"model": "tiny-dit", **flags}, 2) is not None
    assert [record.getMessage() for record in caplog.records] == ["--otil_halo has an effect on U-Nets only"]


def test_a_model_that_cannot_be_fetched_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def offline(self: object, repository: str, timeout: float) -> None:
        asked.append(repository)
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, file: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    with pytest.raises(FlagError, match=r"--model SDXL: stabilityai/stable-diffusion-xl-base-1.0 is neither") as caught:
        cli.plan(["--prompt", "x", "--model", "SDXL"], {})
    assert "\n" not in str(caught.value)
    with pytest.raises(FlagError):
        cli.plan(["--prompt", "x", "--model", "runwayml/stable-diffusion-v1-5"], {})
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, file: "/cache/" + file)
    assert cli.plan(["--prompt", "x", "--model", "SD2.1"], {}).command
    assert asked == ["stabilityai/stable-diffusion-xl-base-1.0", "runwayml/stable-diffusion-v1-5"]


@given(
    record=some.sampled_from(UNETS),
    eighths=some.integers(1, 300),
    patches=some.integers(1, 4),
    ulysses_degree=some.sampled_from([1, 2]),
    block=some.integers(1, 64),
)
def test_what_passes_can_be_cut(
    record: UnetRecord, eighths: int, patches: int, ulysses_degree: int, block: int
) -> None:
    values, ranks = {"model": record.label, "height": 8 * eighths, "width": 512}, patches * ulysses_degree
    try:
        check_geometry(values, patches, ulysses_degree, block)
        accepted = True
    except ValueError:
        accepted = False
    divides = all(heads % ulysses_degree == 0 for heads in record.heads)
    try:
        smallest = min(LevelGrid.build(8 * eighths // record.vae, 512 // record.vae, record.levels, ranks).rows[0])
    except ValueError:
        smallest = 0
    assert accepted == (divides and block <= smallest)


@given(record=some.sampled_from(UNETS), ranks=some.integers(2, 8))
def test_the_height_that_a_refusal_names_is_the_least(record: UnetRecord, ranks: int) -> None:
    with pytest.raises(ValueError, match="give at least") as caught:
        check_geometry({"model": record.label, "height": 8}, ranks, 1, None)
    least = int(str(caught.value).split("at least ")[1].split(",")[0])
    check_geometry({"model": record.label, "height": least}, ranks, 1, None)
    with pytest.raises(ValueError, match="give at least"):
        check_geometry({"model": record.label, "height": least - 8}, ranks, 1, None)


SD_BLOCKS = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
SDXL_BLOCKS = ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("SD1.5", {"down_block_types": SD_BLOCKS, "attention_head_dim": 8}),
        ("SD2.1", {"down_block_types": SD_BLOCKS, "attention_head_dim": [5, 10, 20, 20]}),
        ("SDXL", {"down_block_types": SDXL_BLOCKS, "attention_head_dim": [5, 10, 20]}),
        ("tiny-sdxl", {"down_block_types": SDXL_BLOCKS, "attention_head_dim": 3, "num_attention_heads": [9, 2, 4]}),
    ],
)
def test_heads_are_those_of_levels_with_attention(model: str, config: dict) -> None:
    known = find_unet(model)
    assert known is not None and heads_of(config) == known.heads
    assert known.levels == len(config["down_block_types"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sd(tmp_path_factory.mktemp("pipelines") / "my-sd")


def test_a_folder_says_what_it_holds(folder: Path) -> None:
    record = read_folder(str(folder))
    assert (record.pipeline, record.vae, record.levels, record.heads) == ("StableDiffusionPipeline", 2, 2, (2,))
    assert (record.height, record.width, record.guidance, record.steps) == (PIXELS, PIXELS, 7.5, 30)


def test_a_folder_is_checked_before_anything_starts(folder: Path, no_start: None) -> None:
    run = ["--prompt", "x", "--model", str(folder), "--parallel", "otil", "--patch_degree", "2"]
    assert cli.plan(run, {}).command
    with pytest.raises(FlagError, match="--height 24 cannot be cut into 7 patches.* is only 6 high .* at least 32"):
        cli.plan([*run[:-1], "7", "--height", "24"], {})
    with pytest.raises(FlagError, match=r"--ulysses_degree 3 does not divide .* \(2\); give 1 or 2"):
        cli.plan([*run, "--ulysses_degree", "3"], {})
    with pytest.raises(FlagError, match="--otil_block_size 13 is larger than a patch.* at most 12"):
        cli.plan([*run, "--otil_block_size", "13"], {})


def json_folder(path: Path, pipeline: str, unet: dict | None, network: str = "UNet2DConditionModel") -> str:
    """A folder with its json files, and weights of no tensors; nothing reads more before weights load."""
    for part in ("unet", "vae"):
        (path / part).mkdir(parents=True)
        (path / part / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    index = {"_class_name": pipeline, "unet": ["diffusers", network]}
    (path / "model_index.json").write_text(json.dumps(index))
    (path / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [1, 2, 3, 4]}))
    if unet is not None:
        (path / "unet" / "config.json").write_text(json.dumps(unet))
    return str(path)


@pytest.mark.parametrize(
    ("pipeline", "sample", "expected"),
    [
        ("StableDiffusionXLPipeline", None, (1024, 1024, 5.0, 30)),
        ("StableDiffusionXLPipeline", 64, (512, 512, 5.0, 30)),
        ("StableDiffusionPipeline", [48, 96], (384, 768, 7.5, 30)),
        ("LatentConsistencyModelPipeline", 96, (768, 768, 8.5, 4)),
    ],
)
def test_defaults_of_a_folder(pipeline: str, sample: object, expected: tuple, tmp_path: Path) -> None:
    unet = {"down_block_types": SDXL_BLOCKS, "attention_head_dim": [5, 10, 20], "sample_size": sample}
    record = read_folder(json_folder(tmp_path / "model", pipeline, unet))
    assert (record.height, record.width, record.guidance, record.steps) == expected


def test_folders_that_cannot_be_run_are_one_line(tmp_path: Path, no_start: None) -> None:
    unet = {"down_block_types": SDXL_BLOCKS, "attention_head_dim": 8}
    (tmp_path / "empty").mkdir()
    wrong = {
        str(tmp_path / "empty"): "model_index.json: No such file or directory; give a folder in diffusers format",
        json_folder(
            tmp_path / "inpaint", "StableDiffusionInpaintPipeline", unet
        ): "is a StableDiffusionInpaintPipeline",
        json_folder(tmp_path / "sd3", "StableDiffusion3Pipeline", unet): "the command line runs folders of",
        json_folder(tmp_path / "motion", "StableDiffusionPipeline", unet, "UNetMotionModel"): "unet is UNetMotionModel",
        json_folder(tmp_path / "half", "StableDiffusionPipeline", None): "unet/config.json: No such file",
    }
    (Path(json_folder(tmp_path / "torn", "StableDiffusionPipeline", unet)) / "vae" / "config.json").write_text("{")
    wrong[str(tmp_path / "torn")] = "vae/config.json: not a json file"
    for folder, message in wrong.items():
        with pytest.raises(FlagError, match=message) as caught:
            cli.plan(["--prompt", "x", "--model", folder, "--parallel", "sync"], {})
        assert "\n" not in str(caught.value) and folder in str(caught.value)


def test_a_folder_named_like_a_model_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    json_folder(tmp_path / "tiny-dit", "StableDiffusion3Pipeline", {})
    monkeypatch.chdir(tmp_path)
    assert find_unet("tiny-dit") is None
    assert cli.plan(["--prompt", "x", "--model", "tiny-dit", "--parallel", "sync"], {}).command


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of NumPy, for what diffusers does
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_can_be_made_of_another(name: str) -> None:
    diffusers = importlib.import_module("diffusers")
    old = diffusers.EulerDiscreteScheduler(beta_start=0.002, prediction_type="v_prediction")
    new = make_scheduler(name, old)
    assert type(new).__name__ == SCHEDULERS[name]
    assert (new.config.beta_start, new.config.prediction_type) == (0.002, "v_prediction")
    assert not new.config.get("clip_sample", False), "latents are not in [-1, 1]"
    new.set_timesteps(5)
    assert len(new.timesteps) >= 5


def test_the_solver_for_the_stochastic_equation_draws_noise() -> None:
    diffusers = importlib.import_module("diffusers")
    for old in (diffusers.DDIMScheduler(), diffusers.DPMSolverMultistepScheduler()):
        new = make_scheduler("dpm-solver-sde", old)
        assert new.config.algorithm_type == "sde-dpmsolver++"
        new.set_timesteps(5)
        seeds = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
        ones = torch.ones(1, 4, 8, 8)
        drawn = [copy.deepcopy(new).step(ones, new.timesteps[0], ones, generator=seed).prev_sample for seed in seeds]
        assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])


def test_settings_of_the_old_scheduler_win() -> None:
    diffusers = importlib.import_module("diffusers")
    new = make_scheduler("ddim", diffusers.DDPMScheduler(clip_sample=True, steps_offset=1))
    assert new.config.clip_sample and new.config.steps_offset == 1


@pytest.mark.parametrize("model", ["Qwen-Image", "Wan2.1-T2V", "FLUX.1-dev", "Z-Image", "HunyuanVideo"])
def test_padded_tokens_may_be_any_number(model: str) -> None:
    choice = choose({"model": model, "parallel": "sync", "height": 928, "width": 1648}, 7)
    assert choice is not None and choice.patch_degree == 7


def test_a_change_of_the_unet_changes_the_facts(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    change_json(copy / "unet" / "config.json", sample_size=[8, 40], attention_head_dim=[4, 6])
    record = read_folder(str(copy))
    assert (record.height, record.width, record.heads) == (16, 80, (4, 6))
