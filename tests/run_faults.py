"""Faults on real ranks, at random layers and steps, and what becomes of the other ranks.

    python tests/run_faults.py                     # all cases, as a Markdown table
    python tests/run_faults.py --only kill --ranks 2
    python tests/run_faults.py --launcher          # those that go through `xfuser`

Each case starts fresh ranks, which make a good image first and must make the same one as everybody; then one rank has
its fault in the second. The ranks are forked from this process, which has imported everything already: a start costs a
second instead of twenty. Rank 0 holds the store that the ranks meet in, as with any launcher but torchrun.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from otil_xdit.session import PatchSession  # noqa: E402
from otil_xdit.xdit.launch import free_port  # noqa: E402
from otil_xdit.xdit.shipped import model_folder  # noqa: E402

TIMEOUT = 4.0
STEPS = 8
PROMPT = "a large red circle on the left and a small blue square on the right, striped background"
DEADLINE = 60.0
"""Seconds after which ranks that are still there count as left behind."""

HANGING = ("kill", "stop", "layer", "callback", "nan")
DIFFERING = ("ratio", "seed", "size", "LoRA", "weights", "steps", "scheduler")
KINDS = {
    "kill": "SIGKILL",
    "stop": "SIGSTOP for twice the timeout",
    "layer": "exception in a layer",
    "callback": "exception in a callback",
    "callbacks": "exception in all ranks' callbacks",
    "nan": "NaN in an activation",
    "ratio": "another ratio",
    "seed": "another seed",
    "size": "another size",
    "LoRA": "a LoRA on one rank",
    "weights": "other weights",
    "steps": "another number of steps",
    "scheduler": "another scheduler",
    "interrupt": "Ctrl-C to the launcher",
    "terminate": "SIGTERM to the launcher",
}


@dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        kind: of `KINDS`.
        model: a shipped one.
        ranks: how many.
        degrees: as `parallelize` takes them.
        victim: the rank that has the fault.
        step, place: when, and at which layer, as a share of all.
    """

    kind: str
    model: str
    ranks: int
    degrees: dict[str, Any]
    victim: int
    step: int
    place: float


def cases(seed: int = 0) -> list[Case]:
    """48 cases, the same every time."""
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


# ---- the fault, in a rank --------------------------------------------------------------------------------------------


def arm(case: Case, rank: int, folder: Path, generation: int) -> None:
    """Let the fault happen on the case's victim in that generation, from 0."""
    watch, now, layers = PatchSession._watch, [-1], set[nn.Module]()
    calls = Counter[tuple[int, int]]()

    def armed(session: PatchSession, networks: dict[str, nn.Module]) -> None:
        watch(session, networks)
        now[0] += 1
        layers.update(module for network in networks.values() for module in network.modules() if _is_layer(module))

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        session = PatchSession.active()
        if session is None or module not in layers:
            return None
        step = session.communicator.clock.step
        calls[now[0], step] += 1
        usual = calls[generation - 1, step] or calls[generation, step - 1]
        if (now[0], step) != (generation, case.step) or calls[now[0], step] < 1 + case.place * (usual - 1):
            return None
        return None if happened(folder) else happen(case, output, folder)

    PatchSession._watch = armed  # type: ignore[method-assign]
    if rank == case.victim and case.kind in ("kill", "stop", "layer", "nan"):
        # For all modules: hooks of one between a norm and its convolution would change what they send.
        nn.modules.module.register_module_forward_hook(hook)


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm))


def happen(case: Case, output: Any, folder: Path) -> Any:
    (folder / "happened").write_text(repr(time.time()))
    if case.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if case.kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if case.kind in ("layer", "callback", "callbacks"):
        raise ValueError(f"a fault in a {case.kind.removesuffix('s')}")
    if case.kind == "nan":
        output = output.clone()
        output.view(-1)[output.numel() // 2] = float("nan")
    return output


def happened(folder: Path) -> bool:
    return (folder / "happened").exists()


# ---- forked ranks ----------------------------------------------------------------------------------------------------


def load(model: str) -> Any:
    from diffusers import DPMSolverMultistepScheduler, StableDiffusion3Pipeline, StableDiffusionPipeline

    if model == "tiny-dit":
        pipe = StableDiffusion3Pipeline.from_pretrained(
            model_folder(model), text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
        )
    else:
        pipe = StableDiffusionPipeline.from_pretrained(model_folder(model), torch_dtype=torch.float32)
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe: Any, **changes: Any) -> str:
    """Digest of the latents; of nothing on ranks that have none."""
    call = {"height": 128, "width": 128, "num_inference_steps": STEPS, "guidance_scale": 4.0, **changes}
    generator = torch.Generator().manual_seed(call.pop("seed", 3))
    output = pipe(PROMPT, generator=generator, output_type="latent", **call)
    return "" if output is None else hashlib.sha256(output.images.numpy().tobytes()).hexdigest()[:12]


def rank_main(case: Case, pipe: Any, rank: int, folder: Path) -> int:
    """A rank's life; leaves what it saw in a file."""
    import otil_xdit
    from otil_xdit import OtilConfig
    from otil_xdit.xdit.hooks import session_of

    seen: dict[str, Any] = {}
    mine = rank == case.victim
    config = OtilConfig(timeout=TIMEOUT, ratio=0.5 if case.kind == "ratio" and mine else 0.75)
    pipe = otil_xdit.parallelize(pipe, config, **case.degrees)
    pipe.set_progress_bar_config(disable=True)
    arm(case, rank, folder, 1)
    try:
        if case.kind != "ratio":
            seen["first"] = image(pipe)
        changes = changed(case, pipe, mine, folder)
        began = time.time()
        image(pipe, **changes)
        seen["missed"] = True
    except BaseException as error:
        seen["seconds"] = time.time() - (float((folder / "happened").read_text()) if happened(folder) else began)
        seen["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    watch = session_of(pipe).group.watch
    seen["usable"] = not watch.why_broken
    if case.kind != "ratio":
        restore_weights(case, pipe, mine)
        began = time.time()
        try:
            seen["again"] = image(pipe)
        except BaseException as error:
            seen["again"], seen["refused after"] = f"{type(error).__name__}: {error}", time.time() - began
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen))
    return 0 if "missed" in seen else 1


def changed(case: Case, pipe: Any, mine: bool, folder: Path) -> dict[str, Any]:
    """What is different in the second image, by kind."""
    if case.kind in ("callback", "callbacks"):

        def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            if step == case.step and (mine or case.kind == "callbacks"):
                happen(case, None, folder)
            return given

        return {"callback_on_step_end": callback}
    if not mine:
        return {}
    network = getattr(pipe, "unet", None) or pipe.transformer
    if case.kind == "LoRA":
        pipe.load_lora_weights(model_folder("tiny-sd-lora"))
    if case.kind == "weights":
        with torch.no_grad():
            for weights in network.parameters():
                weights.mul_(1.0009765625)  # exact to undo, but for the last bit
    if case.kind == "scheduler":
        from diffusers import EulerDiscreteScheduler

        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    return {"seed": {"seed": 4}, "size": {"height": 160}, "steps": {"num_inference_steps": 9}}.get(case.kind, {})


def restore_weights(case: Case, pipe: Any, mine: bool) -> None:
    if not mine:
        return
    if case.kind == "LoRA":
        pipe.unload_lora_weights()
    if case.kind == "scheduler":
        from diffusers import DPMSolverMultistepScheduler

        pipe.scheduler = DPMSolverMultistepScheduler.from_config(load(case.model).scheduler.config)
    if case.kind == "weights":
        attribute = "unet" if hasattr(pipe, "unet") else "transformer"
        fresh = dict(getattr(load(case.model), attribute).named_parameters())
        with torch.no_grad():
            for (name, weights), (_, own) in zip(
                fresh.items(), getattr(pipe, attribute).named_parameters(), strict=True
            ):
                assert own.shape == weights.shape, name
                own.copy_(weights)


def forked(case: Case, pipe: Any, rank: int, port: int, folder: Path) -> int:
    """Start a rank; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(folder / f"log-{rank}", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case.ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        code = rank_main(case, pipe, rank, folder)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)


@dataclass
class Outcome:
    """What became of a case."""

    case: Case
    seen: dict[int, dict[str, Any]]
    codes: dict[int, int | None]
    through: str = "ranks"
    text: str = ""
    seconds: float = float("nan")

    @property
    def left(self) -> int:
        return sum(code is None for code in self.codes.values())


def run_case(case: Case, pipe: Any) -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        pids = [forked(case, pipe, rank, port, folder) for rank in range(case.ranks)]
        codes: dict[int, int | None] = dict.fromkeys(range(case.ranks))
        over, resumed = time.monotonic() + DEADLINE, False
        while None in codes.values() and time.monotonic() < over:
            for rank, pid in enumerate(pids):
                if codes[rank] is None and os.waitpid(pid, os.WNOHANG)[0]:
                    codes[rank] = 1
            if case.kind == "stop" and not resumed and happened(folder):
                resumed = time.time() > float((folder / "happened").read_text()) + 2 * TIMEOUT
                if resumed:
                    os.kill(pids[case.victim], signal.SIGCONT)
            time.sleep(0.05)
        for rank, pid in enumerate(pids):
            if codes[rank] is None:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        files = {rank: folder / f"rank-{rank}.json" for rank in range(case.ranks)}
        seen = {rank: json.loads(path.read_text()) for rank, path in files.items() if path.exists()}
        logs = "\n".join(path.read_text()[-1500:] for path in sorted(folder.glob("log-*")))
        return Outcome(case, seen, codes, text=logs)


# ---- through the launcher --------------------------------------------------------------------------------------------

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

ENVIRONMENT = "OTIL_XDIT_TEST_FAULT"


def launched_rank() -> int:
    """What a rank of the launcher runs in place of `otil_xdit.runner`."""
    told = json.loads(os.environ[ENVIRONMENT])
    case, folder, rank = Case(**told["case"]), Path(told["folder"]), int(os.environ["RANK"])
    (folder / f"pid-{os.getpid()}").touch()
    if rank == case.victim and case.kind in ("ratio", "seed"):
        sys.argv += {"ratio": ["--otil_ratio", "1/2"], "seed": ["--seed", "7"]}[case.kind]
    if case.kind in ("interrupt", "terminate"):
        case = Case(**{**told["case"], "kind": "layer", "victim": -1})
        hook = PatchSession._watch

        def begun(session: PatchSession, networks: dict[str, nn.Module]) -> None:
            hook(session, networks)
            (folder / "happened").write_text(repr(time.time()))

        PatchSession._watch = begun  # type: ignore[method-assign]
    arm(case, rank, folder, 0)
    from otil_xdit import runner

    return runner.main()


@contextlib.contextmanager
def launched(case: Case, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    flags = ["--model", case.model, "--parallel", "otil", "--prompt", PROMPT, "--otil_timeout", str(TIMEOUT)]
    flags += ["--num_inference_steps", str(STEPS if case.kind not in ("interrupt", "terminate") else 400)]
    flags += ["--output_directory", str(folder), "--height", "128", "--width", "128", "--seed", "3"]
    flags += ["--use_cfg_parallel"] if case.degrees else []
    flags += ["--patch_degree", "2"]
    start = f"import sys; from otil_xdit import cli; cli.RUNNER = 'tests.run_faults'; sys.exit(cli.main({flags!r}))"
    fault = json.dumps({"case": asdict(case), "folder": str(folder)})
    environment = {**os.environ, ENVIRONMENT: fault, "PYTHONPATH": str(ROOT)}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", start], env=environment, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def run_launched(case: Case) -> Outcome:
    """The case through `xfuser`; `seconds` are from the fault to the launcher's end."""
    with tempfile.TemporaryDirectory() as name, launched(case, Path(name)) as process:
        folder = Path(name)
        while case.kind in ("stop", "interrupt", "terminate") and process.poll() is None:
            time.sleep(0.1)
            if not happened(folder):
                continue
            since = time.time() - float((folder / "happened").read_text())
            if case.kind == "stop" and since > 2 * TIMEOUT:
                for path in folder.glob("pid-*"):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(path.name[4:]), signal.SIGCONT)
                break
            if case.kind != "stop" and since > 1:
                process.send_signal(signal.SIGINT if case.kind == "interrupt" else signal.SIGTERM)
                (folder / "happened").write_text(repr(time.time()))
                break
        process.wait(180)
        ended, text = time.time(), (folder / "log").read_text()
        since = float((folder / "happened").read_text()) if happened(folder) else float("nan")
        pids = [int(path.name[4:]) for path in folder.glob("pid-*")]
        codes = {number: None if psutil.pid_exists(pid) else process.returncode for number, pid in enumerate(pids)}
        return Outcome(case, {}, codes, "xfuser", text, ended - since)


# ---- the table -------------------------------------------------------------------------------------------------------


def row(number: int, outcome: Outcome, wrong: str) -> str:
    case = outcome.case
    layout = f"{case.ranks}" + "".join(f", {key.removesuffix('_degree')}" for key in case.degrees)
    at = f"rank {case.victim}" + (f", step {case.step}" if case.kind not in DIFFERING else "")
    if outcome.through == "xfuser":
        detected, seconds = "", f"{outcome.seconds:.1f}"
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
    lines = [line.split("]: ", 1)[-1] for line in text.splitlines() if line.strip()]
    signs = ("Error: ", "ExchangeTimeout: ", "NotFinite: ", " stops at ", "all processes stopped")
    named = [line for line in lines if any(sign in line for sign in signs) and "ChildFailedError" not in line]
    line = ([line for line in named if "no answer" in line or " stops " in line] or named or lines or [""])[-1]
    line = re.sub(r" \[127[.0-9]*\]:[0-9]+", "", line.replace("otil_xdit.watch.", ""))
    return line if len(line) <= 400 else f"{line[:240]} ... {line[-155:]}"


def judged(outcome: Outcome) -> str:
    """What is wrong with an outcome; empty where nothing is."""
    case, faults = outcome.case, [f"{outcome.left} processes left"] if outcome.left else []
    if outcome.through == "xfuser":
        codes = {"interrupt": 130, "terminate": 143}
        right = all(code == codes.get(case.kind, code) != 0 for code in outcome.codes.values())
        return "; ".join([*faults, *([] if right and outcome.codes else ["exit code"])])
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
    is_other = "error" in seen and rank != case.victim and case.kind in HANGING
    if is_other and f"rank {case.victim}" not in seen["error"]:
        yield f"does not name rank {case.victim}"
    if not seen["usable"]:
        if case.kind in (*DIFFERING, "callbacks"):
            yield "is broken"
        if not seen.get("refused after", 9) < 1:
            yield f"did not refuse: {seen['again']}"
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
    sys.exit(launched_rank() if ENVIRONMENT in os.environ else main())
