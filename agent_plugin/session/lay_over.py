"""How the outputs of other steps come over a mounted root: by name, and without their bytes.

The mount gets them in a directory at its top, under a name that nobody can guess, and from there
each is renamed into its place through overlayfs, which copies no content of what it renames. So
whoever has an old file open keeps it, what the job wrote or removed at a path gives way, and all
that overlayfs remembers of the tree stays true. That would not be so if the tree below changed in
place: overlayfs gives ESTALE for a file that has become another one, and goes on listing a
directory as it was (docs/decisions/0010-outputs-over-a-mount.md).
"""

import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from agent_plugin.content.errors import PathClashError, UnsafePathError, local_write_error
from agent_plugin.content.leftovers import is_partial, partial_name, remove_tree
from agent_plugin.content.manifest import FileEntry, Manifest, encode
from agent_plugin.content.mount_spec import Layer
from agent_plugin.content.safe_path import Root
from agent_plugin.content.store import Cancellation
from agent_plugin.session.mounts import Mounts
from agent_plugin.session.roots import is_below
from agent_plugin.session.state import BaselineFile, RootState, SessionState, StateFile


def lay_over(
    root: RootState,
    manifest: Manifest,
    state: SessionState,
    state_file: StateFile,
    mounts: Mounts,
    cancellation: Cancellation,
) -> None:
    """Have the files of a manifest stand in a mounted root, in place of what is there.

    Args:
        root: The root; it knows them afterwards.
        manifest: The files.
        state: The session.
        state_file: Of the session.
        mounts: The host's.
        cancellation: Checked at each file.

    Raises:
        PathClashError: A directory is where a file is to be, or the other way round.
        UnsafePathError: A symbolic link is where a directory must be.
        MountFailedError: The root is not mounted any more.
        PropmasterError: Any other of the tree. It can be done again, and goes on.
    """
    for entry in manifest.entries:
        if is_partial(entry.path.rpartition("/")[2]):
            raise PathClashError(
                f"{entry.path} has a name that is kept for temporary files",
                hint="rename the file, or leave it out",
            )
    place = Path(root.local_root)
    name = partial_name(f"layer-{secrets.token_hex(8)}")
    layer = Layer(state_file.keep_layer(encode(manifest)), name)
    # Before anything refers to it: a session that is started again mounts it as well.
    root.layers.append(layer)
    state_file.write(state)
    mounts.add(place, layer, cancellation)
    with Root(place, follow=False) as opened:
        try:
            moves = list(_Moves(opened, name, cancellation).of(_Directory.of(manifest.entries), ""))
            for above, moved in moves:
                cancellation.check()
                _move(opened, name, above, moved)
            for left in root.layers:
                remove_tree(opened.fd, left.at)
        except OSError as error:
            raise local_write_error(error, os.fspath(place)) from error
    root.baseline.update(
        {
            # What the file system says of it may change with what the job does to its attributes.
            entry.path: BaselineFile(entry.hash, entry.size, entry.mtime, -1, -1, -1)
            for entry in manifest.entries
            if is_below(entry.path, root.output_directories)
        }
    )


@dataclass(slots=True)
class _Directory:
    """Names in a directory; of files no more."""

    directories: "dict[str, _Directory]" = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, entries: Iterable[FileEntry]) -> Self:
        top = cls()
        for entry in entries:
            directory: _Directory = top
            *above, name = entry.path.split("/")
            for component in above:
                directory = directory.directories.setdefault(component, _Directory())
            directory.files.append(name)
        return top


class _Moves:
    """What has to be renamed, found without changing anything."""

    def __init__(self, root: Root, layer: str, cancellation: Cancellation) -> None:
        self._root = root
        self._layer = layer
        self._cancellation = cancellation

    def of(self, directory: _Directory, path: str) -> Iterator[tuple[str, str]]:
        """Yield (directory, name) of each file, and of each directory that is nowhere yet.

        Raises:
            PathClashError, UnsafePathError: As `lay_over`.
        """
        self._cancellation.check()
        at = f"{self._root.path}/{path}".rstrip("/")
        with self._root.holding(path, create=False) as fd:
            for name in directory.files:
                mode = _mode_of(fd, name)
                if mode is not None and stat.S_ISDIR(mode):
                    raise PathClashError(
                        f"{at}/{name} is a directory where a file must be",
                        hint="rename one of the two",
                    )
                yield path, name
            modes = {name: _mode_of(fd, name) for name in directory.directories}
        for name, below in directory.directories.items():
            mode = modes[name]
            shown = f"{at}/{name}"
            if mode is None:
                yield path, name
            elif stat.S_ISLNK(mode):
                raise UnsafePathError(
                    f"{shown} is a symbolic link where a directory must be", hint="remove the link"
                )
            elif not stat.S_ISDIR(mode):
                raise PathClashError(
                    f"{shown} is a file where a directory must be", hint="rename one of the two"
                )
            else:
                yield from self.of(below, _join(path, name))


def _move(root: Root, layer: str, above: str, name: str) -> None:
    with (
        root.holding(_join(layer, above), create=False) as source,
        root.holding(above, create=False) as target,
    ):
        try:
            os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)
        except OSError as error:
            if error.errno not in (errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise PathClashError(
                f"{root.path}/{_join(above, name)} was made meanwhile, as something else"
            ) from error


def _mode_of(directory: int, name: str) -> int | None:
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return None


def _join(above: str, name: str) -> str:
    return f"{above}/{name}" if above and name else above or name
