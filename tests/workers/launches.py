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
  the aim is {target:g}. Reading and writing a value of 16 bits and a velocity of 8, which all ranks keep of all
  numbers, takes 6 of them.
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
| 6.3 | 7.2 | own keys and values: read once, copies corrected and compared, what they lack written, and for attention |
| 4.2 | 5.2 | copies of the other patch: corrected, moved on and written for attention |
| 1.1 | 4.1 | own payload: what the others lack, read once of the sub-blocks that are sent |
| 0.3 | 1.6 | maps written between the rows above and below them |
| 0.1 | 1.0 | codes of halo rows and moments, and the rest |
| 12.0 | 19.1 | |

*Before* is commit 7957ddd. What went since:

- A payload is coded with the gain that the steps before let expect. So what the others lack is known in the pass that
  compares values with their copies, features are measured there, too, and velocities are not read again (3.0 on two
  ranks).
- Velocities take 8 bits where layers have 16 (3.0; `--otil_kv_cache_dtype same` keeps 16).
- A norm, its activation and the rows of its convolution are one pass (1.3, and 1.3 of what the network itself moves,
  which is not counted here).
- A bucket of halo rows is coded, and decoded, by one kernel (0.6 with 114 launches).
- 0.2 were counted and are not moved: how codes are to be read says a small part of a payload.

Copies cannot be attention's buffer themselves. They are in coordinates, and of the step before: what attention reads of
them is moved on by this step's gain and turned back, another number in another place. It could only be where nothing is
coded in coordinates and nothing is extrapolated.

What is left is what such a step does: with N ranks, a value of 16 bits and a velocity of 8 are read and written of
every number (6), all keys and values are written for attention (2), and of its own a rank reads the values, writes what
they lack, and reads what is sent of it (5.75 / N); with payloads 11.1 on two ranks and 9.7 on four. `otil 2bit`
corrects all copies before its layers are called, and so reads them twice; warm-up and refreshes write whole copies.
They are above the aim.

## Every step of a run

SDXL with 30 steps on cfg 2 x patch 2, `otil` as it is by default, in the order of the steps:

{course}
The first step of all makes buffers, fills them with zeros and takes the weights' coordinates to the device; it does so
once for a size, so the second image begins with less. It sends one byte a number like the rest of the warm-up: what
changes since nothing is the values themselves. The first displaced step finds nothing under way, and moments are fitted
from the third on. The last step is a displaced one like those before it.

Where each pass of guidance has its own ranks, these agree on gains: of a layer that has none yet at once, which is
what step 3 waits for besides, then of all layers in one message a step. They send all sub-blocks while they wait, as to
agree on some took a message for each layer (192 + 0 before).

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
