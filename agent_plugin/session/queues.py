"""What the operator of this host has chosen for each queue: one file each, `<state>/queues/`."""

import os
from pathlib import Path
from typing import Literal

import msgspec

from agent_plugin.content.errors import SessionStateError, local_write_error
from agent_plugin.content.private_file import replace_private_file
from agent_plugin.session.job import check_id

FileSystem = Literal["JOB", "COPIED", "VIRTUAL", "AUTO"]


class QueueSettings(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """The choices for one queue.

    Attributes:
        queue_id: The queue.
        file_system: How inputs are brought in, JOB for what each job says; None if nobody has
            chosen, so that the settings file counts.
    """

    queue_id: str
    file_system: FileSystem | None = None


def read_queue(state_dir: Path, queue_id: str) -> QueueSettings:
    """Return what was chosen for a queue; nothing, if nobody has.

    Raises:
        JobInvalidError: That is no queue's id.
        SessionStateError: The file is damaged.
    """
    path = _path(state_dir, queue_id)
    try:
        return msgspec.json.decode(path.read_bytes(), type=QueueSettings)
    except FileNotFoundError:
        return QueueSettings(queue_id)
    except (OSError, msgspec.DecodeError) as error:
        raise SessionStateError(
            f"{path} can not be read: {error}", hint="`propmaster queue set` writes it anew"
        ) from error


def read_queues(state_dir: Path) -> list[QueueSettings]:
    """Return what was chosen for each queue for which something was.

    Raises:
        SessionStateError: A file is damaged.
    """
    found = sorted((state_dir / "queues").glob("queue-*.json"))
    return [read_queue(state_dir, path.stem) for path in found]


def write_queue(state_dir: Path, settings: QueueSettings) -> None:
    """Keep what is chosen for a queue from now on.

    Raises:
        JobInvalidError: That is no queue's id.
        NoSpaceError, LocalWriteError: It can not be written; what was chosen before stays.
    """
    path = _path(state_dir, settings.queue_id)
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise local_write_error(error, os.fspath(path)) from error
    replace_private_file(path, msgspec.json.encode(settings), durable=True)


def _path(state_dir: Path, queue_id: str) -> Path:
    return state_dir / "queues" / f"{check_id(queue_id, 'queue')}.json"
