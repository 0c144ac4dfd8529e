"""Results of several executions in one directory: whether they can stand there together. Pure.

Everything that can not is found before anything is written: a merge that stops half-way would leave
a directory that nobody can tell from a whole one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from agent_plugin.content.errors import ResultClashError

_SHOWN: Final = 20


@dataclass(frozen=True, slots=True, order=True)
class Clash:
    """A path that can have only one of what is wanted there.

    Attributes:
        path: Where.
        between: Who has something for it: executions, or what stands there.
    """

    path: str
    between: tuple[str, ...]


def find_clashes(results: Mapping[str, Mapping[str, object]]) -> list[Clash]:
    """Return where results can not stand together, ascending by path.

    Equal content at one path is no clash. A file where another result needs a directory is one.

    Args:
        results: By execution, the content (whatever is equal only for equal content) by path.
    """
    contents: dict[str, dict[object, list[str]]] = {}
    for execution, files in results.items():
        for path, content in files.items():
            contents.setdefault(path, {}).setdefault(content, []).append(execution)
    clashes = [
        Clash(path, tuple(sorted(each for who in found.values() for each in who)))
        for path, found in contents.items()
        if len(found) > 1
    ]
    needed: dict[str, str] = {}
    for path in contents:
        for above in _above(path):
            needed.setdefault(above, path)
    clashes += [
        Clash(path, (*sorted({e for who in found.values() for e in who}), f"{needed[path]}"))
        for path, found in contents.items()
        if path in needed
    ]
    return sorted(clashes)


def refuse(clashes: Sequence[Clash], what: str, hint: str) -> None:
    """Do nothing if there are no clashes.

    Args:
        clashes: What was found.
        what: What they keep from being done.
        hint: What to do about it.

    Raises:
        ResultClashError: There are; the first of them are named.
    """
    if not clashes:
        return
    lines = [f"{clash.path}: {', '.join(clash.between)}" for clash in clashes[:_SHOWN]]
    if len(clashes) > _SHOWN:
        lines.append(f"and {len(clashes) - _SHOWN} more")
    paths = "1 path" if len(clashes) == 1 else f"{len(clashes)} paths"
    raise ResultClashError(f"{what}: {paths}: {'; '.join(lines)}", hint=hint)


def _above(path: str) -> Iterable[str]:
    parent = path.rpartition("/")[0]
    while parent:
        yield parent
        parent = parent.rpartition("/")[0]
