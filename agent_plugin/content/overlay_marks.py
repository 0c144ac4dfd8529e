"""The marks of an overlay's upper directory, as the kernel's overlayfs has them.

Who may set `trusted.` attributes uses those, like overlayfs itself; who may not uses `user.`, like
overlayfs with `userxattr`. A whiteout is a character device 0:0; where the file system does not
allow one it is an empty file with a mark, and its directory says so in its `opaque` mark.

Source: https://docs.kernel.org/filesystems/overlayfs.html (whiteouts and opaque directories,
redirect_dir, metadata only copy up, user xattr).
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent_plugin.content.errors import LocalWriteError, local_write_error

# The directory hides what is below it; it has whiteouts that are files.
OPAQUE: Final = b"y"
HAS_WHITEOUT_FILES: Final = b"x"
# Beside an upper directory: which attributes its marks are. Who writes to the mount has no way to
# it, and so can not make marks of what are ordinary attributes there.
_MARKS_FILE: Final = "marks"
_TRUSTED: Final = "trusted"
_USER: Final = "user"


@dataclass(frozen=True, slots=True)
class Marks:
    """The names of one of the two kinds."""

    space: str

    @property
    def opaque(self) -> str:
        """On a directory: OPAQUE or HAS_WHITEOUT_FILES."""
        return f"{self.space}.overlay.opaque"

    @property
    def redirect(self) -> str:
        """Which input it is: a path from the root with a `/` before it, or a name beside it."""
        return f"{self.space}.overlay.redirect"

    @property
    def metacopy(self) -> str:
        """On a file: its content is still that of an input."""
        return f"{self.space}.overlay.metacopy"

    @property
    def whiteout(self) -> str:
        """On an empty file: there is nothing of this name."""
        return f"{self.space}.overlay.whiteout"

    def is_whiteout(self, directory: int, name: str | bytes, status: os.stat_result) -> bool:
        """Whether a name in an upper directory says that there is none.

        Raises:
            OSError: It can not be read.
        """
        if stat.S_ISCHR(status.st_mode):
            return status.st_rdev == 0
        if not stat.S_ISREG(status.st_mode) or status.st_size:
            return False
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        except PermissionError:
            # Somebody's own: nobody changes the mode of a mark.
            return False
        try:
            return read_mark(fd, self.whiteout) is not None
        finally:
            os.close(fd)


TRUSTED_MARKS: Final = Marks(_TRUSTED)
USER_MARKS: Final = Marks(_USER)


def read_mark(fd: int, name: str) -> bytes | None:
    """Return a mark of what is open; None when there is none."""
    try:
        return os.getxattr(fd, name)
    except OSError:
        return None


def redirected(redirect: bytes, path: str) -> str:
    """Return which input a redirect names: from the root, or one beside the input at `path`."""
    target = os.fsdecode(redirect)
    above = "" if target.startswith("/") else path.rpartition("/")[0]
    return f"{above}/{target}".lstrip("/")


def marks_of(upper: Path) -> Marks:
    """Return which marks an upper directory has; overlayfs's own unless others were noted."""
    try:
        space = upper.with_name(_MARKS_FILE).read_text(encoding="ascii")
    except FileNotFoundError:
        return TRUSTED_MARKS
    return Marks(_USER if space == _USER else _TRUSTED)


def note_marks(upper: Path, marks: Marks) -> None:
    """Note which marks an upper directory has, before the first is made.

    Raises:
        LocalWriteError: It has others already, or it can not be noted.
        NoSpaceError: There is no room to note it.
    """
    try:
        with os.scandir(upper) as entries:
            if marks != marks_of(upper) and any(entries):
                raise LocalWriteError(
                    f"{upper} has marks that this process can not read",
                    hint="mount it as the user who mounted it before",
                )
        if marks == USER_MARKS:
            upper.with_name(_MARKS_FILE).write_text(marks.space, encoding="ascii")
    except OSError as error:
        raise local_write_error(error, os.fspath(upper.parent)) from error
