"""Carries messages from stdin to the kernel, whose device is stdout.

A process of its own: the kernel may take a message only when a read has been answered that only the
server, or its successor, can answer. A thread that waits for that can not be killed, and a server
with such a thread never ends, so nobody would follow it.

Run by its path, isolated and without anything of ours: it is there within 20 ms.
"""

import os
import sys
from contextlib import suppress

# Source: struct fuse_out_header in linux/fuse.h, whose first field is the message's length.
LENGTH_BYTES = 4


def main() -> None:
    """Go on until nobody sends any more."""
    with os.fdopen(0, "rb") as messages:
        while length := messages.read(LENGTH_BYTES):
            rest = messages.read(int.from_bytes(length, sys.byteorder) - LENGTH_BYTES)
            # ENOENT: the kernel knew nothing of it. ENODEV: the mount is gone.
            with suppress(OSError):
                os.write(1, length + rest)


if __name__ == "__main__":
    main()
