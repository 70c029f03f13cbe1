"""Makes the images that are missing, and says which case failed and why."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tqdm import tqdm

from otil_xdit.tools.common.jobs import Job, JobFailed, Jobs
from otil_xdit.tools.common.progress import progress
from otil_xdit.tools.eval.cache import DrawnImage, ImageCache
from otil_xdit.tools.eval.matrix import Call, Case, Matrix
from otil_xdit.tools.eval.tasks import PipelineSpec, PipelineTask, Question

Failures = dict[Case, str]
"""What went wrong, one line for each case that could not be made."""


class ImageMaker:
    """Makes every image of a matrix that the cache has not.

    Args:
        matrix: what to make.
        cache: where it is kept.
        jobs: starts the ranks.
    """

    def __init__(self, matrix: Matrix, cache: ImageCache, jobs: Jobs) -> None:
        self._matrix, self._cache, self._jobs = matrix, cache, jobs

    def make(self, processes: int) -> Failures:
        """Make the images.

        Args:
            processes: that references are shared out over.

        Returns:
            The cases that failed; every other one is in the cache.

        Raises:
            Interrupted: after a signal.
        """
        failures = self._make((*self._matrix.references, *self._matrix.floors(1)), processes)
        for ranks in self._matrix.ranks:
            for alone, floor in zip(self._matrix.floors(1), self._matrix.floors(ranks), strict=True):
                reason = failures.get(floor.reference) or failures.get(alone)
                failures |= {} if reason is None else {floor: reason}
            cases = []
            for case in self._matrix.cases(ranks):
                if case.reference in failures:
                    failures[case] = f"no image of one process to compare with ({failures[case.reference]})"
                else:
                    cases.append(case)
            # xDiT's groups of ranks are made once a process, for one number of patches.
            for patches in dict.fromkeys(case.patches for case in cases):
                failures |= self._make([case for case in cases if case.patches == patches], ranks)
        return failures

    def _make(self, cases: Sequence[Case], ranks: int) -> Failures:
        """Make cases that run on the same ranks. One that fails ends them, and new ones go on with the next."""
        failures: Failures = {}
        while todo := [case for case in cases if case not in failures and self._cache.missing(case)]:
            # Variants with the same settings share their images.
            total = len({self._cache.path(case, call) for case in todo for call in self._cache.missing(case)})
            with progress(total, "image", "one process" if todo[0].variant is None else f"{ranks} ranks") as bar:
                failures |= self._make_until_failure(todo, ranks, bar)
        return failures

    def _make_until_failure(self, cases: Sequence[Case], ranks: int, bar: tqdm) -> Failures:
        case = cases[0]
        try:
            job = self._jobs.start(bar.desc, PipelineTask(), ranks)
            try:
                for case in cases:
                    self._make_case(case, job, bar)
            finally:
                self._jobs.close(job)
        except JobFailed as failure:
            print(f"otil-xdit eval: {case} failed: {failure.reason}; all it wrote is in {failure.log}", file=sys.stderr)
            return {case: failure.reason}
        return {}

    def _make_case(self, case: Case, job: Job, bar: tqdm) -> None:
        """Make a case's images: one process's each on a rank of its own, a variant's by all ranks together."""
        calls = self._cache.missing(case)
        at_once = job.ranks if case.variant is None else 1
        for start in range(0, len(calls), at_once):
            asked = calls[start : start + at_once]
            questions = [self._question(case, call) for call in asked]
            answers = self._jobs.ask(job, questions if case.variant is None else questions * job.ranks)
            for call, answer in zip(asked, filter(None, answers), strict=True):
                self._cache.save(case, call, DrawnImage.from_answer(answer))
                bar.update()

    def _question(self, case: Case, call: Call) -> Question:
        matrix, sampler = self._matrix, case.sampler
        variant = None if case.variant is None else case.variant.text
        changed = None if case.equivalent is None else case.equivalent.text
        parts = case.model.folder, sampler.name, sampler.steps, matrix.lora
        spec = PipelineSpec(*parts, variant, changed, case.cfg_parallel, matrix.dtype)
        frames = matrix.frames if case.model.frames else 0
        return Question(spec, call.prompt, call.seed, matrix.guidance, matrix.size, frames)
