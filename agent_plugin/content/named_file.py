"""Files that a user names: documents of ours, settings, rules.

A pipe is a good name for one, as of a shell's `<(…)`; but one that nobody writes to, or that took
the place of a file, must not be waited for, and neither must a terminal's carrier.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

_READ: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


@contextmanager
def open_named(path: Path, *, regular: bool = False) -> Iterator[BinaryIO]:
    """Open a file for reading; links are followed.

    Args:
        path: As it was named.
        regular: Only a regular file will do.

    Raises:
        OSError: It can not be opened, is of another kind, or is a pipe that nobody writes to.
    """
    fd = os.open(path, _READ)
    try:
        mode = os.fstat(fd).st_mode
        if regular and not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
        # Who writes to a pipe may take its time.
        os.set_blocking(fd, True)
        with open(fd, "rb", closefd=False) as file:
            if stat.S_ISFIFO(mode) and not file.peek(1):
                raise OSError(errno.ENODATA, "nobody writes to this pipe", os.fspath(path))
            yield file
    finally:
        os.close(fd)
