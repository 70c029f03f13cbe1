"""A task whose ranks do what they are told, for tests of `otil_xdit.tools.common.jobs`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from otil_xdit.tools.common.worker import Answer


class ObedientTask:
    """Ranks that answer with their number, or raise, or sleep for a minute, as each is asked to."""

    def load(self) -> Callable[[str | None], Answer]:
        """Return what obeys."""
        return obey


def obey(question: str | None) -> Answer:
    """Do as the question says."""
    if question == "sleep":
        time.sleep(60)
    if question == "raise":
        raise ValueError("as told")
    return {"rank": int(os.environ["RANK"]), "question": question}
