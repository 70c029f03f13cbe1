"""The key-value store in which the ranks found each other: what is used of it."""

from __future__ import annotations

from datetime import timedelta
from typing import Protocol

POLL_SECONDS = 0.25


STORE_SECONDS = 2.0
"""What the store may take for one answer, which is below a millisecond otherwise."""


class Store(Protocol):
    """What is used of a `torch.distributed.Store`; all raise `RuntimeError` where it is gone."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def wait(self, keys: list[str], timeout: timedelta) -> None: ...
    def delete_key(self, key: str) -> bool: ...


def _own_connection(store: Store) -> Store:
    """A connection to the same store that blocks nobody else; where torch has no way to make one, the store itself."""
    clone = getattr(store, "clone", None)
    return store if clone is None else clone()
