"""Part "cards": the devices, and the versions of what drives them."""

from __future__ import annotations

import shutil
import socket
import subprocess
from typing import Any

import psutil
import torch
import torch.distributed as dist

from otil_xdit.tools.check.runner import Check, Finding
from otil_xdit.tools.common.environment import machine
from otil_xdit.tools.common.tables import table


def run(check: Check) -> Finding:
    """Ask every rank for its device."""
    ranks = check.ask(describe_device)
    names = dict.fromkeys(one["name"] for one in ranks)
    is_mixed = len({one["capability"] for one in ranks}) > 1
    wrong = ("cards of different compute capability may round differently, so copies may differ",) * is_mixed
    driver = nvidia_driver() if check.settings.cards else None
    columns = {
        "rank": lambda one: str(one["rank"]),
        "device": lambda one: one["name"],
        "memory, GB": lambda one: f"{one['memory_bytes'] / 1e9:.1f}",
        "compute capability": lambda one: one["capability"] or "",
        "NCCL": lambda one: one["nccl"] or "",
    }
    shared = " (one card for all)" if check.settings.shares_card else ""
    said = f"{len(ranks)} ranks on {', '.join(names)}{shared}"
    versions = f"torch {ranks[0]['torch']}, CUDA {ranks[0]['cuda']}, driver {driver}"
    return Finding(said, {"ranks": ranks, "driver": driver}, f"{versions}.\n\n{table(columns, ranks)}", wrong)


def describe_device() -> dict[str, Any]:
    """Describe this rank's device."""
    facts = {"rank": dist.get_rank(), "host": socket.gethostname(), "torch": torch.__version__}
    if not torch.cuda.is_available():
        cpu = {"name": machine()["cpu"], "memory_bytes": psutil.virtual_memory().total}
        return {**facts, **cpu, "capability": None, "nccl": None, "cuda": None}
    card = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        **facts,
        "name": card.name,
        "memory_bytes": card.total_memory,
        "capability": f"{card.major}.{card.minor}",
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else None,
        "cuda": torch.version.cuda,
    }


def nvidia_driver() -> str | None:
    """Return the version of NVIDIA's driver; None where its tool is not there."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return next(iter(done.stdout.split()), None)
