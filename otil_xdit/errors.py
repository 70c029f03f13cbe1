"""Every exception that a user may catch."""

from __future__ import annotations


class ExchangeTimeout(RuntimeError):
    """The other ranks did not answer in time, or the connection to them broke, or one of them failed."""


class NotFinite(RuntimeError):
    """NaN or Inf among the numbers of a rank.

    Args:
        message: with rank, layer and step.
        order: step, and place of the layer's call in it.
    """

    def __init__(self, message: str, order: tuple[int, int]) -> None:
        super().__init__(message)
        self.order = order


class PipelineBusyError(ValueError):
    """A call that cannot have its turn, as others are under way here or on another rank; nothing is broken by it."""


class NotInStages(ValueError):
    """A network that cannot be cut."""


class FlagError(ValueError):
    """A command line that cannot be run; the message is one line that names flag, value and what is accepted."""
