"""How much memory processes take for themselves, with all that they have started.

A call of the host service shares with the service what that had loaded before it forked; only what
is its own counts. To tell it apart the kernel has to go through the process's pages, so that is
done only where all together, what is shared among it, would be too much.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

_ALL: Final = frozenset({"RssAnon", "VmSwap"})
_OWN: Final = frozenset({"Private_Dirty", "SwapPss"})


def own_memory(pids: list[int], *, above: int) -> Mapping[int, int]:
    """Return the bytes that each of some processes takes for itself; empty if not `above` so many.

    Args:
        pids: The processes; what they have started counts for them.
        above: Bytes; as long as all of them together take no more, nobody needs to know.

    A process that has ended takes nothing.
    """
    families = {pid: [*family_of(pid)] for pid in pids}
    if sum(_bytes_of(each, "status", _ALL) for all_ in families.values() for each in all_) <= above:
        return {}
    own = {
        pid: sum(_bytes_of(each, "smaps_rollup", _OWN) for each in all_)
        for pid, all_ in families.items()
    }
    return own if sum(own.values()) > above else {}


def family_of(pid: int) -> Iterator[int]:
    """Yield a process and those that it has started and that have not lost their parents."""
    yield pid
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_bytes().split():
                yield from family_of(int(child))


def _bytes_of(pid: int, file: str, names: frozenset[str]) -> int:
    """Return the sum of some fields of a file of /proc, which are in KiB."""
    size = 0
    with suppress(OSError):
        for line in (
            Path(f"/proc/{pid}/{file}").read_text(encoding="ascii", errors="replace").splitlines()
        ):
            name, _, value = line.partition(":")
            if name in names:
                size += int(value.split()[0]) * 1024
    return size
