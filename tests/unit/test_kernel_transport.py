"""Requests that are answered later: whatever comes of them, the kernel gets an answer."""

import errno
import os
import select
from collections.abc import Callable, Iterator
from typing import NoReturn, cast

import pytest

from agent_plugin.content import events
from agent_plugin.content.store import Cancellation
from vfs.nodes import Nodes
from vfs.transports import kernel_protocol as protocol
from vfs.transports.kernel_transport import KernelTransport

BOUND_SECONDS = 30.0
REQUEST = 4711


class Panic(BaseException):
    """As what a panic of obstore becomes (pyo3's PanicException), which is no Exception."""


class NoNodes:
    """Nothing is asked of them."""

    writable = None


class Rig:
    """A transport, and the kernel's end of its device."""

    def __init__(self) -> None:
        self.answers, self._fd = os.pipe()
        self.transport = KernelTransport(self._fd, cast("Nodes", NoNodes()))

    def close(self) -> None:
        self.transport._threads.shutdown()
        os.close(self.answers)
        os.close(self._fd)

    def error_of(
        self, obtain: Callable[[Cancellation], bytes], answer: Callable[[bytes], None]
    ) -> int:
        """Return what a request is refused with."""
        self.transport._later(self.transport._threads, REQUEST, obtain, answer)
        assert select.select([self.answers], [], [], BOUND_SECONDS)[0], "nobody answers"
        length, error, unique = protocol.OUT_HEADER.unpack(os.read(self.answers, 4096))
        assert (length, unique) == (protocol.OUT_HEADER.size, REQUEST)
        return -int(error)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def panic(_: object) -> NoReturn:
    raise Panic("no thread can be started")


def test_a_request_that_fails_by_what_is_no_exception_is_answered(
    rig: Rig, expected_events: set[str]
) -> None:
    """Seen to go unanswered: whoever reads waits for ever."""
    expected_events.add(events.MOUNT_REQUEST_CRASHED)

    assert rig.error_of(panic, lambda _: None) == errno.EIO
    assert rig.error_of(lambda _: b"", panic) == errno.EIO
