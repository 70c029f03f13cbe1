"""Faults on real ranks, at random layers and steps, and what becomes of the other ranks.

    python tests/workers/faults.py                     # all cases, as a Markdown table
    python tests/workers/faults.py --only kill --ranks 2
    python tests/workers/faults.py --launcher          # those that go through `xfuser`

Each case starts fresh ranks, which make a good image first and must make the same one as everybody; then one rank has
its fault in the second. The ranks are forked from this process, which has imported everything already: a start costs a
second instead of twenty. Rank 0 holds the store that the ranks meet in, as with any launcher but torchrun.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.workers.faulty_ranks import DIFFERING, HANGING, KINDS, STEPS, Case, Outcome, load, run_case, run_launched

LAUNCHED = [
    Case("kill", "tiny-sd", 2, {}, 1, 3, 0.4),
    Case("kill", "tiny-dit", 2, {}, 0, 2, 0.7),
    Case("stop", "tiny-sd", 2, {}, 1, 4, 0.2),
    Case("layer", "tiny-dit", 2, {}, 1, 3, 0.5),
    Case("layer", "tiny-sd", 4, {"use_cfg_parallel": True}, 2, 5, 0.8),
    Case("nan", "tiny-sd", 2, {}, 0, 3, 0.3),
    Case("ratio", "tiny-sd", 2, {}, 1, 0, 0.0),
    Case("seed", "tiny-dit", 2, {}, 1, 0, 0.0),
    Case("interrupt", "tiny-sd", 2, {}, 0, 3, 0.5),
    Case("terminate", "tiny-dit", 2, {}, 0, 3, 0.5),
]


def cases(seed: int = 0) -> list[Case]:
    """52 cases, the same every time."""
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
    return found


# ---- the table -------------------------------------------------------------------------------------------------------


def row(number: int, outcome: Outcome, wrong: str) -> str:
    case = outcome.case
    layout = f"{case.ranks}" + "".join(f", {key.removesuffix('_degree')}" for key in case.degrees)
    at = f"rank {case.victim}" + (f", step {case.step}" if case.kind not in DIFFERING else "")
    if outcome.through == "xfuser":
        detected, seconds = "", "" if case.kind in DIFFERING else f"{outcome.seconds:.1f}"
        codes = {str(code) for code in outcome.codes.values()}
        message, next_run = shortened(outcome.text), f"exit {', '.join(sorted(codes))}"
    else:
        by = [rank for rank, seen in outcome.seen.items() if "error" in seen]
        detected = ", ".join(map(str, by))
        victim = {case.victim} if case.kind in HANGING else set()
        times = [seen["seconds"] for rank, seen in outcome.seen.items() if "seconds" in seen and rank not in victim]
        seconds = f"{max(times):.1f}" if times else ""
        others = [seen["error"] for rank, seen in outcome.seen.items() if "error" in seen and rank != case.victim]
        message = shortened((others or [""])[0])
        next_run = "same image" if all(seen.get("usable") for seen in outcome.seen.values()) else "refused"
    end = wrong or next_run
    cells = (number, KINDS[case.kind], case.model, layout, at, detected, seconds, message, outcome.left, end)
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
    if outcome.through == "xfuser":
        codes = {"interrupt": 130, "terminate": 143}
        right = all(code == codes.get(case.kind, code) != 0 for code in outcome.codes.values())
        names = {"interrupt": "SIGINT, all processes", "terminate": "SIGTERM, all processes"}
        named = names.get(case.kind, f"rank {case.victim}") in shortened(outcome.text)
        faults += ([] if right and outcome.codes else ["exit code"]) + ([] if named else ["what is said"])
        return "; ".join(faults)
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
        if case.kind in (*DIFFERING, "callbacks"):
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=[*KINDS], help="Kinds of faults.")
    parser.add_argument("--ranks", type=int, help="Cases of that many ranks only.")
    parser.add_argument("--model", choices=["tiny-sd", "tiny-dit"])
    parser.add_argument("--each", type=int, default=1000, help="So many cases of a kind.")
    parser.add_argument("--launcher", action="store_true", help="The cases that go through `xfuser`.")
    parser.add_argument("--verbose", action="store_true", help="What the ranks wrote, too.")
    args = parser.parse_args()
    found = [
        case
        for case in (LAUNCHED if args.launcher else cases())
        if (not args.only or case.kind in args.only)
        and args.ranks in (None, case.ranks)
        and args.model in (None, case.model)
    ]
    chosen = [case for kind in KINDS for case in [case for case in found if case.kind == kind][: args.each]]
    torch.set_num_threads(1)
    pipes: dict[str, Any] = {}
    if not args.launcher:
        import otil_xdit

        otil_xdit.register()
        pipes = {model: load(model) for model in {case.model for case in chosen}}
    print(HEADER + "\n|" + "---|" * HEADER[1:].count("|"), flush=True)
    bad, images = 0, dict[str, str]()
    for number, case in enumerate(chosen, 1):
        outcome = run_launched(case) if args.launcher else run_case(case, pipes[case.model])
        wrong = "; ".join(filter(None, (judged(outcome), other_images(outcome, images))))
        print(row(number, outcome, wrong), flush=True)
        bad += bool(wrong)
        if args.verbose or (wrong and outcome.text):
            print(f"{wrong}\n{outcome.text[-6000:]}\n{json.dumps(outcome.seen, indent=1)}", file=sys.stderr, flush=True)
    return min(bad, 100)


if __name__ == "__main__":
    sys.exit(main())
