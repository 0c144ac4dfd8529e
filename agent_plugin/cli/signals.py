"""What SIGINT and SIGTERM do to a command: it ends within a second, in order, with `cancelled`.

By default they raise in the main thread, wherever it is: reading a pipe, asking a person, printing.
Work that has to be stopped in an orderly way, or that other threads do, lends itself a cancellation
meanwhile. The second signal, of either kind, ends the process as if nothing had been installed.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

from agent_plugin.content.store import Cancellation

_NUMBERS: Final = (signal.SIGINT, signal.SIGTERM)


def raise_on_signals() -> None:
    """Have SIGINT and SIGTERM raise KeyboardInterrupt; a second signal ends the process."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    _install(interrupt)


@contextmanager
def cancel_on_signals() -> Iterator[Cancellation]:
    """Lend a cancellation that SIGINT and SIGTERM wish; a second signal ends the process.

    Whoever uses it has to check it, and must not wait for a server in the main thread. Afterwards
    signals raise again; a wish that came too late to be heeded is forgotten with the work done.
    """
    cancellation = Cancellation()
    _install(cancellation.cancel)
    try:
        yield cancellation
    finally:
        raise_on_signals()


def _install(react: Callable[[], None]) -> None:
    def on_signal(_number: int, _frame: FrameType | None) -> None:
        for number in _NUMBERS:
            signal.signal(number, signal.SIG_DFL)
        react()

    for number in _NUMBERS:
        signal.signal(number, on_signal)
