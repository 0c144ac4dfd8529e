"""The end of a FUSE connection, whoever has its device open.

The kernel ends one with the last descriptor of its device, and then refuses all that wait for an
answer. One who waits for those, uninterruptibly, and has such a descriptor (kernel_messenger.py in
vfs) would keep it for ever. The kernel's own way is a file for each connection in a file system of
type fusectl, which need not be mounted anywhere for that.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from agent_plugin.content.detached_mount import mount_detached

# Where a host has it mounted; who may not mount may write to the files of his own mounts there.
_USUAL_PLACE: Final = Path("/sys/fs/fuse/connections")


class FuseConnection:
    """A connection that can be ended, as long as there is one; else nothing happens.

    Args:
        device: Of its mount, `major:minor`, which has to be there now.
    """

    def __init__(self, device: str) -> None:
        # Opened now: the number may soon be another connection's.
        self._abort = -1
        name = f"{device.partition(':')[2]}/abort"
        flags = os.O_WRONLY | os.O_CLOEXEC
        with suppress(OSError):
            directory = _control_files()
            try:
                self._abort = os.open(name, flags, dir_fd=directory)
            finally:
                os.close(directory)

    def abort(self) -> None:
        """Have all requests fail, those to come as well; may be called once."""
        if self._abort < 0:
            return
        # It is gone, perhaps.
        with suppress(OSError):
            os.write(self._abort, b"1")
        os.close(self._abort)
        self._abort = -1


def _control_files() -> int:
    """Return a descriptor of a directory with one directory for each connection.

    Raises:
        OSError: The host has none for this process.
    """
    with suppress(OSError):
        return mount_detached(b"fusectl", {})
    return os.open(_USUAL_PLACE, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
