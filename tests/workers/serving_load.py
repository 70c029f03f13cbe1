"""A server under load, beside a loop that calls the pipeline directly; one JSON line.

    python tests/workers/serving_load.py [--clients 16] [--requests 200] [--queue 8] [--loops 2]

Clients ask for images of random sizes, steps, schedulers, LoRA and seeds, drawn from some kinds that are made one by
one at first. Who is answered 429 asks again. The same file is what torchrun runs for the direct loop.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # torchrun puts this folder there, not the checkout

MODEL, LORA = "tiny-sd", "tiny-sd-lora"
KINDS = 8
PROMPTS = ("a large red circle", "a blue square on stripes", "two green triangles")


def kinds() -> list[dict[str, Any]]:
    """Some requests, no two alike."""
    draw = random.Random(0)
    return [
        {
            "prompt": draw.choice(PROMPTS),
            "seed": number,
            "size": f"{draw.choice((64, 96))}x{draw.choice((64, 96))}",
            "num_inference_steps": draw.randint(2, 4),
            "guidance_scale": draw.choice((1.0, 4.0)),
            "scheduler": draw.choice((None, "ddim", "euler", "dpm-solver")),
            "lora": draw.choice((None, "style", "style:0.5")),
        }
        for number in range(KINDS)
    ]


def sequence(count: int) -> list[int]:
    """Which kind each request is of."""
    draw = random.Random(1)
    return [draw.randrange(KINDS) for _ in range(count)]


# ---- the server ----------------------------------------------------------------------------------------------------


def load(clients: int, requests: int, queue: int) -> dict[str, Any]:
    """Return what was measured of a server."""
    from otil_xdit.catalog.bundled import model_folder
    from tests.support.served import served

    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(Path(model_folder(LORA)) / "pytorch_lora_weights.safetensors", Path(folder) / "style.safetensors")
        flags = ["--model", MODEL, "--parallel", "otil", "--patch_degree", "2", "--lora_dir", folder]
        with served(*flags, "--max_queue", str(queue)) as server:
            wanted = [server.image(**kind) for kind in kinds()]
            for kind in kinds():  # once more, after every LoRA has been loaded
                server.image(**kind)
            before = memory(server)
            say(f"{2 * len(wanted)} images made one by one")
            todo, statuses, wrong = sequence(requests), Counter[int](), []
            lock = threading.Lock()

            def client() -> None:
                with server.http as http:
                    while True:
                        with lock:
                            if not todo:
                                return
                            kind = todo.pop(0)
                        while True:
                            answer = http.post("/v1/images/generations", json=kinds()[kind])
                            with lock:
                                statuses[answer.status_code] += 1
                                if answer.status_code == 200 and statuses[200] % 20 == 0:
                                    say(f"{statuses[200]} images under load")
                            if answer.status_code != 429:
                                break
                            time.sleep(0.2)
                        if answer.status_code != 200 or answer.json()["data"][0]["b64_json"] != wanted[kind]:
                            wrong.append((kind, answer.status_code))

            begun, busy = time.monotonic(), drawing_seconds(server)
            threads = [threading.Thread(target=client) for _ in range(clients)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            seconds, after = time.monotonic() - begun, memory(server)
            busy = drawing_seconds(server) - busy
            ranks = server.ranks()
            code = server.terminate()
            left = [rank for rank, process in ranks.items() if process.is_running() and process.status() != "zombie"]
    return {
        "statuses": dict(statuses),
        "wrong": wrong,
        "seconds": round(seconds, 2),
        "share_of_time_in_the_pipeline": round(busy / seconds, 3),
        "memory_mb": {name: [round(before[name], 1), round(after[name], 1)] for name in before},
        "exit_code": code,
        "ranks_left": left,
        "images": len({base64.b64decode(one) for one in wanted}),
    }


def say(text: str) -> None:
    """Tell whoever waits how far this is."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def drawing_seconds(server: Any) -> float:
    """Seconds that the ranks have spent on images, the pipeline's call and what switches LoRAs for it."""
    lines = server.http.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith("xfuser_serve_image_seconds_sum")).split()[1])


def memory(server: Any) -> dict[str, float]:
    """Resident MB of the server and each rank."""
    import psutil

    processes = {"server": psutil.Process(server.process.pid)}
    processes |= {f"rank {rank}": process for rank, process in server.ranks().items()}
    return {name: process.memory_info().rss / 1e6 for name, process in processes.items()}


# ---- the direct loop -----------------------------------------------------------------------------------------------


def direct(requests: int) -> None:
    """Call the pipeline for the same requests; every rank of a torchrun."""
    import torch
    import torch.distributed as dist
    from diffusers import DiffusionPipeline

    import otil_xdit
    from otil_xdit.catalog.bundled import model_folder
    from otil_xdit.catalog.schedulers import make_scheduler

    pipe = otil_xdit.parallelize(DiffusionPipeline.from_pretrained(model_folder(MODEL)), "otil")
    pipe.set_progress_bar_config(disable=True)
    own = pipe.scheduler
    pipe.load_lora_weights(model_folder(LORA), adapter_name="style")
    active: str | None = "style"

    def call(kind: dict[str, Any]) -> None:
        nonlocal active
        lora = kind["lora"]
        if lora != active:
            if lora is None:
                pipe.disable_lora()
            else:
                pipe.enable_lora()
                pipe.set_adapters(["style"], [float(lora.partition(":")[2] or 1)])
            active = lora
        pipe.scheduler = own if kind["scheduler"] is None else make_scheduler(kind["scheduler"], own)
        width, height = map(int, kind["size"].split("x"))
        pipe(
            kind["prompt"],
            width=width,
            height=height,
            num_inference_steps=kind["num_inference_steps"],
            guidance_scale=kind["guidance_scale"],
            generator=torch.Generator().manual_seed(kind["seed"]),
        )

    for kind in kinds():
        call(kind)
    begun = time.monotonic()
    for number in sequence(requests):
        call(kinds()[number])
    if dist.get_rank() == 0:
        print(json.dumps({"seconds": round(time.monotonic() - begun, 2)}), flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--queue", type=int, default=8)
    parser.add_argument("--loops", type=int, default=2, choices=(0, 2), help="direct loops beside the server")
    asked = parser.parse_args()
    if "RANK" in os.environ:
        direct(asked.requests)
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    loops = []

    def loop() -> None:
        done = subprocess.run([*command, "--requests", str(asked.requests)], capture_output=True, text=True, check=True)
        loops.append(json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))["seconds"])

    if asked.loops:
        loop()
    measured = load(asked.clients, asked.requests, asked.queue)
    if asked.loops:
        loop()  # before and after, as other work on the machine comes and goes
        measured |= {"direct_seconds": loops, "share_of_direct": round(min(loops) / measured["seconds"], 3)}
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
