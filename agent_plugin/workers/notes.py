"""What the host service notes of a session, in `<state>/workers/<key>/`: 0600, replaced whole."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from agent_plugin.content.errors import NotAllowedError, local_write_error
from agent_plugin.content.leftovers import remove_path
from agent_plugin.content.private_file import replace_private_file
from agent_plugin.session.state import session_id

_SESSION: Final = "session.json"


class Note(msgspec.Struct, frozen=True, rename="camel"):
    """What is noted of a session.

    Attributes:
        session_dir: Its directory.
        uid: Of the job's user, the first that has asked.
        had_manifests: Whether the agent's `manifests` were seen in it.
    """

    session_dir: str
    uid: int
    had_manifests: bool


def place_of(state_dir: Path, session_dir: Path) -> Path:
    """Return where things are noted of a session."""
    return state_dir / "workers" / session_id(session_dir)


def write_note(place: Path, name: str, data: bytes) -> None:
    """Note something, unless it is noted already.

    Raises:
        NoSpaceError, LocalWriteError: It can not be written.
    """
    path = place / name
    try:
        place.parent.mkdir(mode=0o700, exist_ok=True)
        place.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileNotFoundError):
            if path.read_bytes() == data:
                return
    except OSError as error:
        raise local_write_error(error, os.fspath(path)) from error
    replace_private_file(path, data)


def note_session(state_dir: Path, session_dir: Path, uid: int) -> None:
    """Note whose session it is, and whether it has the agent's `manifests` by now.

    It stays that user's: the users of several queues may be in one group, and so write to each
    other's directories; what is known of the session, and its credentials, is one user's alone.

    Raises:
        NotAllowedError: It is another user's.
        NoSpaceError, LocalWriteError: It can not be written.
    """
    place = place_of(state_dir, session_dir)
    before = _read(place)
    hosts_own = (0, os.geteuid())
    if before is not None and before.uid != uid and before.uid not in hosts_own:
        if uid not in hosts_own:
            raise NotAllowedError(
                f"the session in {session_dir} is that of the user with id {before.uid}"
            )
        uid = before.uid
    has_manifests = os.path.lexists(session_dir / "manifests") or (
        before is not None and before.had_manifests
    )
    write_note(place, _SESSION, _encode(Note(os.fspath(session_dir), uid, has_manifests)))


def noted_sessions(state_dir: Path) -> Iterator[Note]:
    """Yield what is noted of each session."""
    with suppress(FileNotFoundError):
        for place in sorted((state_dir / "workers").iterdir()):
            if (note := _read(place)) is not None:
                yield note


def forget(place: Path) -> None:
    """Remove what is noted of a session."""
    with suppress(FileNotFoundError):
        remove_path(place)


def _read(place: Path) -> Note | None:
    with suppress(OSError, ValueError):
        return msgspec.convert(json.loads((place / _SESSION).read_bytes()), Note)
    return None


def _encode(note: Note) -> bytes:
    # Paths may hold lone surrogates, which msgspec refuses.
    return json.dumps(msgspec.to_builtins(note)).encode("ascii")
