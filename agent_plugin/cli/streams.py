"""The standard streams: usable however the caller left them, and honest about what was lost.

A result that can not be written is an expected failure with an exit code of its own. What can not
be written to standard error can not be told to anybody: the command goes on without it.
"""

import io
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TextIO

from agent_plugin.content.errors import PropmasterError, local_write_error

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_STDIN: Final = 0
_STDOUT: Final = 1
_STDERR: Final = 2


class _Output(io.FileIO):
    """Standard output.

    Raises:
        NoSpaceError, LocalWriteError: From anything that prints.
        BrokenPipeError: Nobody reads any more.
    """

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise local_write_error(error, "standard output") from error


class _Errors(io.FileIO):
    """Standard error."""

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(memoryview(data))


def prepare() -> None:
    """Open what was closed, as /dev/null, and replace standard output and standard error.

    Before anything else is opened: a file of ours that got a closed stream's number would be read
    or written as that stream. Names that are not UTF-8 are escaped where they can not be printed.
    """
    for number in (_STDIN, _STDOUT, _STDERR):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is this one.
            os.open(os.devnull, os.O_RDWR)
    if sys.stdin is None:
        sys.stdin = os.fdopen(_STDIN, closefd=False)
    sys.stdout = _text(_Output(_STDOUT, "w", closefd=False), sys.stdout)
    sys.stderr = _text(_Errors(_STDERR, "w", closefd=False), sys.stderr)


def flush_output() -> None:
    """Write what was printed, as far as it can be written."""
    with suppress(OSError, PropmasterError):
        sys.stdout.flush()
        return
    drop_output()


def drop_output() -> None:
    """Forget what was printed and not written; Python would complain again while it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)


def _text(raw: io.FileIO, before: TextIO | None) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=before.encoding if before is not None else "utf-8",
        errors="backslashreplace",
        line_buffering=raw.isatty() or raw.fileno() == _STDERR,
    )
