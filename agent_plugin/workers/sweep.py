"""Ends the sessions that the worker agent has ended without a word.

The agent tells nobody that a session is over: it removes the session's directory, or what it can
of it. What of ours is left then (mounts, leases, states) is ended here. A directory is gone only if
the one that it was in is there: else a disk is not mounted, perhaps. One that has something of ours
mounted can not be removed; that the agent's own `manifests` are gone from it says the same.
"""

import json
import os
import random
from contextlib import suppress
from pathlib import Path

import msgspec

from agent_plugin.content import events
from agent_plugin.content.errors import PropmasterError, SessionStateError
from agent_plugin.mounting import open_mounts
from agent_plugin.services import open_records, state_directory
from agent_plugin.session.end import end
from agent_plugin.session.state import locked_state
from agent_plugin.session_logs import collect_logs
from agent_plugin.settings import Settings
from agent_plugin.workers.notes import forget, noted_sessions, place_of

log = events.get_logger()


class _Where(msgspec.Struct, rename="camel"):
    """Of a session's state only where it is."""

    session_dir: str


def sweep(settings: Settings) -> None:
    """End the sessions whose directory the agent has removed, or emptied as far as it could."""
    state_dir = state_directory(settings)
    noted = {note.session_dir: note for note in noted_sessions(state_dir)}
    has_ended = False
    sessions = [*{*noted, *_known(state_dir)}]
    # One that hangs is met late sooner or later, so that it can not keep all others from ending.
    random.shuffle(sessions)
    for named in sessions:
        session_dir, note = Path(named), noted.get(named)
        if not _is_over(session_dir, had_manifests=note is not None and note.had_manifests):
            continue
        try:
            _end(session_dir, state_dir, settings, note.uid if note is not None else None)
        except SessionStateError:
            # A call works on it still; it ends when its asker does.
            continue
        except PropmasterError as error:
            log.warning(events.SWEEP_FAILED, extra={"session_dir": named, "reason": error.message})
            continue
        has_ended = True
        if note is not None:
            # The agent could not, as long as something was mounted there.
            with suppress(OSError):
                session_dir.rmdir()
            forget(place_of(state_dir, session_dir))
    if has_ended:
        collect_logs(settings)


def _end(session_dir: Path, state_dir: Path, settings: Settings, uid: int | None) -> None:
    with locked_state(state_dir, session_dir) as state_file:
        state = state_file.read()
        queue_id = state.job.queue_id if state is not None else ""
        records = open_records(settings, queue_id=queue_id, user_id=uid)
        mounts = open_mounts(settings, queue_id=queue_id, user_id=uid)
        end(session_dir, records, state_file, mounts=mounts)


def _known(state_dir: Path) -> set[str]:
    """Return the directories of the sessions that have a state."""
    found = set()
    for path in (state_dir / "sessions").glob("*.json"):
        with suppress(OSError, ValueError, KeyError):
            data = path.read_bytes()
            try:
                found.add(msgspec.json.decode(data, type=_Where).session_dir)
            except msgspec.DecodeError:
                # Paths may hold lone surrogates, which msgspec refuses.
                found.add(str(json.loads(data)["sessionDir"]))
    return found


def _is_over(session_dir: Path, *, had_manifests: bool) -> bool:
    if not os.path.lexists(session_dir.parent):
        return False
    if not os.path.lexists(session_dir):
        return True
    return had_manifests and not os.path.lexists(session_dir / "manifests")
