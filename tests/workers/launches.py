"""Counts what a step of published networks asks of a GPU, on fake CUDA tensors, and writes the tables.

    python tests/workers/launches.py [--models SDXL FLUX SD3] [--strategies ...] [--before launches.json] [--write]

Prints a table for each model. ``--write`` makes docs/results/launches.md of them, and of what was counted the ceilings
in tests/budgets/launches.json, which a test holds; of what is left out those that are there are kept. ``--before``
names such a file of an earlier commit, for its numbers to stand beside. Needs no GPU, and g++ where torch is a CPU
build; takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from itertools import groupby
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.fake_cuda.machine import become_cuda_machine  # noqa: E402

become_cuda_machine(8)

import otil_xdit  # noqa: E402

otil_xdit.register()

from otil_xdit.tools.common.cards import CARDS  # noqa: E402
from tests.support.fake_cuda.budgets import (  # noqa: E402
    FILE,
    MODELS,
    PARTS,
    STEPS,
    STRATEGIES,
    TARGET_AWAITED,
    TARGET_BYTES,
    TARGET_RATIOS,
    Figures,
    budgets,
    is_counted,
    key_of,
    scene_of,
    scenes,
)
from tests.support.fake_cuda.launches import Launches  # noqa: E402
from tests.support.fake_cuda.rank import run  # noqa: E402

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "launches.md"

COURSE_STEPS, SECOND_STEPS = 30, 4
"""Of the run that is told step by step: of its first image, and of its second."""

SHOWN = ("4090", "H100")
"""Cards of the estimates; their figures are the planner's."""

HEAD = """# Launches: what a step asks of a GPU

Counted on fake CUDA tensors, on a machine without a GPU: the published networks at 1024 x 1024, float16, batch 2 with
guidance (FLUX: 1), one rank's step with the scheduler's. **Nothing here was measured on a GPU**; the milliseconds are
estimates: a launch costs the host {launch}, and bytes move at {speed}. A step takes what the device computes
or what the host launches, whichever is more.

- *launches*: kernels; in brackets, over those of the plain network on one card, and the aim.
- *bytes a number*: bytes moved beyond what the network's layers move, for each number of all ranks' keys and values;
  the aim is {target:g}. Reading and writing a value and a velocity of 16 bits each, which all ranks keep of all
  numbers, takes 8 of them.
- *messages*: waited for at once + travelling while something is computed. Of a displaced step at most {awaited} are to
  be waited for.

- `otil` is the default, with the adaptive codec in coordinates of the weights; `otil 2bit` is `--otil_codec 2bit`.

Before the default had kernels (commit f61759a, 2026-11-26) it launched, in brackets over the plain network's:

| | 2 ranks, waiting | 2 ranks, displaced | 4 ranks, waiting | 4 ranks, displaced |
|---|---|---|---|---|
| SDXL | 14528 (7.4) | 8215 (4.2) | 15023 (7.7) | 6908 (3.5) |
| SD3 | 5587 (4.6) | 5659 (4.7) | 5731 (4.8) | 5779 (4.8) |

`otil-xdit plan --card 4090` counts launches and bytes on "meta" tensors, by the same rules: within 2% of this
page's (`tests/tools/test_plan.py`), and predicts a step from them ([planner.md](planner.md)).

## Where the bytes go

Of SDXL's displaced step with `otil` on 2 ranks, bytes a number (2026-11-27):

    python tests/workers/fake_cuda.py '[{{"pipeline": "SDXL", "strategy": "otil displaced", "steps": 4}}]'

| bytes | before | what for |
|---:|---:|---|
| 5.4 | 9.6 | copies of the other patch, before of both: corrected, the other's written for attention |
| 7.2 | 5.1 | own keys and values: read once, compared with their copies, now corrected in that pass, and written |
| 4.1 | 4.1 | own payload: changes and velocities read to measure each feature, and again to be coded |
| 1.6 | 1.6 | halo rows: maps written with the rows above and below them |
| 0.7 | 0.7 | codes of halo rows and moments, and the rest |

*Before* is commit 3a4a3e4, which had 21.1 bytes; ce16586 had 25. What went since 3a4a3e4: own copies follow what came
where they are compared with what the layer is called with, instead of being corrected first and read again (2 on two
ranks, 1 on four; in steps that wait, too). Since ce16586: other ranks' copies are corrected when their layer is called,
where they are moved on for attention in the same pass; and a payload is coded from how far values are from their
copies, which are not read for it any more.

Copies cannot be attention's buffer themselves. They are in coordinates, and of the step before: what attention reads of
them is moved on by this step's gain and turned back, another number in another place. It could only be where nothing is
coded in coordinates and nothing is extrapolated.

What is done at every step has a floor above 12. With N ranks, every number's value and velocity of 16 bits are read and
written (8), all keys and values are written for attention (2), and of its own a rank must read them, write their
changes, and read changes and velocities to code them (8 / N). With payloads that is 14.6 on two ranks and 12.6 on four,
and SDXL's halo rows and moments take 2.3 besides. What is counted has 2.2 more on two ranks, nearly all in one place:
changes and velocities are read twice, as a feature's size is known only when all of it was read (4 / N; sums of squares
and products could be kept for each tile of tokens while values are compared, and those of sub-blocks that are not sent
be taken off, for about 1.25 / N of their own).

The floor is not one of arithmetic. Copies need not be written at every step: what came could be kept, 0.25 bytes a
number, and be applied at every second one, when two payloads are decoded in one pass, for 8 - 2 + 0.5 bytes. Copies
would then be rounded to 16 bits half as often, so other images would come out, and every kernel that reads copies would
have to decode. Neither is built.

With velocities of 8 bits (`--otil_kv_cache_dtype float8`, which has kernels, too) a displaced step of SDXL moves 16.1
bytes on two ranks and 13.5 on four instead of 19.1 and 16.0, in as many launches (`"settings": {{"kv_cache_dtype":
"float8"}}` in the scene above).

## Every step of a run

SDXL with 30 steps on cfg 2 x patch 2, `otil` as it is by default, in the order of the steps:

{course}
The first step of all makes buffers, fills them with zeros and takes the weights' coordinates to the device; it does so
once for a size, so the second image begins with less. It sends one byte a number like the rest of the warm-up: what
changes since nothing is the values themselves. The first displaced step finds nothing under way, and moments are fitted
from the third on. The last step is a displaced one like those before it.

Where each pass of guidance has its own ranks, a step that waits asks for two messages a layer: what both passes have
measured comes before the payload. It takes two launches a layer besides, one that measures and one that takes the means
and selects.

`python tests/workers/launches.py --write` makes this page, and the ceilings that a test holds
(tests/budgets/launches.json).
"""


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    arguments = parse_arguments()
    before = json.loads(arguments.before.read_text())["budgets"] if arguments.before else {}
    found = {key: Figures(**budget) for key, budget in budgets().items()}
    for scene in scenes(tuple(arguments.models)):
        if scene.strategy not in arguments.strategies:
            continue
        steps, *_ = run(scene, 2 if scene.strategy == "plain" else STEPS)
        found[key_of(scene)] = Figures.of(steps[-1])
        print(f"{key_of(scene)}: {vars(found[key_of(scene)])}", file=sys.stderr, flush=True)
    tables = "\n".join(table(model, found, before) for model in (MODELS if arguments.write else arguments.models))
    print(tables)
    if arguments.write:
        write(found, tables, course())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--strategies", nargs="+", choices=("plain", *STRATEGIES), default=["plain", *STRATEGIES])
    parser.add_argument("--before", type=Path)
    parser.add_argument("--write", action="store_true")
    return parser.parse_args()


def table(model: str, found: dict[str, Figures], before: dict[str, Any]) -> str:
    """Return a model's table, in Markdown."""
    plain = found[f"{model}, plain"]
    cards = " | ".join(f"own work on {card}, ms (estimate)" for card in SHOWN)
    lines = [
        f"\n## {model}\n",
        f"Plain: {plain.launches} launches.\n",
        f"| ranks | step | launches | bytes a number | messages | {cards} |",
        "|---|---|---|---|---|" + "---|" * len(SHOWN),
    ]
    for shared, (*_, cfg) in PARTS.items():
        for strategy in STRATEGIES if is_counted(model, cfg) else ():
            key = f"{model}, {strategy}, {shared}"
            lines.append(f"| {shared} | {strategy} | {row(found[key], plain, strategy, before.get(key))} |")
    return "\n".join(lines) + "\n"


def course() -> str:
    """Return a table of every step of a run of the default, and of the first steps of a second image, in Markdown."""
    scene = scene_of("SDXL", "otil", *PARTS["cfg 2 x patch 2"])
    steps, *_ = run(scene, COURSE_STEPS, SECOND_STEPS)
    lines = ["| steps | launches | own GB | messages |", "|---|---:|---:|---|"]
    for image, taken in (("", steps[:COURSE_STEPS]), ("second image, ", steps[COURSE_STEPS:])):
        number = 1
        for said, alike in groupby(map(described, taken)):
            last = number + len(list(alike)) - 1
            lines.append(f"| {image}{number if last == number else f'{number} to {last}'} | {said} |")
            number = last + 1
    return "\n".join(lines) + "\n"


def described(step: Launches) -> str:
    figures = Figures.of(step)
    return f"{figures.launches} | {figures.own_bytes / 1e9:.1f} | {figures.awaited} + {figures.displaced}"


def row(now: Figures, plain: Figures, strategy: str, before: dict[str, Any] | None) -> str:
    old = None if before is None else Figures(**before)
    launches = f"{_and(old and old.launches, now.launches)} ({now.launches / plain.launches:.2f}, aim "
    cells = [
        f"{launches}{TARGET_RATIOS[strategy]:g})",
        _and(old and f"{old.bytes_per_number:.0f}", f"{now.bytes_per_number:.0f}"),
        _and(old and f"{old.awaited} + {old.displaced}", f"{now.awaited} + {now.displaced}"),
    ]
    for card in map(CARDS.__getitem__, SHOWN):
        host = 1e3 * card.launch * max(now.launches - plain.launches, 0)
        cells.append(f"host {host:.1f}, memory {1e3 * now.own_bytes / card.memory_rate:.1f}")
    return " | ".join(cells)


def _and(old: Any, now: Any) -> str:
    return str(now) if old is None or str(old) == str(now) else f"{old} -> {now}"


def write(found: dict[str, Figures], tables: str, steps: str) -> None:
    """Write the page and the ceilings."""
    shown = [CARDS[name] for name in SHOWN]
    launch = " and ".join(f"{card.launch * 1e6:g} us ({card.name})" for card in shown)
    speed = " and ".join(f"{card.memory_rate / 1e9:,.0f} GB/s" for card in shown)
    head = HEAD.format(launch=launch, speed=speed, target=TARGET_BYTES, awaited=TARGET_AWAITED, course=steps)
    PAGE.write_text(head + tables)
    targets = {"launches_over_plain": TARGET_RATIOS, "bytes_per_number": TARGET_BYTES, "awaited": TARGET_AWAITED}
    kept = {key: vars(found[key]) for key in map(key_of, scenes())}
    document = {"targets": targets, "budgets": kept}
    FILE.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
