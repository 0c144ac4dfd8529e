"""Renaming to a name that nothing has: what is there, or comes meanwhile, is never replaced."""

import ctypes
import errno
import os
from typing import Final

Place = tuple[int, str]

_NOREPLACE: Final = 1
# What a kernel, a C library or a file system without the flag answers (renameat2(2)).
_NOT_OFFERED: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
# What link(2) answers where there are no hard links, and for a directory.
_NO_LINKS: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})

_libc = ctypes.CDLL(None, use_errno=True)


def rename_new(at: Place, to: Place) -> None:
    """Rename a file or a directory, within its file system.

    Where a file system can not be told to replace nothing, a file is linked, which does not either;
    a directory there, and a file where there are no links, is renamed after a look.

    Args:
        at: The descriptor of a directory, and the name in it.
        to: The same of the new name.

    Raises:
        FileExistsError: Something has the new name; nothing was changed.
        OSError: It can not be renamed.
    """
    if not hasattr(_libc, "renameat2"):
        rename_new_by_link(at, to)
        return
    if not _libc.renameat2(at[0], os.fsencode(at[1]), to[0], os.fsencode(to[1]), _NOREPLACE):
        return
    number = ctypes.get_errno()
    if number not in _NOT_OFFERED:
        raise OSError(number, os.strerror(number), to[1])
    rename_new_by_link(at, to)


def rename_new_by_link(at: Place, to: Place) -> None:
    """Do what `rename_new` does, by what every file system has.

    Raises:
        FileExistsError, OSError: As `rename_new`.
    """
    try:
        os.link(at[1], to[1], src_dir_fd=at[0], dst_dir_fd=to[0], follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    else:
        os.unlink(at[1], dir_fd=at[0])
        return
    try:
        os.stat(to[1], dir_fd=to[0], follow_symlinks=False)
    except FileNotFoundError:
        os.rename(at[1], to[1], src_dir_fd=at[0], dst_dir_fd=to[0])
        return
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), to[1])
