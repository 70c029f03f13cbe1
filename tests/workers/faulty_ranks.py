"""Ranks one of which has a fault, forked from this process; `tests.workers.launched_faults` has those of `xfuser`."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from otil_xdit.catalog.bundled import model_folder  # noqa: E402
from otil_xdit.runtime.network_hooks import NetworkHooks  # noqa: E402
from otil_xdit.runtime.session import PatchSession  # noqa: E402
from otil_xdit.xdit.launcher.processes import free_port  # noqa: E402

TIMEOUT = 4.0
STEPS = 8
PROMPT = "a large red circle on the left and a small blue square on the right, striped background"
DEADLINE = 60.0
"""Seconds after which ranks that are still there count as left behind."""

HANGING = ("kill", "stop", "layer", "callback", "nan")
MISSING = ("absent", "late")
DIFFERING = ("ratio", "seed", "size", "LoRA", "weights", "steps", "scheduler", "forward")
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
    "forward": "a step cache on one rank",
    "absent": "a call that this rank does not make",
    "late": "a call that this rank makes after the others' timeout",
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


# ---- the fault, in a rank --------------------------------------------------------------------------------------------


def arm(case: Case, rank: int, folder: Path, generation: int) -> None:
    """Let the fault happen on the case's victim in that generation, from 0."""
    prepare, now, layers = NetworkHooks.prepare, [-1], set[nn.Module]()
    calls = Counter[tuple[int, int]]()

    def armed(hooks: NetworkHooks, networks: Mapping[str, nn.Module], pipes: Iterable[Any]) -> None:
        prepare(hooks, networks, pipes)
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

    NetworkHooks.prepare = armed  # type: ignore[method-assign]  # to hook layers when they are wrapped
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
    from otil_xdit.xdit.plugin.sessions import session_of

    seen: dict[str, Any] = {}
    mine = rank == case.victim
    config = OtilConfig(timeout=TIMEOUT, ratio=0.5 if case.kind == "ratio" and mine else 0.75)
    pipe = otil_xdit.parallelize(pipe, config=config, **case.degrees)
    pipe.set_progress_bar_config(disable=True)
    arm(case, rank, folder, 1)
    try:
        if case.kind != "ratio":
            seen["first"] = image(pipe)
        changes = changed(case, pipe, mine, folder)
        began = time.time()
        if mine and case.kind in MISSING:
            time.sleep(1.5 * TIMEOUT)
        if not (mine and case.kind == "absent"):
            image(pipe, **changes)
            seen["missed"] = True
    except BaseException as error:
        seen["seconds"] = time.time() - (float((folder / "happened").read_text()) if happened(folder) else began)
        seen["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    detector = session_of(pipe).group.detector
    seen["usable"] = not detector.why_broken
    if case.kind != "ratio":
        restore_weights(case, pipe, mine)
        began = time.time()
        try:
            seen["again"] = image(pipe)
        except BaseException as error:
            seen["again"], seen["refused after"] = f"{type(error).__name__}: {error}", time.time() - began
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen))
    if case.kind not in HANGING:
        # The store goes with rank 0, and the others may still be asking it.
        over = time.monotonic() + TIMEOUT
        while len([*folder.glob("rank-*.json")]) < case.ranks and time.monotonic() < over:
            time.sleep(0.02)
    return 0 if "missed" in seen else 1


def changed(case: Case, pipe: Any, mine: bool, folder: Path) -> dict[str, Any]:
    """What is different in the second image, by kind."""
    if case.kind in ("callback", "callbacks"):

        def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            if step == case.step and (mine or case.kind == "callbacks"):
                happen(case, None, folder)
            return given

        return {"callback_on_step_end": callback}
    if case.kind in MISSING:
        return {"seed": 4}
    if not mine:
        return {}
    network = getattr(pipe, "unet", None) or pipe.transformer
    if case.kind == "LoRA":
        pipe.load_lora_weights(model_folder("tiny-sd-lora"))
    if case.kind == "weights":
        with torch.no_grad():
            for weights in network.parameters():
                weights.mul_(1.0009765625)  # exact to undo, but for the last bit
    if case.kind == "forward":
        block = some_block(network)
        block.forward = lambda *args, plain=block.forward, **kwargs: plain(*args, **kwargs)
    if case.kind == "scheduler":
        from diffusers import EulerDiscreteScheduler

        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    return {"seed": {"seed": 4}, "size": {"height": 160}, "steps": {"num_inference_steps": 9}}.get(case.kind, {})


def some_block(network: Any) -> Any:
    """What a step cache would put its own `forward` on."""
    return network.mid_block if hasattr(network, "mid_block") else network.transformer_blocks[1]


def restore_weights(case: Case, pipe: Any, mine: bool) -> None:
    if not mine:
        return
    if case.kind == "LoRA":
        pipe.unload_lora_weights()
    if case.kind == "forward":
        del some_block(getattr(pipe, "unet", None) or pipe.transformer).forward
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
