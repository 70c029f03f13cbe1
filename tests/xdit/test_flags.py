"""What the "Otil options" mean, and every way to get them wrong."""

import argparse
import importlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as some

from otil_xdit.catalog.dits import DITS, DitRecord
from otil_xdit.catalog.models import find_dit
from otil_xdit.catalog.numbers import FLAG_NUMBERS
from otil_xdit.errors import FlagError
from otil_xdit.tools.common.variants import parse_variant
from otil_xdit.xdit.cpu import enable_cpu_ranks
from otil_xdit.xdit.flags.choice import ParallelChoice, choose
from otil_xdit.xdit.flags.degrees import resolve_patch_degree
from otil_xdit.xdit.flags.options import add_otil_args, options


def parser() -> argparse.ArgumentParser:
    """A parser with the part of xfuser's flags that matters here."""
    made = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    made.add_argument("--model")
    made.add_argument("--use_cfg_parallel", action="store_true")
    for degree in ("data_parallel", "ulysses", "ring", "pipefusion_parallel", "tensor_parallel"):
        made.add_argument(f"--{degree}_degree", type=int, default=1)
    for size in ("height", "width"):
        made.add_argument(f"--{size}", type=int)
    for number in ("num_inference_steps", "seed"):
        made.add_argument(f"--{number}", type=int)
    made.add_argument("--guidance_scale", type=float)
    made.add_argument("--cache_method")
    for switch in ("use_fp8_comms", "use_torch_compile"):
        made.add_argument(f"--{switch}", action="store_true")
    add_otil_args(made)
    return made


def chosen(line: str, world_size: int | None = 2) -> ParallelChoice | None:
    return choose(vars(parser().parse_args(line.split())), world_size)


def test_without_parallel_there_is_no_choice() -> None:
    assert chosen("", 1) is None
    assert chosen("--ring_degree 2 --pipefusion_parallel_degree 2", 4) is None


@pytest.mark.parametrize("cache", ["FLUX.1-dev --cache_method teacache", "FLUX.2-dev --cache_method fbcache"])
def test_xdits_own_step_caches_are_taken(cache: str) -> None:
    assert chosen(f"--parallel otil --patch_degree 2 --model {cache}") is not None


def test_only_given_settings_reach_the_strategy() -> None:
    choice = chosen("--parallel otil --otil_ratio 1/4 --otil_warmup_steps 3 --otil_polling 0")
    assert choice is not None
    assert (choice.strategy.name, choice.patch_degree, choice.ulysses_degree) == ("otil", 2, 1)
    assert choice.config == type(choice.config)(ratio=0.25, warmup_steps=3, polling=0.0)


def test_a_switch_takes_no_value() -> None:
    """The next argument stays its own; a switch that is not given is not a setting that is."""
    choice = chosen("--parallel otil --otil_check --otil_warmup_steps 3")
    assert choice is not None and choice.config == type(choice.config)(check=True, warmup_steps=3)
    without = chosen("--parallel otil")
    assert without is not None and without.config.check is False
    with pytest.raises(FlagError, match="--otil_check given without --parallel"):
        chosen("--otil_check")
    assert parse_variant("otil:check=yes").config.check is True
    with pytest.raises(ValueError, match="check=maybe: 'maybe' is neither yes nor no"):
        parse_variant("otil:check=maybe")


@pytest.mark.parametrize("text", ["1/8", "0.125", " 1/8", ".125"])
def test_ratio_is_a_fraction_or_a_number(text: str) -> None:
    choice = choose(vars(parser().parse_args(["--parallel", "otil", "--otil_ratio", text])), 2)
    assert choice is not None and choice.config.ratio == 0.125


@pytest.mark.parametrize(
    ("line", "world_size", "patch_degree"),
    [
        ("", 4, 4),
        ("--patch_degree 4", 4, 4),
        ("--ring_degree 4", 4, 4),
        ("--patch_degree 2 --ring_degree 2", 2, 2),
        ("--patch_degree 3", None, 3),
        ("--use_cfg_parallel", 4, 2),
        ("--ulysses_degree 2", 8, 4),
        ("--use_cfg_parallel --ulysses_degree 2 --data_parallel_degree 2", 16, 2),
        ("--ring_degree 1", 1, 1),
    ],
)
def test_patch_degree(line: str, world_size: int | None, patch_degree: int) -> None:
    choice = chosen(f"--parallel sync {line}", world_size)
    assert choice is not None and choice.patch_degree == patch_degree


@given(
    patches=some.integers(1, 8),
    others=some.fixed_dictionaries(
        {
            "ulysses_degree": some.integers(1, 4),
            "data_parallel_degree": some.integers(1, 3),
            "use_cfg_parallel": some.booleans(),
        }
    ),
    world_size=some.integers(1, 64),
)
def test_degrees_fill_the_world_or_are_refused(patches: int, others: dict[str, int], world_size: int) -> None:
    rest = others["ulysses_degree"] * others["data_parallel_degree"] * (2 if others["use_cfg_parallel"] else 1)
    assert resolve_patch_degree(others, patches * rest) == patches
    if patches * rest == world_size:
        assert resolve_patch_degree({**others, "patch_degree": patches}, world_size) == patches
    else:
        with pytest.raises(FlagError, match=f"--patch_degree {patches} does not fit {world_size} processes"):
            resolve_patch_degree({**others, "patch_degree": patches}, world_size)


WRONG = [
    (
        "--parallel foo",
        "--parallel foo: no such strategy; choose from otil, otil-paper, distrifusion, compact-1bit, "
        "compact-2bit, hybridiff, sync, naive",
    ),
    ("--parallel otil --otil_ratio 0", r"--otil_ratio.* is 0; give a number in \(0, 1\]"),
    ("--parallel otil --otil_ratio 1.5", r"--otil_ratio.* is 1.5; give a number in \(0, 1\]"),
    ("--parallel otil --otil_ratio abc", "--otil_ratio.*'abc' is not a ratio; give a fraction such as 1/8"),
    ("--parallel otil --otil_ratio 1/0", "--otil_ratio.*'1/0' is not a ratio"),
    ("--parallel otil --otil_block_size 0", "--otil_block_size is 0; give a whole number from 1"),
    ("--parallel otil --otil_block_size 4.5", "--otil_block_size.*'4.5' is not a whole number"),
    ("--parallel otil --otil_select best", "--otil_select is 'best'; choose from latent-cosine"),
    ("--parallel otil --otil_polling 2", r"--otil_polling is 2; give a number in \[0, 1\]"),
    ("--parallel otil --otil_warmup_steps 0", "--otil_warmup_steps is 0; give a whole number from 1 up"),
    ("--parallel otil --otil_refresh -1", "--otil_refresh is -1; give a whole number from 0 up"),
    ("--parallel otil --otil_timeout 0", "--otil_timeout is 0; give a number in"),
    ("--parallel otil --otil_report /nowhere/at/all.json", "--otil_report .*no such directory"),
    ("--parallel otil --patch_degree 0", "--patch_degree is 0; give a whole number from 1 up"),
    ("--num_inference_steps -3", "--num_inference_steps is -3; give a whole number from 1 to 10000"),
    ("--parallel otil --num_inference_steps 0", "--num_inference_steps is 0; give a whole number from 1"),
    ("--parallel otil --height 0", "--height is 0; give a whole number from 1 to 65536"),
    ("--parallel otil --width -64", "--width is -64; give a whole number from 1"),
    ("--parallel otil --guidance_scale nan", "--guidance_scale is nan; give a number from 0 to 1000"),
    ("--parallel otil --guidance_scale inf", "--guidance_scale is inf; give a number from 0"),
    ("--parallel otil --seed 99999999999999999999", "--seed is 99999999999999999999; give a whole number from"),
    ("--parallel otil --ulysses_degree 0", "--ulysses_degree is 0; give a whole number from 1"),
    ("--parallel otil --data_parallel_degree -2", "--data_parallel_degree is -2; give a whole number from 1"),
    ("--parallel otil --patch_degree 3", "--patch_degree 3 does not fit 2 processes: 3 patches = 3"),
    ("--parallel otil --ulysses_degree 3", r"2 processes cannot be shared out: 3 \(--ulysses_degree\)"),
    ("--parallel otil --patch_degree 2 --ring_degree 1", "--patch_degree 2 and --ring_degree 1 contradict each other"),
    ("--parallel otil --ring_degree 4 --patch_degree 2", "--patch_degree 2 and --ring_degree 4 contradict each other"),
    ("--patch_degree 2", "--patch_degree given without --parallel"),
    ("--otil_ratio 1/8 --otil_block_size 4", "--otil_ratio, --otil_block_size given without --parallel"),
    ("--parallel otil --pipefusion_parallel_degree 2", "--pipefusion_parallel_degree 2 are not supported together"),
    ("--parallel otil --tensor_parallel_degree 2", "--tensor_parallel_degree 2 are not supported together"),
    ("--parallel otil --cache_method fbcache", "--cache_method fbcache are not supported together"),
    (
        "--parallel otil --model FLUX.1-dev --cache_method dbcache",
        "--cache_method dbcache are .*teacache for FluxTrans",
    ),
    ("--parallel otil --model FLUX.1-dev --cache_method fbcache", "--cache_method fbcache are .*fbcache for Flux2"),
    ("--parallel otil --model SDXL --cache_method teacache", "--cache_method teacache are .*are for transformers"),
    (
        "--parallel otil --model FLUX.2-dev --cache_method fbcache --use_torch_compile",
        "--cache_method fbcache are .*in the middle of a graph",
    ),
    ("--parallel otil --use_fp8_comms", "--parallel otil and --use_fp8_comms are not supported together"),
    ("--parallel otil --otil_select latent-l2 --ulysses_degree 2", "choose kv-cosine or kv-l2"),
    (
        "--parallel otil --model tiny-dit --height 100",
        "--height 100 cannot be cut into 2 patches.*a multiple of 8 from 16 up",
    ),
    (
        "--parallel otil --model tiny-dit --otil_block_size 32",
        "--otil_block_size 32 is larger than a patch.*give at most 16",
    ),
    ("--parallel sync --model owner/FLUX.1-dev --height 16 --width 16", "--height 16 cannot be cut into 2 patches"),
]
"""Command lines for two processes, and what is said about each."""


@pytest.mark.parametrize("value", ["-3,2", "-1/8", "-.5x"])
def test_a_value_that_begins_with_a_minus_is_judged_by_its_flag(value: str) -> None:
    """Not by argparse, which would say "expected one argument" and not which."""
    taken = [option.flag for option in options() if option.metavar is not None]
    assert len(taken) > 20
    for flag in taken:
        try:
            assert getattr(parser().parse_args([f"--{flag}", value]), flag) == value
        except argparse.ArgumentError as error:
            assert "expected one argument" not in str(error) and "-" in str(error).partition(": ")[2], error


def test_every_number_of_xdits_flags_has_a_range() -> None:
    """Shares and scales of attention backends and of FP8, which no strategy works with, are xDiT's own matter."""
    enable_cpu_ranks()
    importlib.import_module("otil_xdit").register()
    config = importlib.import_module("xfuser.config")
    known = config.FlexibleArgumentParser(allow_abbrev=False)
    config.xFuserArgs.add_runner_args(known)
    own = {"patch_degree", "ring_degree", *(option.flag for option in options())}
    theirs = ("fp8_", "spargeattn_", "vsa_", "num_hybrid_")
    numbers = {action.dest for action in known._actions if action.type in (int, float)}
    assert {name for name in numbers - own if not name.startswith(theirs)} <= set(FLAG_NUMBERS)


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_wrong_flags(line: str, message: str) -> None:
    with pytest.raises((FlagError, argparse.ArgumentError), match=message) as caught:
        chosen(line)
    assert "\n" not in str(caught.value)


def test_prompts_of_one_batch_whose_masks_are_not_read() -> None:
    values = {"parallel": "otil", "model": "HunyuanVideo", "prompt": ["one", "another one"], "batch_size": 2}
    with pytest.raises(FlagError, match="--batch_size 2 and different prompts .* HunyuanVideo: xDiT would attend to"):
        choose(values, 2)
    for others in ({"batch_size": 1}, {"batch_size": None}, {"prompt": ["one", "one"]}, {"model": "Wan2.1-T2V"}):
        assert choose({**values, **others}, 2) is not None


def test_a_setting_without_effect_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    chosen("--parallel distrifusion --otil_ratio 1/8")
    chosen("--parallel otil", 1)
    assert [record.getMessage() for record in caplog.records] == [
        "--otil_ratio has no effect with --parallel distrifusion",
        "--parallel otil has no effect with one patch",
    ]


def test_an_ungiven_ring_degree_is_an_ordinary_one() -> None:
    degree = vars(parser().parse_args([]))["ring_degree"]
    assert degree == 1 and isinstance(degree, int) and json.dumps(degree) == "1"


def test_every_flag_has_one_line_of_help() -> None:
    group = next(group for group in parser()._action_groups if group.title == "Otil options")
    for action in group._group_actions:
        assert action.help and action.help.endswith(".") and "\n" not in action.help, action.option_strings
        assert action.default is None


SIZED = [record for record in DITS if record.vae and record.has_runner]


@pytest.mark.parametrize("record", SIZED, ids=lambda record: record.label)
def test_a_record_agrees_with_xfuser(record: DitRecord) -> None:
    enable_cpu_ranks()
    registry = importlib.import_module("xfuser.model_executor.models.runner_models.base_model").MODEL_REGISTRY
    importlib.import_module("otil_xdit").register()
    known = {name: cls for name, cls in registry.items() if find_dit(name) is record}
    assert {name.rsplit("/", 1)[-1].lower() for name in known} == set(record.short_names)
    for name, model in known.items():
        default = model.default_input_values
        assert (default.height, default.width) == (record.height, record.width), name
