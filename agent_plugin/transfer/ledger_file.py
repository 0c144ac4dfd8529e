"""The file that the ledger is in: made private, opened, set aside when it is damaged."""

import os
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Final

from agent_plugin.content import events
from agent_plugin.content.errors import LocalWriteError, NoSpaceError, PropmasterError

SCHEMA_VERSION: Final = 1
BUSY_TIMEOUT_SECONDS: Final = 10.0
# Result codes: https://sqlite.org/rescode.html. SQLITE_ERROR: a table or column is missing.
_DAMAGED: Final = frozenset({sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})

_SHM_BYTES: Final = 32 * 1024

log = events.get_logger()


class LedgerVersionError(sqlite3.DatabaseError):
    """The file's tables are of another version of this program."""


def connect(path: Path) -> sqlite3.Connection:
    """Open the file, and make it (0600) when there is none.

    Raises:
        sqlite3.DatabaseError: It can not be opened, is damaged or of another version.
        OSError: It can not be opened or made; a symbolic link is not followed.
    """
    # The file holds paths and errors of all jobs: made private before SQLite opens it.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    connection = sqlite3.connect(
        path, timeout=BUSY_TIMEOUT_SECONDS, isolation_level=None, check_same_thread=False
    )
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version not in {0, SCHEMA_VERSION}:
            raise LedgerVersionError(f"schema version {version}, this is {SCHEMA_VERSION}")  # noqa: TRY301
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
        if version == 0:
            schema = Path(__file__).with_name("ledger.sql")
            connection.executescript(schema.read_text(encoding="utf-8"))
    except BaseException:
        connection.close()
        raise
    return connection


def is_damaged(error: sqlite3.Error) -> bool:
    """Whether the file is no ledger of ours, rather than that it can not be used right now."""
    # The low byte is the primary code, the rest tells where exactly.
    code: int = getattr(error, "sqlite_errorcode", -1)
    return isinstance(error, LedgerVersionError) or (code >= 0 and code & 0xFF in _DAMAGED)


def set_aside(path: Path, error: sqlite3.Error, now: float) -> None:
    """Rename a damaged file; somebody else may have done so already.

    Raises:
        OSError: It can not be renamed.
    """
    aside = path.with_name(f"{path.name}.unreadable-{int(now)}")
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        path.replace(aside)
    log.warning(events.LEDGER_QUARANTINED, extra={"path": str(aside), "reason": str(error)})


def ledger_error(path: Path, error: sqlite3.Error) -> PropmasterError:
    """Return the error of our tree for one of SQLite's: NoSpaceError or LocalWriteError."""
    code: int = getattr(error, "sqlite_errorcode", -1) & 0xFF
    # A full disk is an input/output error to who maps the shared-memory file.
    if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and _is_full(path)):
        return NoSpaceError(f"{path}: {error}", hint="free some space in the state directory")
    return LocalWriteError(
        f"{path}: {error}", hint="check the state directory's owner, mode and free space"
    )


def _is_full(path: Path) -> bool:
    try:
        filesystem = os.statvfs(path.parent)
    except OSError:
        return False
    # The shared-memory file grows by so much: https://sqlite.org/walformat.html#shm
    return filesystem.f_bavail * filesystem.f_frsize < _SHM_BYTES


def to_sql(text: str) -> str | bytes:
    """Return a text as SQLite can hold it: bytes when it is a path that is not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        # Such a path has lone surrogates, which TEXT can not hold.
        return os.fsencode(text)
    return text


def from_sql(value: str | bytes) -> str:
    """Return what `to_sql` was given."""
    return os.fsdecode(value)
