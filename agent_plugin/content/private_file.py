"""A small file of ours that is read whole, and so is written whole: mode 0600, replaced by rename.

Whoever reads it finds what was there before or what is there now, also while several write it. Its
directory is one that only we can write to.
"""

import os
import secrets
from pathlib import Path
from typing import Final

from agent_plugin.content.disk_sync import sync_names
from agent_plugin.content.errors import local_write_error

_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def replace_private_file(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Write a file in place of what is there, or of nothing.

    Args:
        path: In a directory that is there.
        data: All of it.
        durable: What a person has chosen, and has to be there after a power cut. Without, the file
            may be empty then.

    Raises:
        NoSpaceError, LocalWriteError, PathClashError: It can not be written; what is there stays.
    """
    new = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(new, _NEW, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        new.replace(path)
        if durable:
            sync_names(path.parent)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise local_write_error(error, os.fspath(path)) from error
