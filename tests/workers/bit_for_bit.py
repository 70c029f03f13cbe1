"""Are two commits the same bit for bit? Images of the shipped models on 2 and 4 ranks, as digests and counted bytes.

    git worktree add ../before COMMIT
    (cd ../before && python "$OLDPWD/tests/workers/bit_for_bit.py" make > /tmp/before.json)
    python tests/workers/bit_for_bit.py make > /tmp/after.json
    python tests/workers/bit_for_bit.py compare /tmp/before.json /tmp/after.json

``make`` runs the package of the current directory, whichever commit it is of, and prints one JSON document. Of each
case it holds, rank by rank, a digest of the final latents (None on a rank that does not get them), in some cases of the
image too, and the bytes and messages that were counted, by kind. ``--only WORD`` makes the cases whose name contains
the word. ``compare`` says what differs and ends with exit code 1 where anything does, or where a case failed; cases
that one of the documents lacks are only counted.

What the commits call by different names stands in the first section; nothing else here depends on the commit. It is
one long file that imports nothing from its checkout, because it is run in the checkouts of other commits.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any

# Differences between commits.

SPELLINGS = {
    "block_size": ("block_size", "block"),
    "score_reference": ("score_reference", "against"),
    "extrapolation": ("extrapolation", "predict"),
    "extrapolation_gain": ("extrapolation_gain", "gain"),
    "velocity_damping": ("velocity_damping", "damping"),
    "kv_cache_dtype": ("kv_cache_dtype", "copies"),
}
"""What a setting has been called, the newest name first; settings that are not here have always had theirs."""

OLD_VALUES = {
    "copies": {"auto": "full", "bfloat16": "half", "float8": "small"},
    "predict": {"none": "none", "constant": "constant", "fitted": "measured"},
}
"""What values were called, by the old name of their setting."""

WEIGHTS_FOLDERS = ("weights", "models")


def spelled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as this commit's `OtilConfig` names them and their values."""
    from otil_xdit import OtilConfig

    known = {one.name for one in fields(OtilConfig)}
    found = {}
    for name, value in settings.items():
        here = next(spelling for spelling in SPELLINGS.get(name, (name,)) if spelling in known)
        found[here] = OLD_VALUES[here][value] if here in OLD_VALUES else value
    return found


def parallelized(pipe: Any, case: Case) -> Any:
    """The pipeline under the case's strategy, settings and degrees."""
    import otil_xdit

    config = otil_xdit.get_strategy(case.strategy).make_config(spelled(case.settings))
    degrees = {"ulysses_degree": case.ulysses, "use_cfg_parallel": case.cfg > 1}
    if "how" in inspect.signature(otil_xdit.parallelize).parameters:
        return otil_xdit.parallelize(pipe, config, **degrees)
    return otil_xdit.parallelize(pipe, strategy=case.strategy, config=config, **degrees)


def report_of(pipe: Any) -> Any:
    """What this rank counted during the last image."""
    import otil_xdit

    if hasattr(otil_xdit, "report"):
        return otil_xdit.report(pipe)
    return vars(pipe)["_otil_session"].communicator.report()


def counted(counts: Mapping[Any, Any]) -> dict[str, int]:
    """Counts by ``KIND`` or ``KIND-warmup``, without zeros.

    Args:
        counts: by such a string, by a pair of kind and phase, or by kind and then by phase.
    """
    found: dict[str, int] = {}
    for key, value in counts.items():
        for phase, count in value.items() if isinstance(value, Mapping) else [(None, value)]:
            name = kind_name(*(key if isinstance(key, tuple) else (key,)), *([] if phase is None else [phase]))
            if count:
                found[name] = found.get(name, 0) + count
    return dict(sorted(found.items()))


def kind_name(kind: Any, phase: Any = "") -> str:
    """One spelling for a kind of message and the phase of the run that it is counted in."""
    kind, phase = (str(getattr(part, "value", part)) for part in (kind, phase))
    if not phase:
        return kind
    is_warmup = "".join(filter(str.isalpha, phase.lower())) == "warmup"
    return f"{kind}-warmup" if is_warmup else kind


def model_folder(name: str) -> Path:
    """Where a shipped model lies, in diffusers format."""
    import otil_xdit

    package = Path(otil_xdit.__file__).parent
    return next(package / folder / name for folder in WEIGHTS_FOLDERS if (package / folder / name).is_dir())


# The cases.

MODELS = ("tiny-sd", "tiny-sdxl", "tiny-dit")
PROMPT = "a large red circle on the left and a small blue square on the right, striped background"


@dataclass(frozen=True)
class Case:
    """One image.

    Attributes:
        model: a shipped one.
        strategy: as ``--parallel`` takes it.
        patches, ulysses, cfg: degrees, whose product is the number of ranks.
        label: tells cases apart that are alike in all of the above.
        settings: of the strategy, by their newest names.
        steps: of the sampler; ``otil`` waits for fresh payloads in the first 8 at least, so it has more than that.
        height, width: of the image, in pixels.
        decoded: whether the same call is made once more for the image instead of its latents; the bytes and messages
            are the second call's.
    """

    model: str
    strategy: str
    patches: int = 2
    ulysses: int = 1
    cfg: int = 1
    label: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int = 12
    height: int = 128
    width: int = 128
    decoded: bool = False

    @property
    def name(self) -> str:
        """What ``--only`` looks into and a document has the case under."""
        degrees = f"{self.patches}x{self.ulysses}x{self.cfg}"
        return " ".join(part for part in (self.model, self.strategy, degrees, self.label) if part)

    @property
    def degrees(self) -> tuple[int, int, int]:
        """What xDiT makes a process's groups of ranks for, once."""
        return self.patches, self.ulysses, self.cfg

    @property
    def ranks(self) -> int:
        return self.patches * self.ulysses * self.cfg


def all_cases() -> list[Case]:
    """Every case; those that one torchrun can make are neighbours, and among them those of one model."""
    return sorted(
        [*_published(), *_other_degrees(), *_settings(), *_decoded()], key=lambda case: (case.degrees, case.model)
    )


def _published() -> Iterator[Case]:
    """Every strategy with its defaults on every model."""
    for model in MODELS:
        for patches in (2, 4):
            yield Case(model, "sync", patches, steps=8)
            yield Case(model, "distrifusion", patches, steps=8)
            yield Case(model, "otil-paper", patches, steps=8)
            yield Case(model, "otil", patches)
        for patches in (1, 2):
            yield Case(model, "hybridiff", patches, cfg=2)


def _other_degrees() -> Iterator[Case]:
    """Ranks that share heads, and both guidance passes at once."""
    for model in MODELS:
        yield Case(model, "otil", ulysses=2)
        yield Case(model, "otil", cfg=2)
    yield Case("tiny-dit", "sync", ulysses=2, steps=8)
    yield Case("tiny-sd", "distrifusion", cfg=2, steps=8)


def _settings() -> Iterator[Case]:
    """Settings away from their defaults: at least one case for each that changes what is sent or when."""
    yield Case("tiny-sd", "naive", steps=8)
    yield Case("tiny-dit", "naive", steps=8)
    yield Case("tiny-sd", "compact-2bit", steps=8)
    yield Case("tiny-dit", "compact-2bit", steps=8)
    yield Case("tiny-sdxl", "compact-1bit", steps=8)
    yield Case("tiny-sd", "otil", label="uneven rows", height=160, width=96)
    yield Case("tiny-dit", "otil", label="wide", height=96, width=160)
    for model in ("tiny-sd", "tiny-dit"):
        for label, settings in SETTINGS.items():
            yield Case(model, "otil", label=label, settings=settings, steps=10)
    yield Case("tiny-sd", "hybridiff", 1, cfg=2, label="no guidance", settings={"window": "3:8", **NO_GUIDANCE})


def _decoded() -> Iterator[Case]:
    """Images, and a second call of the same pipeline."""
    for model in MODELS:
        yield Case(model, "otil", label="image", decoded=True)
    for model in ("tiny-sd", "tiny-dit"):
        yield Case(model, "hybridiff", cfg=2, label="image", decoded=True)


NO_GUIDANCE = {"window_guidance": "none"}
DISPLACED = {"fresh_share": 0.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "raw": {
        **DISPLACED,
        "codec": "raw",
        "ratio": 1 / 8,
        "select": "kv-cosine",
        "polling": 0.5,
        "refresh": 4,
        "tolerance": 0.2,
        "warmup_codec": "raw",
    },
    "int8": {
        **DISPLACED,
        "codec": "int8",
        "ratio": 1 / 2,
        "select": "kv-l2",
        "score_reference": "previous",
        "extrapolation": "constant",
        "extrapolation_gain": 0.5,
        "velocity_damping": 0.5,
        "kv_cache_dtype": "bfloat16",
        "halo": "fresh",
    },
    "int4": {
        **DISPLACED,
        "codec": "int4",
        "ratio": 1 / 4,
        "block_size": 2,
        "select": "random",
        "seed": 5,
        "max_age": 5,
        "kv_cache_dtype": "float8",
        "moments": "fresh",
    },
    "1bit": {
        **DISPLACED,
        "codec": "1bit",
        "ratio": 1 / 2,
        "block_size": 8,
        "select": "latent-ssim",
        "extrapolation": "none",
        "warmup_steps": 3,
        "warmup_codec": "int4",
    },
    "window": {**DISPLACED, "window": "4:8", "select": "latent-dhash"},
    "fresh": {"freshness": "fresh", "check": True},
}


# What the ranks of a torchrun do.


def run(names: list[str], into: Path) -> None:
    """Make cases of the same degrees, in that order; rank 0 appends a line of JSON for each to the file `into`."""
    import torch
    import torch.distributed as dist

    import otil_xdit

    otil_xdit.register()
    torch.set_num_threads(1)
    by_name = {case.name: case for case in all_cases()}
    for model, cases in groupby((by_name[name] for name in names), key=lambda case: case.model):
        pipe = load(model)
        for case in cases:
            started = time.perf_counter()
            found = by_rank(made(pipe, case))
            if dist.get_rank() == 0:
                line = {"case": case.name, "found": found, "seconds": time.perf_counter() - started}
                with into.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def load(model: str) -> Any:
    """The diffusers pipeline of a shipped model, float32."""
    import torch
    from diffusers import DiffusionPipeline

    folder = model_folder(model)
    index = json.loads((folder / "model_index.json").read_text())
    absent = {part: None for part, kind in index.items() if kind == [None, None]}
    return DiffusionPipeline.from_pretrained(str(folder), torch_dtype=torch.float32, use_safetensors=True, **absent)


def made(pipe: Any, case: Case) -> dict[str, Any]:
    """This rank's part of a case; `pipe` is afterwards as before."""
    import torch

    import otil_xdit

    parallel = parallelized(pipe, case)
    parallel.set_progress_bar_config(disable=True)
    found: dict[str, Any] = {}
    for what, output_type in (("latents", "latent"), ("image", "pt"))[: 1 + case.decoded]:
        output = parallel(
            PROMPT,
            height=case.height,
            width=case.width,
            num_inference_steps=case.steps,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(3),
            output_type=output_type,
        )
        found[what] = None if output is None else digest(output.images)
    report = report_of(parallel)
    otil_xdit.restore(parallel)
    return {**found, "bytes": counted(report.sent_bytes), "messages": counted(report.messages)}


def digest(values: Any) -> str:
    """Of latents or an image, float32 [B, C, h, w]."""
    return hashlib.sha256(values.float().contiguous().cpu().numpy().tobytes()).hexdigest()


def by_rank(found: dict[str, Any]) -> dict[str, list[Any]]:
    """Every rank's values, by what they are."""
    import torch.distributed as dist

    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, found)
    return {key: [rank[key] for rank in ranks] for key in found}


# What starts them.

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
"""Fast ranks on a CPU."""

START_SECONDS, CASE_SECONDS = 120, 40
"""What a torchrun may take, and what for each of its cases more."""


def make(only: str) -> dict[str, Any]:
    """A document with the cases whose name contains `only`."""
    document: dict[str, Any] = {"commit": commit(), "cases": {}, "failed": {}}
    cases = [case for case in all_cases() if only in case.name]
    for _, alike in groupby(cases, key=lambda case: case.degrees):
        todo = list(alike)
        while todo:
            found, error = torchrun(todo)
            document["cases"] |= found
            todo = [case for case in todo if case.name not in found]
            if todo:  # a case that fails ends its torchrun; the next one makes those after it
                failed = todo.pop(0)
                document["failed"][failed.name] = error
                print(f"  failed  {failed.name}: {error}", file=sys.stderr, flush=True)
    return document


def commit() -> str:
    """What is checked out in the current directory."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def torchrun(cases: list[Case]) -> tuple[dict[str, Any], str]:
    """What the ranks found, by the name of the case, and why they stopped if they did not make them all."""
    with tempfile.TemporaryDirectory() as folder:
        into, log = Path(folder) / "found.jsonl", Path(folder) / "log.txt"
        into.touch()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        command += [str(cases[0].ranks), str(Path(__file__).resolve()), "run", "--into", str(into)]
        environment = {**ENVIRONMENT, **os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), environment.get("PYTHONPATH")]))
        command += [case.name for case in cases]
        with (
            log.open("w") as file,
            subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True) as process,
        ):
            follow(process, into, time.monotonic() + START_SECONDS + CASE_SECONDS * len(cases))
        lines = [json.loads(line) for line in into.read_text().splitlines()]
        return {line["case"]: line["found"] for line in lines}, reason(log.read_text(errors="replace"))


def reason(log: str) -> str:
    """The last line of a rank's traceback in what a torchrun wrote."""
    lines = [line for line in log.splitlines() if line.startswith("[rank")] or log.splitlines()
    return lines[-1] if lines else "no output"


def follow(process: subprocess.Popen[bytes], into: Path, deadline: float) -> None:
    """Say on stderr what has been made, until the torchrun ends; kill it at the deadline."""
    told = 0
    while True:
        running = process.poll() is None
        text = into.read_text()
        for line in text[: text.rfind("\n") + 1].splitlines()[told:]:
            found = json.loads(line)
            told += 1
            print(f"{found['seconds']:6.1f} s  {found['case']}", file=sys.stderr, flush=True)
        if not running:
            return
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)  # torchrun's workers outlive it otherwise
        time.sleep(0.2)


# What compares them.


def compare(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Print what differs between two documents; whether nothing does."""
    failed = {**old["failed"], **new["failed"]}
    for name, error in failed.items():
        print(f"{name}: failed: {error}")
    common = [name for name in old["cases"] if name in new["cases"]]
    differing = {name: found for name in common if (found := differences(old["cases"][name], new["cases"][name]))}
    for name, found in differing.items():
        print(f"{name}: {'; '.join(found)}")
    equal = len(common) - len(differing)
    left_out = len({*old["cases"], *new["cases"]} - {*common} - {*failed})
    print(f"{equal} equal, {len(differing)} differ, {len(failed)} failed, {left_out} in one of the files only")
    return equal > 0 and not differing and not failed


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two commits' results of one case."""
    found = []
    for what in ("latents", "image"):
        pairs = zip(old.get(what, []), new.get(what, []), strict=True)
        ranks = [rank for rank, pair in enumerate(pairs) if pair[0] != pair[1]]
        found += [f"{what} of rank {', '.join(map(str, ranks))}"] if ranks else []
    for what in ("bytes", "messages"):
        for rank, (before, after) in enumerate(zip(old[what], new[what], strict=True)):
            kinds = [kind for kind in sorted({*before, *after}) if before.get(kind, 0) != after.get(kind, 0)]
            found += [f"{what} of rank {rank}, {kind}: {before.get(kind, 0)}, {after.get(kind, 0)}" for kind in kinds]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", allow_abbrev=False, help="make the images and print a document")
    making.add_argument("--only", default="", metavar="WORD", help="cases whose name contains it")
    comparing = commands.add_parser("compare", allow_abbrev=False, help="compare two documents")
    comparing.add_argument("documents", nargs=2, type=Path, metavar="FILE")
    running = commands.add_parser("run", allow_abbrev=False, help="what the ranks of a torchrun run")
    running.add_argument("--into", type=Path, required=True)
    running.add_argument("names", nargs="+")
    given = parser.parse_args()
    if given.command == "run":
        run(given.names, given.into)
        return 0
    if given.command == "compare":
        return not compare(*(json.loads(path.read_text()) for path in given.documents))
    document = make(given.only)
    print(json.dumps(document, indent=1))
    return bool(document["failed"] or not document["cases"])


if __name__ == "__main__":
    sys.exit(main())
