"""What the host service notes of a session, in `<state>/workers/<key>/`: 0600, replaced whole."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from agent_plugin.content.errors import local_write_error
from agent_plugin.content.leftovers import remove_tree
from agent_plugin.session.state import session_id

_SESSION: Final = "session.json"


def place_of(state_dir: Path, session_dir: Path) -> Path:
    """Return where things are noted of a session."""
    return state_dir / "workers" / session_id(session_dir)


def write_note(place: Path, name: str, data: bytes) -> None:
    """Note something, unless it is noted already.

    Raises:
        NoSpaceError, LocalWriteError: It can not be written.
    """
    path = place / name
    temporary = place / f"{name}.{secrets.token_hex(4)}"
    try:
        place.parent.mkdir(mode=0o700, exist_ok=True)
        place.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileNotFoundError):
            if path.read_bytes() == data:
                return
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise local_write_error(error, os.fspath(path)) from error


def note_session(state_dir: Path, session_dir: Path) -> None:
    """Note that a session is the agent's, and whether it has the agent's `manifests` by now.

    Raises:
        NoSpaceError, LocalWriteError: It can not be written.
    """
    place = place_of(state_dir, session_dir)
    has_manifests = os.path.lexists(session_dir / "manifests") or _had_manifests(place)
    note = {"sessionDir": os.fspath(session_dir), "hadManifests": has_manifests}
    write_note(place, _SESSION, json.dumps(note).encode("ascii"))


def noted_sessions(state_dir: Path) -> Iterator[tuple[Path, Path, bool]]:
    """Yield of each noted session the place, its directory, and whether it had `manifests`."""
    with suppress(FileNotFoundError):
        for place in sorted((state_dir / "workers").iterdir()):
            with suppress(OSError, ValueError, KeyError):
                note = json.loads((place / _SESSION).read_bytes())
                yield place, Path(note["sessionDir"]), bool(note["hadManifests"])


def forget(place: Path) -> None:
    """Remove what is noted of a session."""
    with suppress(FileNotFoundError):
        fd = os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            remove_tree(fd, place.name)
        finally:
            os.close(fd)


def _had_manifests(place: Path) -> bool:
    with suppress(OSError, ValueError, KeyError):
        return bool(json.loads((place / _SESSION).read_bytes())["hadManifests"])
    return False
