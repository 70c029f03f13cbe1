"""A service for hundreds of images: each of two ranks keeps tiny-sd and tiny-dit, and everything else changes.

    python tests/workers/soak.py --out soak.json [--count 300] [--seed 0] [--skip 0] [--part serve|compare|plain]

Sizes, batches, steps, guidance, samplers and strategies are drawn at random; so are adapters (LoRA from its file,
LoKr made anew, both let go afterwards), callbacks, and who calls: the main thread, a thread of a pool, or two of them
at the same time, of which one waits for its turn. ``serve`` makes all images on two gloo ranks that live throughout,
and notes each one's digest and the resident memory of both ranks. ``compare`` makes every 10th image again on two
ranks that were started for it alone, from their main thread. The verdict, at the end of ``compare``: how many are
identical, and by how much memory has grown after image 40: resident, and in use by glibc's count, without the buffers
of the exchange, whose size goes with the image. What the heap was given back and keeps is resident and not in use.
Exit code 1 for a difference or for 2% and more of resident memory. ``plain`` is diffusers in one process with the
same calls.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from otil_xdit.xdit.launcher.processes import CPU_ENVIRONMENT  # noqa: E402

EVERY, SETTLED, MOST_GROWTH = 10, 40, 0.02
STRATEGIES = ("otil", "otil-paper", "distrifusion", "compact-2bit", "sync")
SAMPLERS = ("own", "ddim", "dpm-solver", "unipc", "euler", "euler-a", "heun", "pndm")
SIZES = (64, 96)
ADAPTERS = ("", "", "LoRA", "LoKr")
CALLBACKS = ("", "", "observe", "scale")
CALLERS = ("main", "main", "thread", "two threads")
PLAIN = {"adapter": "", "callback": "", "caller": "main"}
PROMPTS = ("a large red circle on the left", "a small blue square on the right, dotted background", "a green triangle")
MALLINFO = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
"""The fields of glibc's `struct mallinfo2`."""

ENVIRONMENT = {
    **CPU_ENVIRONMENT,
    "MALLOC_ARENA_MAX": "1",  # a heap of its own for each thread is as large as the largest that it ever made
}


def main() -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="what serve writes and compare reads")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", type=int, default=0, help="so many drawn images, made in another piece")
    parser.add_argument("--part", choices=("serve", "compare", "plain"), help="that alone (default serve and compare)")
    parser.add_argument("--rank-jobs", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_jobs is not None:
        return in_rank(json.loads(arguments.rank_jobs.read_text()), arguments.out)
    jobs = draw_jobs(arguments.count, arguments.seed, arguments.skip)
    if arguments.part == "plain":
        # Two calls at a time break a scheduler of diffusers, which only the plugin has wait for each other.
        on_ranks(1, [one_by_one(job) for job in jobs], arguments.out)
        print(memory_after_settling(json.loads(arguments.out.read_text())))
        return 0
    if arguments.part != "compare":
        on_ranks(2, jobs, arguments.out)
    return compare(jobs, arguments.out) if arguments.part != "serve" else 0


def draw_jobs(count: int, seed: int, skip: int) -> list[dict[str, Any]]:
    """What is made, one after the other; first the largest of each network and strategy, twice, for memory to settle.

    Twice, as the first of them are made before the other network has been loaded; the second time by two threads, since
    each has a heap of its own, and with adapters, whose package is then imported.
    """
    dice = random.Random(seed)
    # As many steps as the longest: under `otil` the first half waits, and steps that do not have buffers of their own.
    largest = {"height": 96, "width": 96, "batch": 2, "steps": 6, "guidance": 4.0, "prompt": 0}
    samplers = {"tiny-sd": "heun", "tiny-dit": "own"}  # of second order: it keeps most
    jobs = [
        {
            "model": model,
            "strategy": strategy,
            "sampler": sampler,
            "seed": turn,
            **largest,
            **PLAIN,
            **(how if model == "tiny-dit" else {**how, **({"adapter": adapter} if how else {})}),
        }
        for turn, how in enumerate(({}, {"callback": "scale", "caller": "two threads"}))
        for strategy, adapter in zip(STRATEGIES, ("LoRA", "LoKr", "LoRA", "LoKr", "LoRA"), strict=True)
        for model, sampler in samplers.items()
    ]
    strategy, largest_jobs = "otil", len(jobs)
    while len(jobs) < count + skip:
        if dice.random() < 0.2:
            strategy = dice.choice(("otil", *STRATEGIES))
        model = dice.choice([*samplers])
        jobs.append(
            {
                "model": model,
                "strategy": strategy,
                "height": dice.choice(SIZES),
                "width": dice.choice(SIZES),
                "batch": dice.choice((1, 1, 2)),
                "steps": dice.randint(3, 6),
                "guidance": dice.choice((1.0, 4.0, 7.5) if model == "tiny-sd" else (4.0, 7.5)),
                "sampler": dice.choice(SAMPLERS) if model == "tiny-sd" else "own",
                "prompt": dice.randrange(len(PROMPTS)),
                "seed": len(jobs),
                "adapter": dice.choice(ADAPTERS) if model == "tiny-sd" else "",
                "callback": dice.choice(CALLBACKS),
                "caller": dice.choice(CALLERS),
            }
        )
    return [*jobs[:largest_jobs], *jobs[largest_jobs + skip :]][:count]


def one_by_one(job: dict[str, Any]) -> dict[str, Any]:
    """The job with its callers one after the other, in the main thread."""
    return {**job, "caller": f"{job['caller']}, one after the other"}


def on_ranks(count: int, jobs: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """Have new ranks make `jobs`; their notes, which lie in `out` too."""
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "jobs.json"
        listed.write_text(json.dumps(jobs))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", __file__]
        command = [*launch, "--rank-jobs", str(listed), "--out", str(out)]
        done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the ranks failed: {done.stderr[-6000:]}")
    notes: list[dict[str, Any]] = json.loads(out.read_text())
    return notes


def compare(jobs: list[dict[str, Any]], out: Path) -> int:
    """Every 10th image by ranks of its own, and the verdict."""
    notes = json.loads(out.read_text())
    different, compared = [], 0
    prepare()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(EVERY - 1, len(jobs), EVERY):
            fresh = alone(jobs[number], Path(folder) / f"{number}.json")
            compared += 1
            if fresh["digests"] != notes[number]["digests"]:
                different.append(number)
                print(f"image {number} differs: {jobs[number]}", flush=True)
    before, since = most(notes[:SETTLED]), most(notes[SETTLED:])
    seconds = sum(note["seconds"] for note in notes)
    print(
        f"{len(notes)} images in {seconds:.0f} s; {compared} compared with fresh ranks', {len(different)} different; "
        f"{memory_after_settling(notes)}; the exchange's buffers: at most {before:.1f} MB until then, {since:.1f} since"
    )
    return int(bool(different) or max(grown(notes, "resident")) >= MOST_GROWTH)


def alone(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """The note of an image that is made by two ranks of its own, forked from this process, which has made none."""
    from otil_xdit.xdit.launcher.processes import free_port

    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    pids = []
    for rank in range(2):
        pid, code = os.fork(), 1
        if pid:
            pids.append(pid)
            continue
        os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
        try:
            code = in_rank([one_by_one(job)], out)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if any([os.waitpid(pid, 0)[1] for pid in pids]):
        raise SystemExit(f"the ranks failed with {job}")
    (note,) = json.loads(out.read_text())
    return dict(note)


def memory_after_settling(notes: list[dict[str, Any]]) -> str:
    """How each rank's memory has grown, in words."""
    settled, last = notes[min(SETTLED, len(notes)) - 1], notes[-1]
    told = [
        f"rank {rank} {kind} {settled[kind][rank] / 1e6:.1f} to {last[kind][rank] / 1e6:.1f} MB ({share:+.2%})"
        for kind in ("resident", "used")
        for rank, share in enumerate(grown(notes, kind))
    ]
    return f"memory from image {SETTLED} to {len(notes)}: {', '.join(told)}"


def grown(notes: list[dict[str, Any]], kind: str) -> list[float]:
    """By which share each rank's memory at the end is above that after image 40."""
    settled, last = notes[min(SETTLED, len(notes)) - 1][kind], notes[-1][kind]
    return [end / start - 1 for start, end in zip(settled, last, strict=True)]


def most(notes: list[dict[str, Any]]) -> float:
    """Of both ranks and all images, in MB."""
    return max((max(note["buffers"]) for note in notes), default=0) / 1e6


# ---- on a rank -------------------------------------------------------------------------------------------------------


def prepare() -> None:
    """Import what takes long, and say little."""
    import torch

    import otil_xdit

    otil_xdit.register()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)


def in_rank(jobs: list[dict[str, Any]], out: Path) -> int:
    """Make all jobs; rank 0 writes the notes of both."""
    import psutil
    import torch.distributed as dist

    prepare()
    service, notes, process = Service(), [], psutil.Process()
    for number, job in enumerate(jobs):
        started = time.perf_counter()
        try:
            digest = service.make(job)
        except Exception as error:
            raise RuntimeError(f"image {number}, {job}") from error
        seconds = time.perf_counter() - started
        gc.collect()
        ranks: list[Any] = [None] * dist.get_world_size()
        buffer_bytes = service.buffer_bytes
        dist.all_gather_object(ranks, (digest, process.memory_info().rss, in_use() - buffer_bytes, buffer_bytes))
        digests, resident, used, buffers = zip(*ranks, strict=True)
        notes.append({"digests": digests, "resident": resident, "used": used, "buffers": buffers, "seconds": seconds})
        if dist.get_rank() == 0:
            out.write_text(json.dumps(notes))
    dist.barrier()
    dist.destroy_process_group()
    return 0


def in_use() -> int:
    """Bytes that glibc has given out, in the heaps of all threads, and not been given back."""

    class MallInfo(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in MALLINFO]

    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = MallInfo
    found = libc.mallinfo2()
    return int(found.uordblks + found.hblkhd)


class Service:
    """Both models, loaded once; a strategy stays until a job asks for another."""

    def __init__(self) -> None:
        self._plain: dict[str, Any] = {}
        self._parallel: dict[str, tuple[str, Any]] = {}
        self._pool = ThreadPoolExecutor(2)

    @property
    def buffer_bytes(self) -> int:
        """What the exchanges of both models keep."""
        from otil_xdit.xdit.plugin.sessions import session_of

        sessions = [session_of(pipe) for _, pipe in self._parallel.values()]
        return sum(session.report().buffer_bytes for session in sessions if session is not None)

    def make(self, job: dict[str, Any]) -> str:
        """The digest of the job's images, one for each caller; "" on a rank that gets none."""
        from otil_xdit.catalog.schedulers import make_scheduler

        pipe = self._pipe(job["model"], job["strategy"])
        own = pipe.scheduler
        if job["sampler"] != "own":
            pipe.scheduler = make_scheduler(job["sampler"], own)
        adapt(pipe, job["adapter"])
        try:
            images = self._called(pipe, job)
        finally:
            if job["sampler"] != "own":
                pipe.scheduler = own
            adapt(pipe, "", job["adapter"])
        if any(made is None for made in images):
            return ""
        return hashlib.sha256(b"".join(made.images.numpy().tobytes() for made in images)).hexdigest()

    def _called(self, pipe: Any, job: dict[str, Any]) -> list[Any]:
        """What the job's callers are given, in their order, which is the same on both ranks."""
        seeds = [job["seed"], job["seed"] + 1000] if job["caller"].startswith("two threads") else [job["seed"]]
        if job["caller"].startswith("main") or "one after the other" in job["caller"]:
            return [draw(pipe, job, seed) for seed in seeds]
        under_way, futures = threading.Event(), []
        for seed in seeds:
            futures.append(self._pool.submit(draw, pipe, job, seed, under_way.set))
            under_way.wait(60 if len(seeds) > 1 else 0)
        return [future.result() for future in futures]

    def _pipe(self, model: str, strategy: str) -> Any:
        import otil_xdit

        known, pipe = self._parallel.get(model, ("", None))
        if known != strategy:
            if pipe is not None:
                otil_xdit.restore(pipe)
            pipe = otil_xdit.parallelize(self._loaded(model), strategy)
            self._parallel[model] = strategy, pipe
        return pipe

    def _loaded(self, model: str) -> Any:
        from otil_xdit.catalog.bundled import model_folder
        from otil_xdit.catalog.folders import OWN, load_pipe

        if model not in self._plain:
            self._plain[model] = load_pipe(model_folder(model), OWN, None)
        return self._plain[model]


def draw(pipe: Any, job: dict[str, Any], seed: int, begun: Callable[[], None] = lambda: None) -> Any:
    """What one call gives."""
    import torch

    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        begun()
        return {"latents": tensors["latents"] * 0.98} if job["callback"] == "scale" else {}

    is_watched = bool(job["callback"]) or "threads" in job["caller"]
    return pipe(
        prompt=PROMPTS[job["prompt"]],
        height=job["height"],
        width=job["width"],
        num_inference_steps=job["steps"],
        guidance_scale=job["guidance"],
        num_images_per_prompt=job["batch"],
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        **({"callback_on_step_end": on_step_end} if is_watched else {}),
    )


def adapt(pipe: Any, adapter: str, before: str = "") -> None:
    """Load an adapter, and let the one go that was there before."""
    import torch
    from peft import LoKrConfig

    from otil_xdit.catalog.bundled import model_folder

    if before == "LoRA":
        pipe.unload_lora_weights()
    if before == "LoKr":
        pipe.unet.delete_adapters("lokr")
        pipe.unet.unload_lora()
    if adapter == "LoRA":
        pipe.load_lora_weights(model_folder("tiny-sd-lora"))
    if adapter == "LoKr":
        pipe.unet.add_adapter(LoKrConfig(r=4, target_modules=["to_q", "to_v"], init_weights=False), "lokr")
        dice = torch.Generator().manual_seed(5)
        for name, weight in pipe.unet.named_parameters():
            if ".lokr" in name:
                weight.data.copy_(torch.randn(weight.shape, generator=dice) * 0.1)
        pipe.unet.requires_grad_(False)


if __name__ == "__main__":
    sys.exit(main())
