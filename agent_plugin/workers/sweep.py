"""Ends the sessions that the worker agent has ended without a word.

The agent tells nobody that a session is over: it removes the session's directory, or what it can
of it. What of ours is left then (mounts, leases, states) is ended here. A directory is gone only if
the one that it was in is there: else a disk is not mounted, perhaps. One that has something of ours
mounted can not be removed; that the agent's own `manifests` are gone from it says the same.
"""

import os
from contextlib import suppress
from pathlib import Path

import msgspec

from agent_plugin.content import events
from agent_plugin.content.errors import PropmasterError, SessionStateError
from agent_plugin.mounting import open_mounts
from agent_plugin.services import open_records, state_directory
from agent_plugin.session.end import end
from agent_plugin.session.state import locked_state
from agent_plugin.settings import Settings
from agent_plugin.workers.notes import forget, noted_sessions

log = events.get_logger()


class _Where(msgspec.Struct, rename="camel"):
    """Of a session's state only where it is."""

    session_dir: str


def sweep(settings: Settings) -> None:
    """End the sessions whose directory the agent has removed, or emptied as far as it could."""
    state_dir = state_directory(settings)
    noted = {session_dir: (place, had) for place, session_dir, had in noted_sessions(state_dir)}
    for session_dir in sorted({*noted, *_known(state_dir)}):
        place, had_manifests = noted.get(session_dir, (None, False))
        if not _is_over(session_dir, had_manifests=had_manifests):
            continue
        try:
            with locked_state(state_dir, session_dir) as state_file:
                end(session_dir, open_records(settings), state_file, mounts=open_mounts(settings))
        except SessionStateError:
            # A call works on it still; it ends when its asker does.
            continue
        except PropmasterError as error:
            log.warning(
                events.SWEEP_FAILED,
                extra={"session_dir": os.fspath(session_dir), "reason": error.message},
            )
            continue
        if place is not None:
            # The agent has tried to, and something was mounted there.
            with suppress(OSError):
                session_dir.rmdir()
            forget(place)


def _known(state_dir: Path) -> set[Path]:
    found = set()
    with suppress(FileNotFoundError):
        for path in (state_dir / "sessions").glob("*.json"):
            with suppress(OSError, msgspec.DecodeError):
                found.add(Path(msgspec.json.decode(path.read_bytes(), type=_Where).session_dir))
    return found


def _is_over(session_dir: Path, *, had_manifests: bool) -> bool:
    if not os.path.lexists(session_dir.parent):
        return False
    if not os.path.lexists(session_dir):
        return True
    return had_manifests and not os.path.lexists(session_dir / "manifests")
