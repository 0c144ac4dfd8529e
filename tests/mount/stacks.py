"""The writable mounts that the suites of this directory run in: who serves, and who takes writes.

A new combination is one line in STACKS. What one of them can not do is said beside it and nowhere
else, so that a test that passes something over does so for a reason that somebody can read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stack:
    """One way to a writable mount.

    Attributes:
        transport: Who speaks to the kernel.
        writes: Who takes what is written.
        lacks: What is refused here and not on ext4, and why.
        differs: What has another outcome than on ext4, and when.
    """

    transport: str
    writes: str
    lacks: Mapping[str, str] = field(default_factory=dict)
    differs: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.transport}-{self.writes}"


# Of the kernel's overlayfs, whatever is below it.
_OF_OVERLAYFS = {
    "mtime": "an input that was changed but for its content has, once it is opened for writing, the"
    " time of that, also if nothing is written",
    "directory mtime": "a directory of inputs from which something could not be moved over a"
    " directory that is not empty has the time of that",
    "links": "an input that was removed while it was open is said to have one name still",
}
_OF_LIBFUSE = {
    "fallocate": "libfuse 2 does not know it",
    "renameat2": "libfuse 2 knows no flags of rename",
    "O_TMPFILE": "libfuse 2 does not know it",
    "open below what was removed": "libfuse 2 knows files by their paths; of these the"
    " attributes are not found",
    "speed": "each level of a path costs a message each time, as the kernel may keep no attributes"
    " of files that have several names",
}
# Of our own overlay.
_OF_OURS = {
    "chown to nobody": "set-user-ID stays when an owner is set to what it is by leaving it out:"
    " the kernel does not ask",
    "exchange": "a request that comes again to a server's successor could be carried out twice",
    "O_TMPFILE": "no request of a name would tell a successor of such a file",
}
STACKS = [
    Stack("kernel", "overlayfs", differs=_OF_OVERLAYFS),
    Stack("fusepy", "overlayfs", differs=_OF_OVERLAYFS),
    Stack("fusepy", "overlay", lacks=_OF_LIBFUSE),
    Stack("kernel", "overlay", lacks=_OF_OURS),
]
