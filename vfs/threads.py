"""Pools of threads, which make do with those there are where the host gives no more.

A render may start so many that the limit of its cgroup (pids.max) or user (RLIMIT_NPROC) is
reached. ThreadPoolExecutor raises then, and carries the work out later all the same.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from agent_plugin.content.errors import LocalReadError

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Threads(ThreadPoolExecutor):
    """A pool; threads are started as they are needed."""

    # Tasks for which a thread could not be started; when each ends, one more thread is taken to be
    # idle than is.
    _refused = 0

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> "Future[_T]":
        """Have a thread call something; what finds none free waits for one.

        Raises:
            LocalReadError: The host gives no thread, and there is none yet; nothing is called.
            RuntimeError: The pool was shut down.
        """
        future = super().submit(fn, *args, **kwargs)
        if not self._threads and future.cancel():
            raise LocalReadError(
                "this host gives no further thread",
                hint="raise the limit: pids.max of the cgroup (TasksMax of a unit), or ulimit -u",
            )
        return future

    def _adjust_thread_count(self) -> None:
        while self._refused and self._idle_semaphore.acquire(timeout=0):
            self._refused -= 1
        try:
            super()._adjust_thread_count()
        except RuntimeError:
            self._refused += 1
