"""How often each file is open, and what the kernel reads it from: shared by a mount's servers.

The kernel refuses (EIO) to open a file that is open in another way than it was told before, and its
numbers for backing files outlive the server that got them. So a server that replaces a killed one
has to know both. They are in memory that all servers of a mount share, by node, and each change is
carried out once, at whatever moment the server that makes it is killed: first it is noted down
whole, then made; a successor makes what is noted down once more, and does not count again a request
that the kernel sends again though it was counted.

Concurrency: for one thread at a time, and one process.
"""

import mmap
import os
from typing import Final, NamedTuple

# Nodes beyond are never passed through, so nothing has to be known of them. Memory is used only by
# those that were opened: 8 bytes each.
MOST_NODES: Final = 1 << 24
# Requests that are remembered as counted; those that a killed server left unanswered are fewer.
_REMEMBERED: Final = 1024
# Words of 64 bits: whether files are passed through; the change under way (its request, node, what
# was and what will be); how many requests were counted, and the last of them; then the nodes.
_MODE, _REQUEST, _NODE, _BEFORE, _AFTER, _COUNTED = range(6)
_FIRST_REQUEST: Final = 8
_FIRST_NODE: Final = _FIRST_REQUEST + _REMEMBERED
_WORD: Final = 8
# The kernel marks what it sends again, 7.40; enum FUSE_UNIQUE_RESEND.
_SENT_AGAIN: Final = 1 << 63

PASSES: Final = 1
SERVES: Final = 2


class Opened(NamedTuple):
    """How a node is open.

    Attributes:
        opens: How many there are.
        backing: The kernel's number of the file it reads itself; 0 if the server is asked.
    """

    opens: int = 0
    backing: int = 0

    def packed(self) -> int:
        """Return it as one word, which is written at once."""
        return self.backing << 32 | self.opens


NOT_OPEN: Final = Opened()


class OpenFiles:
    """The open files of one mount; made before the first server is forked."""

    def __init__(self) -> None:
        fd = os.memfd_create("propmaster-open-files")
        try:
            os.ftruncate(fd, (_FIRST_NODE + MOST_NODES) * _WORD)
            self._words = memoryview(mmap.mmap(fd, 0)).cast("Q")
        finally:
            os.close(fd)

    @property
    def mode(self) -> int:
        """What the first server has decided, for all that come after it: PASSES, SERVES, or 0."""
        return self._words[_MODE]

    @mode.setter
    def mode(self, mode: int) -> None:
        self._words[_MODE] = mode

    def __getitem__(self, node: int) -> Opened:
        """Return how a node is open; beyond MOST_NODES that is not known."""
        if node >= MOST_NODES:
            return NOT_OPEN
        word = self._words[_FIRST_NODE + node]
        return Opened(word & 0xFFFFFFFF, word >> 32) if word else NOT_OPEN

    def change(self, request: int, node: int, after: Opened) -> None:
        """Note that a request has changed how a node is open; to be called before its answer.

        Args:
            request: The kernel's number of it.
            node: Below MOST_NODES.
            after: How it is open from now on.
        """
        words, request = self._words, request & ~_SENT_AGAIN
        words[_REQUEST] = 0
        words[_NODE] = node
        words[_BEFORE] = words[_FIRST_NODE + node]
        words[_AFTER] = after.packed()
        # From here on it is done, whatever happens to this process.
        words[_REQUEST] = request
        self._make(request)

    def was_counted(self, request: int) -> bool:
        """Whether the kernel sends a request again that a killed server has carried out."""
        if not request & _SENT_AGAIN:
            return False
        counted = self._words[_FIRST_REQUEST:_FIRST_NODE]
        return request & ~_SENT_AGAIN in counted

    def recover(self) -> int:
        """Bring to an end what a killed server was at.

        Returns:
            A backing file that may still have to be given back to the kernel; 0 if none.
        """
        words = self._words
        if not words[_REQUEST]:
            return 0
        self._make(words[_REQUEST])
        before = words[_BEFORE] >> 32
        return before if not words[_AFTER] >> 32 else 0

    def _make(self, request: int) -> None:
        words = self._words
        words[_FIRST_NODE + words[_NODE]] = words[_AFTER]
        words[_FIRST_REQUEST + words[_COUNTED] % _REMEMBERED] = request
        words[_COUNTED] += 1
