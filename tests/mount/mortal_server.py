"""An overlay's server that is killed at a given change of the disk, in this process."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import pytest

from vfs import overlay, overlay_copy, overlay_files, overlay_nodes, overlay_upper

T = TypeVar("T")

# What changes a disk, of `os`; what a server that is killed does no more.
_CHANGING: Final = frozenset(
    {
        "mknod", "mkdir", "symlink", "link", "unlink", "rmdir", "rename", "chown", "chmod",
        "fchmod", "ftruncate", "utime", "setxattr", "removexattr", "pwrite", "copy_file_range",
        "open", "renameat2", "utimensat",
    }
)  # fmt: skip


class KilledError(BaseException):
    """The server was killed before the next change of the disk."""


class MortalOs:
    """`os`, and a C library's renameat2, for a server that is killed at a given change."""

    def __init__(self, lives: int, of: Any) -> None:
        self.lives = lives
        self._of = of

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._of, name)
        return self._mortal(found) if name in _CHANGING else found

    def _mortal(self, change: Callable[..., T]) -> Callable[..., T]:
        def call(*args: Any, **more: Any) -> T:
            if change is os.open and not (len(args) > 1 and args[1] & os.O_CREAT):
                return change(*args, **more)
            self.die_a_little()
            return change(*args, **more)

        return call

    def die_a_little(self) -> None:
        self.lives -= 1
        if self.lives < 0:
            raise KilledError


@contextmanager
def mortal_server(changes: int) -> Iterator[MortalOs]:
    """Have overlays change the disk so many times, and be killed instead of once more.

    Raises:
        KilledError: In the overlay, at that change and at all that follow.
    """
    mortal = MortalOs(changes, os)
    library = MortalOs(0, overlay_upper._libc)
    library.die_a_little = mortal.die_a_little  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        for module in (overlay, overlay_copy, overlay_files, overlay_nodes, overlay_upper):
            patch.setattr(module, "os", mortal)
        patch.setattr(overlay_upper, "_libc", library)
        yield mortal
