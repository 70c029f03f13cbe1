"""Faults on real ranks, at random layers and steps, and what becomes of the other ranks.

    python tests/workers/faults.py                     # all cases, as a Markdown table
    python tests/workers/faults.py --only kill --ranks 2
    python tests/workers/faults.py --launcher          # those that go through `xfuser`; --only chooses by their names

Each case starts fresh ranks, which make a good image first and must make the same one as everybody; then one rank has
its fault in the second. The ranks are forked from this process, which has imported everything already: a start costs a
second instead of twenty. Rank 0 holds the store that the ranks meet in, as with any launcher but torchrun.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.workers.faulty_ranks import DIFFERING, HANGING, KINDS, MISSING, STEPS, Case, Outcome, load, run_case
from tests.workers.launched_faults import DISKS, LAUNCHED, run_launched
from tests.workers.launched_faults import judged as judged_launch


def cases(seed: int = 0) -> list[Case]:
    """57 cases, the same every time."""
    draw = random.Random(seed)
    found = []
    shapes: tuple[tuple[int, dict[str, Any]], ...] = (
        (2, {}),
        (2, {}),
        (4, {}),
        (4, {"use_cfg_parallel": True}),
        (4, {"ulysses_degree": 2}),
    )
    for kind in (*HANGING, "callbacks"):
        for ranks, degrees in shapes:
            model = ("tiny-sd", "tiny-dit")[len(found) % 2]
            victim = draw.randrange(ranks)
            found.append(Case(kind, model, ranks, degrees, victim, draw.randrange(STEPS), draw.random()))
    for kind in DIFFERING:
        for ranks, model in ((2, "tiny-sd"), (2, "tiny-dit"), (4, "tiny-sd")):
            if (kind == "LoRA" or kind == "scheduler") and model == "tiny-dit":
                continue
            found.append(Case(kind, model, ranks, {}, draw.randrange(ranks), 0, 0.0))
    for kind in MISSING:
        for ranks, model in ((2, "tiny-sd"), (2, "tiny-dit"), (4, "tiny-sd"))[: 3 if kind == "absent" else 2]:
            found.append(Case(kind, model, ranks, {}, draw.randrange(ranks), 0, 0.0))
    return found


# ---- the table -------------------------------------------------------------------------------------------------------


def row(number: int, outcome: Outcome, wrong: str) -> str:
    case = outcome.case
    layout = f"{case.ranks}" + "".join(f", {key.removesuffix('_degree')}" for key in case.degrees)
    has_step = case.kind not in (*DIFFERING, *MISSING)
    at = f"rank {case.victim}" + (f", step {case.step}" if has_step else "")
    by = [rank for rank, seen in outcome.seen.items() if "error" in seen]
    victim = {case.victim} if case.kind in HANGING else set()
    times = [seen["seconds"] for rank, seen in outcome.seen.items() if "seconds" in seen and rank not in victim]
    others = [seen["error"] for rank, seen in outcome.seen.items() if "error" in seen and rank != case.victim]
    next_run = "same image" if all(seen.get("usable") for seen in outcome.seen.values()) else "refused"
    seconds = f"{max(times):.1f}" if times else ""
    said = shortened((others or [""])[0])
    seen_by = ", ".join(map(str, by))
    return table_row(
        number, KINDS[case.kind], case.model, layout, at, seen_by, seconds, said, outcome.left, wrong or next_run
    )


def row_of_launch(number: int, name: str, outcome: Outcome, says: str, wrong: str) -> str:
    ranks = outcome.seen[0]["ranks"]
    images = "yes" if outcome.seen[0]["images"] else ""
    end = wrong or f"exit {outcome.codes[-1]}"
    named = [line for line in outcome.text.splitlines() if says and says in line]
    said = shortened("\n".join(named) or outcome.text)
    return table_row(number, name, outcome.case.model, ranks, f"{outcome.seconds:.1f}", said, images, outcome.left, end)


def table_row(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


def shortened(text: str) -> str:
    """The line that says what happened, without its class's module and the details of the socket."""
    # A progress bar ends no line.
    lines = [re.sub(r"^.*it/s\]", "", line.split("]: ", 1)[-1]) for line in text.splitlines() if line.strip()]
    signs = ("Error: ", "ExchangeTimeout: ", "NotFinite: ", " stops at ", "all processes stopped")
    named = [line for line in lines if any(sign in line for sign in signs) and "ChildFailedError" not in line]
    line = ([line for line in named if "no answer" in line or " stops " in line] or named or lines or [""])[-1]
    line = re.sub(r" \[127[.0-9]*\]:[0-9]+", "", line.replace("otil_xdit.errors.", ""))
    return line if len(line) <= 400 else f"{line[:240]} ... {line[-155:]}"


def judged(outcome: Outcome) -> str:
    """What is wrong with an outcome; empty where nothing is."""
    case, faults = outcome.case, [f"{outcome.left} processes left"] if outcome.left else []
    for rank in range(case.ranks):
        if case.kind != "kill" or rank != case.victim:
            seen = outcome.seen.get(rank)
            faults += [
                f"rank {rank} {wrong}" for wrong in (["is silent"] if seen is None else _wrong(case, rank, seen))
            ]
    return "; ".join(faults)


def _wrong(case: Case, rank: int, seen: dict[str, Any]) -> Iterator[str]:
    """What is wrong with what a rank saw."""
    # After the last step nobody needs the victim any more.
    is_over = case.kind == "callback" and case.step == STEPS - 1 and rank != case.victim
    if "missed" in seen and not is_over:
        yield "saw nothing"
    is_other = "error" in seen and rank != case.victim and case.kind != "callbacks"
    if is_other and f"rank {case.victim}" not in seen["error"]:
        yield f"does not name rank {case.victim}"
    if not seen["usable"]:
        if case.kind in (*DIFFERING, *MISSING, "callbacks"):
            yield "is broken"
        if not seen.get("refused after", 9) < 1:
            yield f"did not refuse: {seen.get('again')}"
    elif case.kind != "ratio" and seen["again"] != seen["first"]:
        yield f"made another image afterwards: {seen['again']}"


def other_images(outcome: Outcome, known: dict[str, str]) -> str:
    """What is wrong with the good image that the ranks made before the fault; `known` are those of earlier cases."""
    made = {seen["first"] for seen in outcome.seen.values() if seen.get("first")}
    if not made:
        return ""
    case = outcome.case
    made.add(known.setdefault(f"{case.model} {case.ranks} {case.degrees}", min(made)))
    return "" if len(made) == 1 else f"different first images: {made}"


HEADER = "| | fault | model | ranks | at | seen by ranks | seconds | what another rank says | left | afterwards |"
LAUNCH_HEADER = "| | fault | model | ranks | seconds | what `xfuser` says | image | left | end |"


def main() -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", help="Kinds of faults.")
    parser.add_argument("--ranks", type=int, help="Cases of that many ranks only.")
    parser.add_argument("--model", choices=["tiny-sd", "tiny-dit"])
    parser.add_argument("--each", type=int, default=1000, help="So many cases of a kind.")
    parser.add_argument("--launcher", action="store_true", help="The cases that go through `xfuser`.")
    parser.add_argument("--verbose", action="store_true", help="What the ranks wrote, too.")
    args = parser.parse_args()
    unknown = {*(args.only or ())} - {*(LAUNCHED if args.launcher else KINDS)}
    if unknown:
        parser.error(f"--only: no such kind: {', '.join(sorted(unknown))}")
    return launches(args) if args.launcher else on_ranks(args)


def launches(args: argparse.Namespace) -> int:
    print(LAUNCH_HEADER + "\n|" + "---|" * LAUNCH_HEADER[1:].count("|"), flush=True)
    bad = 0
    for number, name in enumerate(args.only or LAUNCHED, 1):
        case, expected = LAUNCHED[name]
        if case.kind.removesuffix(" before") in DISKS and os.geteuid() != 0:
            print(f"{name}: not run, as a disk of its own takes root", file=sys.stderr)
            continue
        outcome = run_launched(case)
        wrong = judged_launch(outcome, expected)
        print(row_of_launch(number, name, outcome, expected.says, wrong), flush=True)
        bad += bool(wrong)
        if args.verbose or wrong:
            print(f"{wrong}\n{outcome.text[-6000:]}", file=sys.stderr, flush=True)
    return min(bad, 100)


def on_ranks(args: argparse.Namespace) -> int:
    import otil_xdit

    found = [
        case
        for case in cases()
        if (not args.only or case.kind in args.only)
        and args.ranks in (None, case.ranks)
        and args.model in (None, case.model)
    ]
    chosen = [case for kind in KINDS for case in [case for case in found if case.kind == kind][: args.each]]
    torch.set_num_threads(1)
    otil_xdit.register()
    pipes = {model: load(model) for model in {case.model for case in chosen}}
    print(HEADER + "\n|" + "---|" * HEADER[1:].count("|"), flush=True)
    bad, images = 0, dict[str, str]()
    for number, case in enumerate(chosen, 1):
        outcome = run_case(case, pipes[case.model])
        wrong = "; ".join(filter(None, (judged(outcome), other_images(outcome, images))))
        print(row(number, outcome, wrong), flush=True)
        bad += bool(wrong)
        if args.verbose or (wrong and outcome.text):
            print(f"{wrong}\n{outcome.text[-6000:]}\n{json.dumps(outcome.seen, indent=1)}", file=sys.stderr, flush=True)
    return min(bad, 100)


if __name__ == "__main__":
    sys.exit(main())
