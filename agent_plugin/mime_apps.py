"""`mimeapps.list`: which program opens what, in a file that belongs to its user.

It is read and changed as bytes, line by line; lines that are not asked for stay as they are, with
their line ends, comments and order. Pure.

Source: https://specifications.freedesktop.org/mime-apps-spec/latest/
"""

import re
from typing import Final

_GROUP: Final = b"[Default Applications]"
_LINE: Final = re.compile(rb"[^\n]*\n|[^\n]+")


class Defaults:
    """The group of defaults in a list.

    Args:
        data: The file's bytes.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._lines = _LINE.findall(data)
        self._group = next(
            (at for at, line in enumerate(self._lines) if line.strip() == _GROUP), None
        )

    def line(self, kind: str) -> bytes | None:
        """Return the line that says what opens a type, with its line end; None without one."""
        at = self._find(kind)
        return None if at is None else self._lines[at]

    def names(self, kind: str) -> list[str]:
        """Return the desktop entries for a type, the preferred first."""
        line = self.line(kind)
        if line is None:
            return []
        value = line.partition(b"=")[2].strip()
        return [name.decode("utf-8", "replace") for name in value.split(b";") if name.strip()]

    def first(self, kind: str) -> str:
        """Return the preferred desktop entry for a type; empty without one."""
        return next(iter(self.names(kind)), "")

    def preferring(self, kind: str, name: str) -> bytes:
        """Return the file with a desktop entry as the preferred one for a type.

        Those that were there follow, as what is used when the first is gone.
        """
        if self.first(kind) == name:
            return self._data
        others = [each for each in self.names(kind) if each != name]
        return self._with(kind, self._made(kind, [name, *others]))

    def without(self, kind: str, name: str, before: "Defaults") -> bytes:
        """Return the file without a desktop entry for a type.

        Args:
            kind: The type.
            name: The entry.
            before: As it was before the entry came: if nothing else has changed of the line, it
                becomes what it was.
        """
        names = self.names(kind)
        if name not in names:
            return self._data
        others = [each for each in names if each != name]
        old = before.names(kind)
        if others == [each for each in old if each != name] and name not in old:
            return self._with(kind, before.line(kind))
        return self._with(kind, self._made(kind, others) if others else None)

    def _made(self, kind: str, names: list[str]) -> bytes:
        return f"{kind}={';'.join(names)};\n".encode()

    def _find(self, kind: str) -> int | None:
        """Return the last line for a type, which is what counts when there are several."""
        found, within = None, False
        for at, line in enumerate(self._lines):
            stripped = line.strip()
            if stripped.startswith(b"["):
                within = stripped == _GROUP
            elif within and stripped.partition(b"=")[0].strip() == kind.encode():
                found = at
        return found

    def _with(self, kind: str, line: bytes | None) -> bytes:
        lines = list(self._lines)
        at = self._find(kind)
        if at is not None:
            lines[at : at + 1] = [] if line is None else [line]
            if line is not None and at + 1 < len(lines) and not line.endswith(b"\n"):
                lines[at] += b"\n"
        elif line is not None:
            above = len(lines) - 1 if self._group is None else self._group
            if above >= 0 and not lines[above].endswith(b"\n"):
                lines[above] += b"\n"
            lines[above + 1 : above + 1] = [
                *([_GROUP + b"\n"] if self._group is None else []),
                line,
            ]
        return b"".join(lines)
