"""Whether a process that was sent a signal is about to end of it.

FUSE tells a server of each signal that a caller gets while it waits, also of those that it handles
or ignores; on a disk only one that ends it has it leave a system call of a regular file's.

Source: proc_pid_status(5), signal(7). Of a signal that ends a process and dumps no core the kernel
makes a SIGKILL for each of its threads.
"""

import signal
from pathlib import Path
from typing import Final

_HARMLESS: Final = frozenset(
    {
        *(signal.SIGCHLD, signal.SIGURG, signal.SIGWINCH, signal.SIGCONT),
        *(signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU),
    }
)
_KILL: Final = 1 << (signal.SIGKILL - 1)
# Those that end a process, unless it has said otherwise.
_ENDING: Final = sum(1 << (number - 1) for number in range(1, 65) if number not in _HARMLESS)


def is_ending(thread: int) -> bool:
    """Whether a thread is to end, or has ended, or can not be looked at.

    Args:
        thread: Its number, as this process sees it; 0 if it does not.
    """
    try:
        lines = Path(f"/proc/{thread}/status").read_bytes().splitlines()
    except OSError:
        return True
    masks = {
        name: int(value, 16)
        for name, _, value in (line.partition(b":\t") for line in lines)
        if name in (b"SigPnd", b"ShdPnd", b"SigBlk", b"SigIgn", b"SigCgt")
    }
    heeded = ~(masks[b"SigBlk"] | masks[b"SigIgn"] | masks[b"SigCgt"])
    pending = masks[b"SigPnd"] | masks[b"ShdPnd"]
    return bool(masks[b"SigPnd"] & _KILL or pending & heeded & _ENDING)
