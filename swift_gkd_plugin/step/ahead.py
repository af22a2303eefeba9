"""What a thread does while the trainer goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Ahead:
    """One call at a time, in a thread of its own.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str):
        self.name = name
        self._pool: ThreadPoolExecutor | None = None
        self._future: Future | None = None

    def __bool__(self) -> bool:
        """Whether something was begun and not collected."""
        return self._future is not None

    def begin(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix=self.name)
        self._future = self._pool.submit(_timed, call, *arguments, **options)

    def collected(self) -> tuple[Any, float]:
        """What the call returned, and the seconds that it took."""
        future, self._future = self._future, None
        return future.result()


def _timed(call: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, float]:
    begin = time.perf_counter()
    return call(*arguments, **options), time.perf_counter() - begin
