"""The log files of sessions and mounts: where each is, and how long it is kept."""

import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent_plugin.content import events
from agent_plugin.content.errors import LocalWriteError
from agent_plugin.content.log_file import LogPlace, open_log_directory
from agent_plugin.settings import Settings

SUFFIX: Final = ".jsonl"
# What stands in the name of the log of a mount that is no session's.
MOUNT: Final = "mount-"
_DAY_SECONDS: Final = 86400

log = events.get_logger()


@dataclass(frozen=True, slots=True)
class LogsCollected:
    """What was removed, and what is left."""

    removed: int
    files: int
    bytes: int


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    size: int
    modified: float
    is_in_use: bool


def log_place(settings: Settings, name: str) -> LogPlace | None:
    """Return where the events of a session go, by its key; None if the settings want no logs.

    For a mount of no session the name is `mount-` and the mount's.
    """
    logs = settings.logs
    if not logs.keep_days:
        return None
    directory = settings.log_directory
    path = directory / f"{name}{SUFFIX}"
    return LogPlace(os.fspath(path), logs.max_bytes.on(directory))


def collect_logs(settings: Settings, *, now: float | None = None) -> LogsCollected:
    """Remove the logs that are older than they are kept, and the oldest above the most bytes.

    Those of sessions and mounts that have not ended stay in any case. What can not be removed is
    told of, and nothing is raised.

    Args:
        settings: The host's.
        now: Seconds since the epoch; None for the time that it is.
    """
    now = time.time() if now is None else now
    directory = settings.log_directory
    try:
        fd = open_log_directory(directory)
    except (FileNotFoundError, NotADirectoryError):
        return LogsCollected(0, 0, 0)
    except (OSError, LocalWriteError) as error:
        return _told(directory, error)
    try:
        files = sorted(_files(fd, settings.paths.state_dir), key=lambda file: file.modified)
        total, left, removed = sum(file.size for file in files), len(files), 0
        oldest = now - settings.logs.keep_days * _DAY_SECONDS
        most = settings.logs.max_bytes.on(directory)
        for file in files:
            if not file.is_in_use and (file.modified < oldest or total > most):
                os.unlink(file.name, dir_fd=fd)
                total, left, removed = total - file.size, left - 1, removed + 1
    except OSError as error:
        return _told(directory, error)
    finally:
        os.close(fd)
    if removed:
        log.info(events.LOG_COLLECTED, extra={"removed": removed, "files": left, "bytes": total})
    return LogsCollected(removed, left, total)


def _told(directory: Path, error: OSError | LocalWriteError) -> LogsCollected:
    reason = error.message if isinstance(error, LocalWriteError) else error.strerror
    log.warning(events.LOG_UNAVAILABLE, extra={"path": os.fspath(directory), "reason": reason})
    return LogsCollected(0, 0, 0)


def _files(directory: int, state_dir: Path) -> list[_File]:
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            key = entry.name.removesuffix(SUFFIX)
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # Another process collects as well.
            if key == entry.name or not stat.S_ISREG(status.st_mode):
                continue
            in_use = (state_dir / "sessions" / f"{key}.json").exists() or (
                state_dir / "mounts" / key.removeprefix(MOUNT)
            ).exists()
            found.append(_File(entry.name, status.st_size, status.st_mtime, in_use))
    return found
