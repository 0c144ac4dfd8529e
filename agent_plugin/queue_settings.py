"""What holds for the sessions of a queue: the settings file, and above it what `queue set` has set.

What wins over what, from the top: an option of the command, `queue set`, the queue's table in the
settings file, the general table, the job (`inputs.file_system` only), the built-in default.
"""

from pathlib import Path
from typing import Any, Final

import msgspec

from agent_plugin.services import state_directory
from agent_plugin.session.queues import read_queue
from agent_plugin.settings import Loaded, Settings
from agent_plugin.sizes import Size

_FILE_SYSTEM: Final = "inputs.file_system"


class Explained(msgspec.Struct):
    """A setting as it is in effect.

    Attributes:
        key: Table and name, `store.concurrency` for example.
        value: Sizes in bytes, as they are on this host now; a part of what is unknown yet as text.
        source: Where it comes from: `<file>:<line>`, an environment variable, `queue set`, `the
            job` where that decides, or `built-in`.
    """

    key: str
    value: Any
    source: str


def settings_of_queue(settings: Settings, queue_id: str) -> Settings:
    """Return the settings that hold for the sessions of a queue.

    Raises:
        JobInvalidError: That is no queue's id.
        SessionStateError: What `queue set` has set can not be read.
        LocalWriteError: Others could write to the state directory.
    """
    chosen = read_queue(state_directory(settings), queue_id).file_system
    settings = settings.for_queue(queue_id)
    if chosen is None:
        return settings
    inputs = msgspec.structs.replace(settings.inputs, file_system=chosen)
    return msgspec.structs.replace(settings, inputs=inputs)


def explain(loaded: Loaded, queue_id: str) -> list[Explained]:
    """Return every setting that holds for the sessions of a queue, with where it comes from.

    Raises:
        PropmasterError: As for `settings_of_queue`.
    """
    settings = settings_of_queue(loaded.settings, queue_id)
    chosen = read_queue(state_directory(settings), queue_id).file_system
    found = []
    for table in msgspec.structs.fields(Settings):
        section = getattr(settings, table.name)
        if not isinstance(section, msgspec.Struct):
            continue  # The tables of queues.
        for field in msgspec.structs.fields(section):
            key = f"{table.name}.{field.name}"
            value = getattr(section, field.name)
            source = loaded.source(key, queue_id)
            if key == _FILE_SYSTEM and chosen is not None:
                source = "queue set"
            elif key == _FILE_SYSTEM and (value, source) == ("JOB", "built-in"):
                source = "the job"
            found.append(Explained(key, _in_effect(settings, key, value), source))
    return found


def _in_effect(settings: Settings, key: str, value: object) -> object:
    cache_dir = settings.paths.cache_dir
    if key == "cache.max_bytes":
        value = settings.cache.max_bytes_on(cache_dir)
    elif key == "cache.min_free":
        value = settings.cache.min_free_bytes_on(cache_dir)
    elif key == "logs.directory":
        value = settings.log_directory
    elif key == "logs.max_bytes":
        value = settings.logs.max_bytes.on(settings.log_directory)
    elif key == "worker.user_memory":
        value = settings.worker.user_memory_bytes()
    if isinstance(value, Size):
        # A part of a disk that is known only when a session is on it.
        return f"{value.percent:g} %" if value.percent else value.bytes
    if isinstance(value, list):
        return [str(one) for one in value]
    return str(value) if isinstance(value, Path) else value
