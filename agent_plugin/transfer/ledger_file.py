"""The files that ledger and archive are in: made private, opened, lent, set aside when damaged.

A file is made, and set aside, by one process at a time, under a lock of its directory. Its tables
and its version come in one transaction: whenever the maker is killed, the file counts as empty, and
the next one makes it. A file of an older version is brought to ours in one transaction as well. A
file that is not damaged is never set aside, whatever a statement says.
"""

import errno
import fcntl
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import unquote_to_bytes

from agent_plugin.content import events
from agent_plugin.content.errors import (
    LocalWriteError,
    NoSpaceError,
    PropmasterError,
    local_write_error,
)
from agent_plugin.transfer.ledger_holder import holder_of
from agent_plugin.transfer.ledger_migrate import from_version_1

BUSY_TIMEOUT_SECONDS: Final = 10.0
# People are promised an answer within a second, if only whom they wait for.
SAY_AFTER_SECONDS: Final = 0.7
# Result codes: https://sqlite.org/rescode.html. SQLITE_ERROR is not among them: it may be anything.
_DAMAGED: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_WRONG_KINDS: Final = {stat.S_IFLNK: errno.ELOOP, stat.S_IFDIR: errno.EISDIR}
_POLL_SECONDS: Final = 0.02
_FILE_URL: Final = "file://"
_SHM_BYTES: Final = 32 * 1024

log = events.get_logger()


@dataclass(frozen=True, slots=True)
class Schema:
    """What a file has to hold.

    Attributes:
        script: The file of statements that makes its tables, beside this module.
        version: What its `user_version` is then.
        tables: What it has at least.
        older: How a file of an older version becomes one of this, with the tables it has at least.
    """

    script: str
    version: int
    tables: frozenset[str]
    older: Mapping[int, tuple[frozenset[str], Callable[[sqlite3.Connection], None]]] = field(
        default_factory=dict
    )

    def read(self) -> str:
        """Return the statements."""
        return Path(__file__).with_name(self.script).read_text(encoding="utf-8")


LEDGER: Final = Schema(
    "ledger.sql",
    2,
    frozenset({"transfer", "task", "sample", "result", "event"}),
    {1: (frozenset({"transfer", "task", "sample"}), from_version_1)},
)
ARCHIVE: Final = Schema("archive.sql", 1, frozenset({"transfer", "packed", "result"}))


class LedgerBusyError(LocalWriteError):
    """Another process kept the ledger to itself for longer than was waited."""


class _UnusableError(sqlite3.DatabaseError):
    """The file can be opened and is no ledger of this version: damaged, another's, or empty."""


class LedgerFile:
    """The file, open; one connection, lent under one lock. May be used from any thread.

    Args:
        path: The file; its directory exists and is private to this user.
        clock: Seconds since the epoch, for the name of a file that is set aside.
        schema: What it has to hold.

    Raises:
        NoSpaceError, LocalWriteError: It can not be opened or made; a link is not followed.
    """

    def __init__(self, path: Path, clock: Callable[[], float], schema: Schema = LEDGER) -> None:
        self._path = path
        self._clock = clock
        self._schema = schema
        self._lock = threading.RLock()
        # As sqlite3.connect is told.
        self._patience = BUSY_TIMEOUT_SECONDS
        try:
            self._connection = self._open()
            self._identity = _identity(path)
        except sqlite3.DatabaseError as error:
            raise ledger_error(path, error) from error
        except OSError as error:
            raise local_write_error(error, os.fspath(path)) from error

    def close(self) -> None:
        """Close it; a second time does nothing."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Lend the connection; what SQLite says becomes an error of ours.

        A file that turns out damaged is set aside, so that the next command begins a new one.

        Raises:
            NoSpaceError, LocalWriteError: Instead of any error of SQLite.
        """
        with self._lend(BUSY_TIMEOUT_SECONDS) as connection:
            yield connection

    @contextmanager
    def write(self, *, patience: float = BUSY_TIMEOUT_SECONDS) -> Iterator[sqlite3.Connection]:
        """Lend the connection in a transaction, which an error undoes.

        Args:
            patience: Seconds to wait for another process that writes.

        Raises:
            LedgerBusyError: It took longer; nothing was done.
            NoSpaceError, LocalWriteError: Instead of any other error of SQLite.
        """
        with self._lend(patience) as connection:
            try:
                # In here: a signal may raise as soon as it has begun.
                self._begin(connection, patience)
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back by itself after some errors, a full disk among them.
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def _begin(self, connection: sqlite3.Connection, patience: float) -> None:
        """Begin a transaction; say whom it waits for, if that takes longer than people expect."""
        if patience > SAY_AFTER_SECONDS:
            _set_patience(connection, SAY_AFTER_SECONDS)
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if _code(error) != sqlite3.SQLITE_BUSY:
                    raise
            else:
                return
            holder = holder_of(self._path)
            extra = {"path": os.fspath(self._path), "holder": str(holder or "")}
            log.info(events.LEDGER_BUSY, extra=extra)
            _set_patience(connection, patience - SAY_AFTER_SECONDS)
        connection.execute("BEGIN IMMEDIATE")

    @contextmanager
    def _lend(self, patience: float) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                if patience != self._patience:
                    _set_patience(self._connection, patience)
                    self._patience = patience
                yield self._connection
            except sqlite3.DatabaseError as error:
                if _is_damaged(error):
                    self._give_up(error)
                raise ledger_error(self._path, error) from error

    def _open(self) -> sqlite3.Connection:
        with suppress(_UnusableError):
            return _connect(self._path, self._schema, create=False)
        # One process at a time, or the second would set aside what the first has just made.
        with _locked_directory(self._path.parent):
            try:
                return _connect(self._path, self._schema, create=True)
            except _UnusableError as error:
                self._set_aside(error)
                return _connect(self._path, self._schema, create=True)

    def _give_up(self, error: sqlite3.Error) -> None:
        """Set the damaged file aside, unless another stands in its place already."""
        try:
            with _locked_directory(self._path.parent):
                if _identity(self._path) == self._identity:
                    self._set_aside(error)
        except OSError as failure:
            raise local_write_error(failure, os.fspath(self._path)) from failure

    def _set_aside(self, reason: sqlite3.Error) -> None:
        aside = self._path.with_name(f"{self._path.name}.unreadable-{int(self._clock())}")
        # The file first: who opens it from now on must not find another's write-ahead log.
        with suppress(FileNotFoundError):
            self._path.replace(aside)
        for suffix in ("-wal", "-shm"):
            Path(f"{self._path}{suffix}").unlink(missing_ok=True)
        extra = {"path": str(aside), "reason": str(reason)}
        log.warning(events.LEDGER_QUARANTINED, extra=extra)


def _set_patience(connection: sqlite3.Connection, seconds: float) -> None:
    connection.execute(f"PRAGMA busy_timeout = {round(seconds * 1000)}")


def _connect(path: Path, schema: Schema, *, create: bool) -> sqlite3.Connection:
    """Return a connection to a file of our version; with `create`, make it (0600) if need be.

    Raises:
        _UnusableError: It is damaged, of another version, or (without `create`) absent or empty.
        sqlite3.DatabaseError, OSError: It can not be opened or made.
    """
    _insist_file(path, create=create)
    connection = sqlite3.connect(
        path, timeout=BUSY_TIMEOUT_SECONDS, isolation_level=None, check_same_thread=False
    )
    try:
        _insist_version(connection, schema, create=create)
        # With WAL this loses the last transactions in a power cut and nothing else:
        # https://sqlite.org/pragma.html#pragma_synchronous
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
    except sqlite3.DatabaseError as error:
        connection.close()
        if _is_damaged(error):
            raise _UnusableError(str(error)) from error
        raise
    return connection


def _insist_file(path: Path, *, create: bool) -> None:
    try:
        # Not opened to look: closing it would drop the locks that SQLite holds on it for this
        # process (https://sqlite.org/howtocorrupt.html, 2.2).
        mode = path.lstat().st_mode
    except FileNotFoundError as error:
        if not create:
            raise _UnusableError("it is not there") from error
        # It holds paths and errors of all jobs: made private before SQLite opens it.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(os.open(path, flags, 0o600))
        return
    if not stat.S_ISREG(mode):
        code = _WRONG_KINDS.get(stat.S_IFMT(mode), errno.EINVAL)
        raise OSError(code, os.strerror(code), os.fspath(path))


def _insist_version(connection: sqlite3.Connection, schema: Schema, *, create: bool) -> None:
    """Accept a file of our version; with `create`, make an empty or an older one so."""
    version, tables = _found(connection)
    if version == schema.version and tables >= schema.tables:
        return
    older, migrate = schema.older.get(version, (None, None))
    if older is not None and migrate is not None and tables >= older:
        if not create:
            raise _UnusableError(f"it is of version {version}")
        _migrate(connection, version, migrate)
        return
    if version or tables:
        raise _UnusableError(
            f"version {version} with {', '.join(sorted(tables)) or 'no tables'}, not version"
            f" {schema.version} with {', '.join(sorted(schema.tables))}"
        )
    if not create:
        raise _UnusableError("it is empty")
    _switch_to_wal(connection)
    connection.executescript(f"BEGIN IMMEDIATE;\n{schema.read()}\nCOMMIT;")


def _found(connection: sqlite3.Connection) -> tuple[int, frozenset[str]]:
    """Return the version and the names of the tables and indexes that a file has."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    names = connection.execute("SELECT name FROM sqlite_master")
    return version, frozenset(name for (name,) in names)


def _migrate(
    connection: sqlite3.Connection, version: int, migrate: Callable[[sqlite3.Connection], None]
) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        # Who held the directory's lock too long for us to wait may have done it meanwhile.
        if _found(connection)[0] == version:
            migrate(connection)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    log.info(events.LEDGER_MIGRATED, extra={"from_version": version})


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    """Switch to the write-ahead log, for which SQLite does not wait for a writer by itself."""
    until = time.monotonic() + BUSY_TIMEOUT_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(_POLL_SECONDS)
        else:
            return


@contextmanager
def _locked_directory(path: Path) -> Iterator[None]:
    """Hold a flock on a directory, or go on without it when that takes too long."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        until = time.monotonic() + BUSY_TIMEOUT_SECONDS
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > until:
                break
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(fd)


def _identity(path: Path) -> tuple[int, int] | None:
    """Return device and inode of the file that stands there now; None when there is none."""
    try:
        info = path.lstat()
    except FileNotFoundError:
        return None
    return info.st_dev, info.st_ino


def _code(error: sqlite3.Error) -> int:
    # The low byte is the primary code, the rest tells where exactly.
    code: int = getattr(error, "sqlite_errorcode", -1)
    return code & 0xFF if code >= 0 else code


def _is_damaged(error: sqlite3.Error) -> bool:
    """Whether the file is no ledger of ours, rather than that it can not be used right now."""
    return isinstance(error, _UnusableError) or _code(error) in _DAMAGED


def ledger_error(path: Path, error: sqlite3.Error) -> PropmasterError:
    """Return the error of our tree for one of SQLite's: NoSpaceError or LocalWriteError."""
    code = _code(error)
    # A full disk is an input/output error to who maps the shared-memory file.
    if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and _is_full(path)):
        return NoSpaceError(f"{path}: {error}", hint="free some space in the state directory")
    if code == sqlite3.SQLITE_BUSY:
        holder = holder_of(path)
        return LedgerBusyError(
            f"{path}: {error}: {holder} writes to it" if holder else f"{path}: {error}",
            hint=f"let it go on: kill -CONT {holder.pid}"
            if holder and holder.stopped
            else "another process is writing to it: try again, and if it lasts, look for one that"
            " was stopped",
        )
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


def place_of(value: str | bytes) -> str | bytes:
    """Return where a task reads or writes, for people: a file of this host by its path.

    Args:
        value: As the ledger has it; so is what is returned.
    """
    if isinstance(value, bytes) or not value.startswith(_FILE_URL):
        return value
    return to_sql(os.fsdecode(unquote_to_bytes(value.removeprefix(_FILE_URL))))
