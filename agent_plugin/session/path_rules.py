"""Where on this host the outputs of a job submitted elsewhere belong: by rules, or nowhere.

A rule maps a directory of the submitter's host, and everything below it, to one of this host. The
rule with the longest source wins, as in Open Job Description; Windows paths are compared without
regard to case. Without rules a root is at its own path. Pure: nothing here looks at a disk.

What a rule leads to is the root that files are placed below, so that no path, and no link that
stands in it, leads out of there.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Final, Literal

import msgspec
import xxhash

from agent_plugin import schema
from agent_plugin.content.errors import JobInvalidError, PathMappingError, UnsafePathError
from agent_plugin.session.job import PathFormat, PathMappingRule

MAX_RULES_BYTES: Final = 1024 * 1024

# The root that a file goes below, and its path there.
Place = tuple[Path, str]


class _Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    source_path_format: Literal["POSIX", "WINDOWS", "posix", "windows"]
    source_path: str
    destination_path: str


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path_mapping_rules: list[_Rule]
    version: Literal["pathmapping-1.0"] = "pathmapping-1.0"


def read_rules(data: bytes, source: str) -> tuple[PathMappingRule, ...]:
    """Return the rules of a file in Open Job Description's form, or of a bare list of them.

    Args:
        data: JSON, at most MAX_RULES_BYTES.
        source: The file's name, for messages.

    Raises:
        JobInvalidError: It breaks the schema; names the key.
        PathMappingError: A rule leads to what is no absolute path of this host.
    """
    if len(data) > MAX_RULES_BYTES:
        raise JobInvalidError(f"{source}: more than {MAX_RULES_BYTES} bytes")
    try:
        document = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise JobInvalidError(f"{source}: not a JSON document: {error}") from error
    if isinstance(document, list):
        document = {"path_mapping_rules": document}
    rules = schema.conform(document, _Document, source=source, failure=JobInvalidError)
    return checked_rules(
        PathMappingRule(
            "windows" if rule.source_path_format.lower() == "windows" else "posix",
            rule.source_path,
            rule.destination_path,
        )
        for rule in rules.path_mapping_rules
    )


def checked_rules(rules: Iterable[PathMappingRule]) -> tuple[PathMappingRule, ...]:
    """Return rules that lead to directories of this host.

    Raises:
        PathMappingError: One does not; names it.
    """
    checked = tuple(rules)
    for rule in checked:
        path = PurePosixPath(rule.destination_path)
        if not path.is_absolute() or ".." in path.parts or "\0" in rule.destination_path:
            raise PathMappingError(
                f"the rule for {rule.source_path!r} leads to {rule.destination_path!r}, which is"
                " not an absolute path of this host",
                hint="give an absolute path without `..`",
            )
        source = _source(rule)
        if not source.is_absolute() or ".." in source.parts:
            raise PathMappingError(
                f"the rule from {rule.source_path!r} to {rule.destination_path!r} has no absolute"
                " path of the submitter's host as its source",
                hint="give the directory as the submitter has it",
            )
    return checked


def format_of(root_path: str) -> PathFormat:
    r"""Return whose path rules a root follows: `C:\show`, `C:/show` and `\\host\share` are Windows.

    Output manifests do not say it.
    """
    if root_path.startswith("/"):
        return "posix"
    return "windows" if PureWindowsPath(root_path).drive else "posix"


class PathRules:
    """Maps files below roots of jobs to places on this host.

    Args:
        rules: Checked ones; None: roots are at their own paths.
    """

    def __init__(self, rules: Sequence[PathMappingRule] | None) -> None:
        self._rules = rules
        self._sorted: dict[str, list[tuple[tuple[str, ...], Path]]] = {}
        for rule in rules or ():
            parts = _folded(_source(rule))
            self._sorted.setdefault(rule.source_path_format, []).append(
                (parts, Path(rule.destination_path))
            )
        for found in self._sorted.values():
            # Stable: of two rules for one directory the first counts.
            found.sort(key=lambda rule: -len(rule[0]))

    @property
    def mark(self) -> str:
        """By which it is remembered that these rules, in this order, were followed."""
        rules = "own" if self._rules is None else [*map(msgspec.structs.astuple, self._rules)]
        return xxhash.xxh3_64_hexdigest(repr(rules).encode())

    def below(self, root_path: str) -> Callable[[str], Place | None]:
        """Return what places the entries of a root's manifests, by their paths below the root.

        It returns None for what no rule maps, and for all when the root is no path that files of
        this host can have.
        """
        if self._rules is None:
            return _own(root_path)
        path_format = format_of(root_path)
        rules = self._sorted.get(path_format, [])
        root = _pure(path_format)(root_path)
        if not root.is_absolute() or ".." in root.parts:
            return lambda _entry: None
        folded = _folded(root)
        if any(len(parts) > len(folded) and parts[: len(folded)] == folded for parts, _ in rules):
            return _each(root, rules)
        return _all(root, _longest(folded, rules))


@dataclass(frozen=True, slots=True)
class JobRules:
    """Where a job's outputs belong.

    Attributes:
        rules: None: nobody can say.
        reason: Why, as a sentence.
        profile: The storage profile of whoever submitted the job, which never changes; empty if
            there is none, or nobody asked for it.
    """

    rules: PathRules | None
    reason: str = ""
    profile: str = ""

    @property
    def mark(self) -> str:
        """As PathRules has it; empty without rules."""
        return "" if self.rules is None else self.rules.mark


def _own(root_path: str) -> Callable[[str], Place | None]:
    root = Path(root_path)
    if not root.is_absolute() or ".." in root.parts or "\0" in root_path:
        return lambda _entry: None
    return lambda entry: (root, entry)


def _all(root: PurePath, rule: tuple[int, Path] | None) -> Callable[[str], Place | None]:
    """Place all entries of a root below the same directory."""
    if rule is None:
        return lambda _entry: None
    length, destination = rule
    above = "".join(f"{part}/" for part in root.parts[length:])
    windows = isinstance(root, PureWindowsPath)

    def place(entry: str) -> Place | None:
        return destination, above + (_slashes(entry) if windows else entry)

    return place


def _each(
    root: PurePath, rules: list[tuple[tuple[str, ...], Path]]
) -> Callable[[str], Place | None]:
    """Place each entry of a root by itself: there are rules for directories below the root."""
    windows = isinstance(root, PureWindowsPath)

    def place(entry: str) -> Place | None:
        path = root / (_slashes(entry) if windows else entry)
        # The file itself is no directory that a rule could map.
        found = _longest(_folded(path.parent), rules)
        if found is None:
            return None
        length, destination = found
        return destination, "/".join(path.parts[length:])

    return place


def _slashes(entry: str) -> str:
    """Return the path of a Windows host's file with our separators; `..` stays refused."""
    parts = entry.replace("\\", "/").split("/")
    if ".." in parts or any(":" in part for part in parts):
        raise UnsafePathError(
            f"{entry!r} is not a path below its root",
            hint="the manifest was not written by a program that we know; see who wrote it",
        )
    return "/".join(part for part in parts if part not in ("", "."))


def _longest(
    folded: tuple[str, ...], rules: list[tuple[tuple[str, ...], Path]]
) -> tuple[int, Path] | None:
    for parts, destination in rules:
        if folded[: len(parts)] == parts:
            return len(parts), destination
    return None


def _source(rule: PathMappingRule) -> PurePath:
    path = _pure(rule.source_path_format)(rule.source_path)
    # `Z:` as the path of a location is the whole drive, and not what is current there.
    return path / "\\" if path.drive and path.parts == (path.drive,) else path


def _pure(path_format: PathFormat) -> type[PurePosixPath] | type[PureWindowsPath]:
    return PureWindowsPath if path_format == "windows" else PurePosixPath


def _folded(path: PurePath) -> tuple[str, ...]:
    if isinstance(path, PureWindowsPath):
        return tuple(part.lower() for part in path.parts)
    return path.parts
