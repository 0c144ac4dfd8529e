"""The settings file: who may have written it, what it says, and in which line it says so."""

import io
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from agent_plugin.content.errors import SettingsInvalidError
from agent_plugin.content.named_file import open_named

# TOML 1.0, as far as it takes to find keys in a text that a parser has accepted.
_KEY_PART: Final = re.compile(
    r"""[ \t]*(?:"(?P<basic>(?:[^"\\\n]|\\.)*)"|'(?P<literal>[^'\n]*)'|(?P<bare>[A-Za-z0-9_-]+))"""
    r"[ \t]*(?P<dot>\.)?"
)
_VALUE_PIECE: Final = re.compile(
    r'"""(?:\\.|[^\\])*?"""+'
    r"|'''.*?'''+"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*'"
    r"|\#[^\n]*"
    r"|(?P<open>[\[{])|(?P<close>[\]}])|(?P<end>\n)"
    r"""|[^"'\#\[\]{}\n]+""",
    re.DOTALL,
)

_INDEXED: Final = re.compile(r"\[\d+\]|(?:(?!\[\d+\]).)+", re.DOTALL)

_Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SettingsFile:
    """A settings file; of one that is absent nothing is said.

    Attributes:
        path: Where it is.
        document: What it says.
        lines: The line of each key that is set, and of each table's head, by its names; the nth
            table of a list has `[n]` for a name, below which names are in lower case.
    """

    path: Path
    document: dict[str, Any] = field(default_factory=dict)
    lines: Mapping[_Key, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, *, must_exist: bool, hint: str = "") -> Self:
        """Read a file.

        Raises:
            SettingsInvalidError: It is absent and must not be (with `hint`), can not be read, could
                be written by others, or is no TOML.
        """
        text = _read(path, must_exist=must_exist, hint=hint)
        return cls(path, _parse(text, path), _lines_of(text)) if text else cls(path)

    def line(self, *key: str) -> int | None:
        """Return the line where a key is set, or else something below it, or else what it is in.

        Args:
            key: Its names; `name[2]` is the third table of a list.
        """
        key = _folded(tuple(part for name in key for part in _INDEXED.findall(name)))
        if key not in self.lines:
            # A table that only dotted keys speak of has no head.
            below = [line for name, line in self.lines.items() if name[: len(key)] == key]
            if key and below:
                return min(below)
        return next(
            (
                self.lines[key[:length]]
                for length in range(len(key), 0, -1)
                if key[:length] in self.lines
            ),
            None,
        )

    def says(self, *key: str) -> bool:
        """Whether a key is set."""
        place: Any = self.document
        for name in key:
            if not isinstance(place, dict) or name not in place:
                return False
            place = place[name]
        return True

    def place(self, *key: str) -> str:
        """Return file and line of a key, for people: `/etc/propmaster/config.toml:7`."""
        line = self.line(*key)
        return f"{self.path}:{line}" if line else f"{self.path}"


def _read(path: Path, *, must_exist: bool, hint: str) -> str:
    try:
        with open_named(path) as file:
            _insist_ours(os.fstat(file.fileno()), path)
            return io.TextIOWrapper(file, encoding="utf-8").read()
    except FileNotFoundError as error:
        if not must_exist:
            return ""
        raise SettingsInvalidError(f"{path}: there is no such file", hint=hint) from error
    except OSError as error:
        raise SettingsInvalidError(f"{path} can not be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsInvalidError(f"{path} is not UTF-8: {error}") from error


def _insist_ours(status: os.stat_result, path: Path) -> None:
    """Accept what only root or this process's user can have written.

    Not its group either: the user that jobs run as is often in the agent's group, or the agent in
    the group of that user. A device, such as /dev/null, is nobody's text.
    """
    mode = stat.S_IMODE(status.st_mode)
    if stat.S_ISCHR(status.st_mode):
        return
    if status.st_uid not in (0, os.geteuid()):
        fault = f"belongs to user {status.st_uid}, which is neither root nor us ({os.geteuid()})"
    elif mode & 0o022:
        fault = f"can be written by others (mode {mode:04o})"
    else:
        return
    raise SettingsInvalidError(
        f"{path} {fault}: a job could change what this host does",
        hint=f"make it root's or your own, and closed to writing by others: chmod go-w {path}",
    )


def _parse(text: str, path: Path) -> dict[str, Any]:
    # Loaded here: 4 ms that a host without a settings file does not need.
    import tomllib  # noqa: PLC0415

    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SettingsInvalidError(f"{path} is not TOML: {error}") from error


def _lines_of(text: str) -> dict[_Key, int]:
    """Return the line of each key and table head of a TOML text."""
    lines: dict[_Key, int] = {}
    lists: dict[_Key, int] = {}
    table: _Key = ()
    at = 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        line = text.count("\n", 0, at) + 1
        if text[at] == "[":
            in_list = text.startswith("[[", at)
            names, at = _key_at(text, at + 1 + in_list)
            table = _place_of(names, lists)
            lines.setdefault(table, line)
            if in_list:
                lists[table] = lists.get(table, -1) + 1
                table = (*table, f"[{lists[table]}]")
                lines[table] = line
        elif text[at] != "#":
            key, at = _key_at(text, at)
            lines[_folded((*table, *key))] = line
        at = _end_of_value(text, at)
    return lines


def _place_of(names: _Key, lists: Mapping[_Key, int]) -> _Key:
    """Return the key of a table's head: within a list it is about the last table so far."""
    place: _Key = ()
    for name in names:
        if place in lists:
            place = (*place, f"[{lists[place]}]")
        place = _folded((*place, name))
    return place


def _folded(key: _Key) -> _Key:
    """Return a key with the names below a list in lower case: those count in any case."""
    first = next((at for at, name in enumerate(key) if name.startswith("[")), len(key))
    return (*key[:first], *(name.lower() for name in key[first:]))


def _key_at(text: str, at: int) -> tuple[_Key, int]:
    """Return the dotted key that begins at a place, and where it ends."""
    names = []
    while (part := _KEY_PART.match(text, at)) is not None:
        names.append(
            next(text for text in part.group("basic", "literal", "bare") if text is not None)
        )
        at = part.end()
        if not part["dot"]:
            break
    return tuple(names), at


def _end_of_value(text: str, at: int) -> int:
    """Return where the statement ends in which a value, or the rest of a head, begins."""
    depth = 0
    while (piece := _VALUE_PIECE.match(text, at)) is not None:
        at = piece.end()
        depth += bool(piece["open"]) - bool(piece["close"])
        if piece["end"] and depth <= 0:
            break
    # What no parser accepts does not come here; the scan ends all the same.
    return at if piece is not None else len(text)
