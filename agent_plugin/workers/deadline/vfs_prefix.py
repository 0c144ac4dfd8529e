"""The directory in which the worker agent finds `deadline_vfs`: written, looked at, removed.

The agent looks for `bin/deadline_vfs` in its PATH, in $DEADLINE_VFS_PATH and in /opt/deadline_vfs,
and runs two programs that lie beside it. They are shell scripts, which find propmaster's Python in
the file `propmaster-python` of the prefix; that file also tells our prefix from anybody else's.
"""

import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent_plugin.content.errors import LocalWriteError, SettingsInvalidError, local_write_error
from agent_plugin.content.leftovers import remove_tree

# Where the agent looks when nothing else is set.
DEFAULT_PREFIX: Final = Path("/opt/deadline_vfs")
_TREE: Final = Path(__file__).with_name("vfs_tree")
_PYTHON: Final = "propmaster-python"
_PROGRAMS: Final = (
    "bin/deadline_vfs",
    "link/fusermount3",
    "scripts/production/al2/run_deadline_vfs_al2.sh",
)
_FILES: Final = (*_PROGRAMS, "lib/README")


@dataclass(frozen=True, slots=True)
class PrefixStatus:
    """What is in a prefix.

    Attributes:
        installed: Whether it is ours.
        python: Which Python it starts; empty if it is not ours.
        defect: What keeps it from working as it should; empty if nothing does.
    """

    installed: bool
    python: str = ""
    defect: str = ""


def write_prefix(directory: Path, python: Path) -> None:
    """Write a prefix, or bring one of ours up to date; running mounts do not mind.

    Args:
        directory: Absolute; made if it is missing.
        python: That propmaster is installed for; job users must be able to run it.

    Raises:
        SettingsInvalidError: A path will not do, or the directory is somebody else's.
        NoSpaceError, LocalWriteError: It can not be written.
    """
    # The agent starts what is in it by a shell command in which nothing is quoted.
    if not directory.is_absolute() or any(c.isspace() or c in "'\"$`\\" for c in str(directory)):
        raise SettingsInvalidError(
            f"{str(directory)!r} can not be a prefix: the agent quotes no paths",
            hint="use an absolute path of letters, digits, `_`, `-` and `.`",
        )
    if not python.is_absolute() or "\n" in str(python):
        raise SettingsInvalidError(f"{str(python)!r} is no absolute path of a Python")
    if not _is_ours(directory) and directory.exists() and any(directory.iterdir()):
        raise SettingsInvalidError(
            f"{directory} is not empty, and no prefix of propmaster",
            hint="use another directory, and set DEADLINE_VFS_PATH to it for the agent",
        )
    try:
        _make_directories(directory)
        # First, so that an interrupted call can be made again.
        _replace(directory / _PYTHON, f"{python}\n".encode(), 0o644)
        for name in _FILES:
            _replace(directory / name, (_TREE / name).read_bytes(), _mode(name))
    except OSError as error:
        raise local_write_error(error, os.fspath(directory)) from error


def remove_prefix(directory: Path) -> bool:
    """Remove a prefix of ours; return False if there was none.

    Raises:
        LocalWriteError: It can not be removed.
    """
    if not _is_ours(directory):
        return False
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in sorted({name.partition("/")[0] for name in _FILES}):
                remove_tree(fd, name)
            os.unlink(_PYTHON, dir_fd=fd)
        finally:
            os.close(fd)
        if not any(directory.iterdir()):
            directory.rmdir()
    except OSError as error:
        raise LocalWriteError(f"{directory}: {error.strerror}") from error
    return True


def prefix_status(directory: Path) -> PrefixStatus:
    """Return what is in a prefix."""
    if not _is_ours(directory):
        return PrefixStatus(installed=False)
    python = (
        (directory / _PYTHON).read_text(encoding="utf-8", errors="surrogateescape").rstrip("\n")
    )
    return PrefixStatus(True, python, next(_defects(directory, python), ""))


def _defects(directory: Path, python: str) -> Iterator[str]:
    if not os.access(python, os.X_OK):
        yield f"{python} is no program that can be run"
    for name in _FILES:
        path = directory / name
        try:
            if path.read_bytes() != (_TREE / name).read_bytes():
                yield f"{path} is not of this version"
            if path.stat().st_mode & 0o777 != _mode(name):
                yield f"{path} has not mode {_mode(name):o}"
        except OSError as error:
            yield f"{path}: {error.strerror}"


def _is_ours(directory: Path) -> bool:
    """Whether the file that only our prefix has is there; it is written first, and removed last."""
    return (directory / _PYTHON).is_file()


def _make_directories(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    below = {parent for name in _FILES for parent in Path(name).parents}
    for name in sorted(below, key=lambda path: len(path.parts)):
        path = directory / name
        path.mkdir(exist_ok=True)
        # Job users run what is in it, whatever the umask says.
        path.chmod(0o755)


def _replace(path: Path, data: bytes, mode: int) -> None:
    """Put a file in a path's place, whole: a shell may be reading the old one."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            os.fchmod(fd, mode)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def _mode(name: str) -> int:
    return 0o755 if name in _PROGRAMS else 0o644
