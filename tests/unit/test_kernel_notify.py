"""What the kernel is to forget reaches it, also from a host that is full for a while."""

import os
import select
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from vfs.transports import kernel_protocol as protocol
from vfs.transports.kernel_notify import Notifier

BOUND_SECONDS = 30.0


@pytest.fixture
def device() -> Iterator[tuple[int, int]]:
    """The kernel's end and ours."""
    kernels, ours = os.pipe()
    yield kernels, ours
    os.close(kernels)
    os.close(ours)


def forgotten(kernels: int) -> int:
    """Return the node whose content is to be forgotten."""
    assert select.select([kernels], [], [], BOUND_SECONDS)[0], "nothing comes"
    message = os.read(kernels, protocol.OUT_HEADER.size + protocol.INVAL_INODE.size)
    assert protocol.OUT_HEADER.unpack_from(message)[1] == protocol.NOTIFY_INVAL_INODE
    node, *_ = protocol.INVAL_INODE.unpack_from(message, protocol.OUT_HEADER.size)
    return int(node)


def test_what_could_not_be_told_for_want_of_a_process_is_told_later(
    device: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to be lost, and all that came after it."""
    begin, refused = subprocess.Popen, [BlockingIOError(11, "Resource temporarily unavailable")]

    def full(*words: Any, **options: Any) -> "subprocess.Popen[bytes]":
        if refused:
            raise refused.pop()
        return begin(*words, **options)

    kernels, ours = device
    monkeypatch.setattr(subprocess, "Popen", full)
    notifier = Notifier(ours)
    notifier.forget_content([4711])
    assert forgotten(kernels) == 4711
    notifier.forget_content([4712])
    assert forgotten(kernels) == 4712


def test_what_could_not_be_told_for_want_of_a_thread_is_told_with_the_next(
    device: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to raise in who found that content was wrong."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    kernels, ours = device
    notifier = Notifier(ours)
    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", refuse)
        notifier.forget_content([4711])
    notifier.forget_content([4712])
    assert [forgotten(kernels), forgotten(kernels)] == [4711, 4712]
