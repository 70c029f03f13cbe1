"""What `otil-xdit bench` and `otil-xdit eval` refuse, before anything starts and any folder is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from otil_xdit.tools import main as tools

COMMON = {
    "model": ("--models tiny-sdd", "--models tiny-sdd: no such model; choose from tiny-sd, tiny-sdxl, tiny-dit"),
    "preset": ("VARIANTS oti", "VARIANTS oti: 'oti' is not a preset; choose from otil, "),
    "value": ("VARIANTS otil:ratio=2", "VARIANTS otil:ratio=2: ratio=2: ratio is 2; give a number in (0, 1]"),
    "block": ("VARIANTS otil:block_size=20", "block 20 is larger than a patch"),
    "rows": ("--ranks 5", "cannot be cut into 5 patches"),
    "size": ("SIZES 100", "--size 100 is not possible with tiny-sd; give a multiple of 8"),
    "halves": (
        "--ranks 3 VARIANTS hybridiff:window_steps=3",
        "--ranks 3: hybridiff:window_steps=3 has two halves of the ranks; give an even number",
    ),
    "window": ("VARIANTS hybridiff:window=12:20", "window is '12:20', which a run of 15 steps has no room for"),
    "window of otil": ("VARIANTS otil:window=auto --guidance 1", "otil:window=auto: --guidance is 1; "),
}
"""Of both tools, which call two flags differently."""

FLAGS = {
    "bench": {"VARIANTS": "--strategies", "SIZES": "--sizes"},
    "eval": {"VARIANTS": "--presets", "SIZES": "--size"},
}

BENCH = {
    "peer": ("--strategies oti", ", or from one-process, cfg, ulysses, ring, pipefusion"),
    "width": ("--width 0", "--width 0: give a whole number from 1 up"),
    "latent": ("--latent 0", "--latent 0: give a whole number from 1 up"),
    "latent and size": ("--latent 32 --sizes 128", "--sizes 128 and --latent 32 both say how large images are"),
    "ranks": ("--ranks 0", "--ranks 0: give a whole number from 1 up"),
    "one rank": ("--ranks 1 --strategies otil", "--ranks 1: only one-process runs on one rank"),
    "steps": ("--steps 0", "--steps 0: give a whole number from 1 up"),
    "rounds": ("--rounds 0", "--rounds 0: give a whole number from 1 up"),
    "warm-up": ("--warmup_rounds -1", "--warmup_rounds -1: give a whole number from 0 up"),
    "limit": ("--limit 0", "--limit 0: give a number of seconds above 0"),
    "sampler": ("--sampler dpm", "--sampler dpm: no such sampler; choose from own, ddim"),
    "guidance": ("--models tiny-dit --guidance 1", "--guidance 1: xDiT's SD3 pipeline needs guidance"),
    "rate": ("--link fast", "--link fast: give a rate in kB/s, MB/s, GB/s, kbit, mbit, gbit, say 20MB/s, or ratio=R"),
    "unit": ("--link 20mb/s", "--link 20mb/s: give a rate in"),
    "no unit": ("--link 20", "--link 20: give a rate in"),
    "slow": ("--link 1kbit", "--link 1kbit: give at least 10kB/s"),
    "ratio": ("--link ratio=0", "--link ratio=0: give a ratio above 0"),
    "several ranks": ("--link 1gbit --ranks 2 4", "--link 1gbit with --ranks 2 4: a link has one number of ranks"),
    "several models": ("--link ratio=1 --models tiny-sd tiny-sdxl", "--link ratio=1 with several --models"),
    "several latents": ("--link ratio=1 --latent 32 64", "--link ratio=1 with several --latent"),
    "few steps": ("--link ratio=1 --steps 2", "--link ratio=1 with --steps 2: give more than 2"),
}

EVAL = {
    "setting": ("--presets otil:ration=1", "'ration=1' is not setting=value; settings are "),
    "choice": ("--presets otil:select=best", "select is 'best'; choose from latent-cosine"),
    "number": ("--presets otil:polling=half", "--presets otil:polling=half: polling=half: could not convert"),
    "sampler": ("--samplers dpm:15", "--samplers dpm:15: 'dpm' is not a sampler; choose from own, ddim"),
    "steps": ("--samplers ddim", "--samplers ddim: give the number of steps after a colon, say ddim:15"),
    "sampler of a DiT": (
        "--models tiny-dit --samplers ddim:9",
        "tiny-dit is a DiT and has its own only; add own:STEPS",
    ),
    "one rank": ("--ranks 1", "--ranks 1: give 2 or more"),
    "rows of a DiT": ("--models tiny-dit --samplers own:9 --ranks 3", "--size 128 cannot be cut into 3 patches"),
    "guidance": ("--models tiny-dit --samplers own:9 --guidance 1", "--guidance 1: xDiT's SD3 pipeline needs guidance"),
    "prompts": ("--prompts 9", "--prompts 9: there are 8; give 1 to 8"),
    "prompt file": ("--prompt_file none.txt", "--prompt_file none.txt: No such file"),
    "an odd half": ("--ranks 3 --use_cfg_parallel", "--ranks 3: distrifusion has two halves of the ranks"),
    "guidance of halves": ("--use_cfg_parallel --guidance 1 --ranks 4", "--guidance 1: --use_cfg_parallel has a half"),
    "type": ("--dtype int8", "invalid choice: 'int8'"),
    "statistics of nothing": ("--stats nowhere", "--stats nowhere: no model_index.json there"),
    "seeds": ("--seeds 0", "--seeds 0: give a whole number from 1 up"),
    "jobs": ("--jobs 0", "--jobs 0: give a whole number from 1 up"),
    "timeout": ("--timeout 0", "--timeout 0: give a number of seconds above 0"),
    "LoRA": ("--lora none", "--lora none: give a file of LoRA weights"),
    "LoRA for two": (
        "--lora otil_xdit/weights/tiny-sd-lora --models tiny-sd tiny-sdxl",
        "--lora fits one architecture",
    ),
}

LINES = [
    *((tool, *refused) for tool in FLAGS for refused in COMMON.items()),
    *(("bench", *refused) for refused in BENCH.items()),
    *(("eval", *refused) for refused in EVAL.items()),
]


@pytest.mark.usefixtures("cpu_machine", "no_start")
@pytest.mark.parametrize(
    ("tool", "line", "message"),
    [(tool, line, message) for tool, _, (line, message) in LINES],
    ids=[f"{tool}-{name}" for tool, name, _ in LINES],
)
def test_bad_input_is_refused_before_anything_starts(
    tool: str, line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for word, flag in FLAGS[tool].items():
        line, message = line.replace(word, flag), message.replace(word, flag)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        tools.main([tool, "--out", str(out), *line.split()])
    assert ended.value.code == 2 and not out.exists()
    assert message in capsys.readouterr().err
