"""Makes images of single ranks on fake CUDA tensors and prints one JSON object a line: what each step asked for.

python tests/workers/fake_cuda.py '[{"pipeline": "sdxl", "strategy": "otil displaced", "rank": 1}, ...]'
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.fake_cuda.machine import become_cuda_machine  # noqa: E402

become_cuda_machine(8)

import otil_xdit  # noqa: E402

otil_xdit.register()

from tests.support.fake_cuda.budgets import Figures, excesses  # noqa: E402
from tests.support.fake_cuda.launches import Launches  # noqa: E402
from tests.support.fake_cuda.rank import STEPS, Scene, run  # noqa: E402


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for given in json.loads(sys.argv[1]):
        print(json.dumps(outcome(given, steps=given.pop("steps", STEPS))), flush=True)


def outcome(given: dict[str, Any], steps: int) -> dict[str, Any]:
    scene, started = Scene(**given), time.perf_counter()
    try:
        found, backend, report = run(scene, steps)
    except Exception as error:  # a scene that fails is a result, and must not stop the next
        message = str(error).partition("\n")[0][:300]
        places = [f"{Path(at.filename).name}:{at.lineno}" for at in traceback.extract_tb(error.__traceback__)]
        return {"scene": str(scene), "error": f"{type(error).__name__}: {message}", "at": places}
    return {
        "scene": str(scene),
        "error": None,
        "backend": backend,
        "seconds": round(time.perf_counter() - started, 2),
        "steps": [described(step) for step in found],
        "report": None if report is None else report.to_dict(),
        "excesses": excesses(scene, Figures.of(found[-1])),
    }


def described(step: Launches) -> dict[str, Any]:
    return {
        "launches": step.total,
        "bytes": step.total_bytes,
        "own_bytes": step.own_bytes,
        "sites": dict(step.launches.most_common()),
        "site_bytes": dict(step.nbytes.most_common()),
        "host": {f"{what} at {site}": count for (what, site), count in step.host.items()},
        "collectives": {f"{what} at {site}": count for (what, site), count in step.collectives.items()},
        "messages": dict(step.messages),
    }


if __name__ == "__main__":
    main()
