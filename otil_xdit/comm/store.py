"""`StoreThread`: talk with the key-value store in which the ranks found each other, from a thread that may hang.

A store on a stopped machine may never answer, and whoever asks must be able to go on. So one thread makes all calls,
and others give it jobs and wait for so long at most: while all is well, as long as for another rank, since the store's
keeper is a process like the ranks and may be as busy; once something has failed, `STORE_SECONDS`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Protocol, TypeVar

from torch.distributed import distributed_c10d

T = TypeVar("T")

POLL_SECONDS = 0.25
"""Seconds between two polls of the store."""

SHORTEST_PAUSE, LONGEST_PAUSE = 0.0005, 0.01
"""Seconds between two looks for keys that are waited for: the others often come within a millisecond."""

STORE_SECONDS = 5.0
"""What the store may take for one answer once something has failed; it is below a millisecond otherwise. Longer than
a busy machine lets a process wait, as its keeper would be blamed; shorter than torchrun waits for ranks to end."""


class Store(Protocol):
    """What is used of a `torch.distributed.Store`; all raise `RuntimeError` where it is gone."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def delete_key(self, key: str) -> bool: ...
    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...


def default_store() -> Store:
    """Return the store in which the ranks of the default process group found each other."""
    return distributed_c10d._get_default_store()  # torch has no public way to it


class StoreThread:
    """The thread that makes all calls of one session to the store.

    Args:
        store: where the ranks found each other; the thread uses a connection of its own to it.
        on_poll: called with the store in the thread every `POLL_SECONDS` while polling.
        patience: seconds that one answer may take while nothing has failed.

    Attributes:
        is_silent: whether the store did not answer in time once; it is not asked again then.
    """

    def __init__(self, store: Store, on_poll: Callable[[Store], None], patience: float) -> None:
        self.is_silent = False
        self._store, self._on_poll, self._patience = store, on_poll, patience
        self._jobs: SimpleQueue[Callable[[Store], object] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_polling = False

    def start_polling(self) -> None:
        """Start the thread where it does not run, and poll from now on."""
        if self._thread is None:
            self._store = own_connection(self._store)
            self._thread = threading.Thread(target=self._run, name="otil-xdit store", daemon=True)
            self._thread.start()
        self._is_polling = True
        self.submit(lambda store: None)  # the thread may be waiting for a job without end

    def stop_polling(self) -> None:
        """Poll no more; jobs are still done."""
        self._is_polling = False

    def hurry(self) -> None:
        """Wait for `STORE_SECONDS` at most from now on: something has failed, and the others wait to hear of it."""
        self._patience = min(self._patience, STORE_SECONDS)

    def submit(self, job: Callable[[Store], object]) -> None:
        """Have `job` done in the thread, and do not wait for it."""
        self._jobs.put(job)

    def ask(self, job: Callable[[Store], T]) -> T | None:
        """Return what `job` returns in the thread; None where the store does not answer."""
        answered, found = threading.Event(), []

        def run(store: Store) -> None:
            try:
                found.append(job(store))
            finally:
                answered.set()

        if self.is_silent:
            return None
        self.submit(run)
        if not answered.wait(self._patience) or not found:
            self.is_silent = True
            return None
        return found[0]

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread = None

    def _run(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=POLL_SECONDS if self._is_polling else None)
            except Empty:
                job = self._on_poll
            if job is None:
                return
            with suppress(RuntimeError):  # a store that is gone; whoever asked finds no answer
                job(self._store)


def read(store: Store, key: str) -> bytes | None:
    """Return what stands under a key; None where nothing does. For jobs of a `StoreThread`."""
    return store.get(key) if store.check([key]) else None


def wait_for_keys(store: Store, keys: list[str], seconds: float) -> bool:
    """Return whether all keys are there within `seconds`. For jobs of a `StoreThread`.

    The store's own wait would do, but torch writes a warning, "likely a timeout", each time that it ends without them.
    """
    deadline, pause = time.monotonic() + seconds, SHORTEST_PAUSE
    while not store.check(keys):
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
    return True


def own_connection(store: Store) -> Store:
    """Return a connection to the same store that blocks nobody else; the store itself where torch cannot make one."""
    clone = getattr(store, "clone", None)
    return store if clone is None else clone()
