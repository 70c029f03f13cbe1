"""What ranks do in tests of `otil_xdit.tools.common.jobs` and of tools that start some."""

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


def raise_on_rank_1() -> Answer:
    """Fail on one rank."""
    if os.environ["RANK"] == "1":
        raise ArithmeticError("as told")
    return {}
