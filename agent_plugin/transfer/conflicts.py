"""What becomes of a file that stands where a download is to place one of other content.

A file that has the content already is no conflict, whatever the rule: it stays, and so a download
that was killed and is run again makes no second copy.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import PurePosixPath

import msgspec

from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import LocalReadError
from agent_plugin.content.manifest import FileEntry
from agent_plugin.content.safe_path import Root
from agent_plugin.content.snapshot import FoundFile, HashCache, hash_files
from agent_plugin.content.store import Cancellation
from agent_plugin.transfer.plan import DownloadPlan


class Conflict(StrEnum):
    """The rule, by the client's names."""

    SKIP = "skip"
    OVERWRITE = "overwrite"
    CREATE_COPY = "create_copy"


@dataclass(slots=True)
class Settled:
    """What a rule has changed of a plan.

    Attributes:
        left: Entries that are not placed, since something stands at their path.
        copies: Entries that are placed, or stand already, under another name; by that name.
    """

    left: list[FileEntry] = field(default_factory=list)
    copies: dict[str, FileEntry] = field(default_factory=dict)


def settle(
    plan: DownloadPlan,
    conflict: Conflict,
    hash_cache: HashCache | None,
    cancellation: Cancellation,
) -> Settled:
    """Change what a plan has to place so that it follows the rule for what is in the way.

    A directory in the way is no conflict but a clash, and stays in the plan to be told as one.
    Nobody else is expected to make files under the root meanwhile: what appears between this and
    the placing is replaced.

    Args:
        plan: As `plan_download` returned it.
        conflict: The rule.
        hash_cache: For the content of copies that stand already, or None.
        cancellation: Checked for each file.

    Raises:
        UnsafePathError, PathClashError: Something else than a directory stands on the way.
        LocalReadError: What is there can not be looked at.
        CancelledError: Cancellation was wished.
    """
    settled = Settled()
    if conflict is Conflict.OVERWRITE or not plan.wanted:
        return settled
    with Root(plan.root, follow=plan.follow_root, owner=plan.owner) as root:
        taken = {entry.path for entries in plan.wanted.values() for entry in entries}
        taken.update(entry.path for entry in plan.kept)
        find = _Copies(root, taken, hash_cache, cancellation)
        for digest in list(plan.wanted):
            kept = []
            for entry in plan.wanted[digest]:
                cancellation.check()
                if not _is_occupied(root, entry.path):
                    kept.append(entry)
                elif conflict is Conflict.SKIP:
                    settled.left.append(entry)
                else:
                    copy, is_there = find(entry)
                    settled.copies[copy.path] = entry
                    (plan.kept if is_there else kept).append(copy)
            if kept:
                plan.wanted[digest] = kept
            else:
                del plan.wanted[digest]
    return settled


class _Copies:
    """Finds names for copies: `name (1).ext`, `name (2).ext` and so on.

    Args:
        root: Where they are.
        taken: Paths that other entries have; each name that is given away is added.
        hash_cache: As `settle` has it.
        cancellation: As `settle` has it.
    """

    def __init__(
        self,
        root: Root,
        taken: set[str],
        hash_cache: HashCache | None,
        cancellation: Cancellation,
    ) -> None:
        self._root = root
        self._taken = taken
        self._hash_cache = hash_cache
        self._cancellation = cancellation

    def __call__(self, entry: FileEntry) -> tuple[FileEntry, bool]:
        """Return the entry under the first name that is free, or that has its content already."""
        for path in copy_names(entry.path):
            if path in self._taken:
                continue
            status = _status(self._root, path)
            if status is None or self._has(path, status, entry.digest):
                self._taken.add(path)
                return msgspec.structs.replace(entry, path=path), status is not None
        raise AssertionError("unreachable: there is no end of names")

    def _has(self, path: str, status: os.stat_result, digest: Digest) -> bool:
        if not stat.S_ISREG(status.st_mode) or status.st_size != digest.size:
            return False
        found = [FoundFile.of(path, status)]
        hashed = hash_files(self._root, found, self._hash_cache, cancellation=self._cancellation)
        return any(actual == digest for _, actual in hashed)


def copy_names(path: str) -> Iterator[str]:
    """Yield the names of copies of a file, as the Deadline client forms them."""
    pure = PurePosixPath(path)
    number = 0
    while True:
        number += 1
        yield os.fspath(pure.with_name(f"{pure.stem} ({number}){pure.suffix}"))


def _is_occupied(root: Root, path: str) -> bool:
    status = _status(root, path)
    return status is not None and not stat.S_ISDIR(status.st_mode)


def _status(root: Root, path: str) -> os.stat_result | None:
    parent, _, name = path.rpartition("/")
    try:
        with root.holding(parent, create=False) as directory:
            return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LocalReadError(f"{root.path}/{path}: {error.strerror}") from error
