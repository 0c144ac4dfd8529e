"""What this host remembers: hashes of files it has read, and blobs it has seen in a store.

Both are caches in one SQLite file that all processes of the host share, and may be lost at any
time. So a file that is damaged or of another version is set aside and begun anew, never repaired;
and when the index can not be used (read-only or full disk, directory open to others) it turns
itself off with one warning, answers "unknown" and remembers nothing. No method raises.

All times are seconds or nanoseconds since the epoch as integers: no time zone has a say.
Threads take turns (one lock); processes wait for each other up to BUSY_SECONDS.
"""

import errno
import fcntl
import os
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from agent_plugin.content import events
from agent_plugin.content.digest import Digest

if TYPE_CHECKING:
    import sqlite3

SCHEMA_VERSION: Final = 1
BUSY_SECONDS: Final = 10
# Two edits within one tick of the file system's clock leave the same time. FAT has the coarsest,
# 2 s: https://learn.microsoft.com/en-us/windows/win32/sysinfo/file-times
SETTLED_NS: Final = 2_000_000_000
HASHES_KEPT_SECONDS: Final = 90 * 24 * 3600
EXISTENCE_KEPT_SECONDS: Final = 30 * 24 * 3600
# A last_seen ahead of us by more than this was written with a wrong clock; it would never age.
_CLOCK_SLACK_SECONDS: Final = 60
# SQLite before 3.32 takes at most 999 variables: https://sqlite.org/limits.html
_KEYS_PER_QUERY: Final = 900
_EXPIRED_PER_CALL: Final = 10_000
# Result codes: https://sqlite.org/rescode.html. SQLITE_ERROR: a table or column is missing.
_SQLITE_ERROR: Final = 1
_SQLITE_CORRUPT: Final = 11
_SQLITE_NOTADB: Final = 26
_DAMAGED: Final = frozenset({_SQLITE_ERROR, _SQLITE_CORRUPT, _SQLITE_NOTADB})
_SIDE_FILES: Final = ("-wal", "-shm", "-journal")

# SQLite keeps integers as signed 64 bits. Inodes can be larger (overlayfs marks layers in the
# highest bits), and so can times that somebody set.
_HALF: Final = 2**63
_LOCK_POLL_SECONDS: Final = 0.02

Answer = TypeVar("Answer")

log = events.get_logger()


class _UnusableError(Exception):
    """The file can be opened and is not one of ours: damaged, or of another version."""


class LocalIndex:
    """Hash cache and existence cache; made by `open`, for use from any thread.

    Attributes:
        path: The SQLite file.
    """

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self.path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._in_use: tuple[int, int] | None = None

    @classmethod
    def open(cls, path: Path, *, clock: Callable[[], float] = time.time) -> Self:
        """Open an index, and make it (0600, its directory 0700) when it is not there.

        Never raises: an index that can not be used answers "unknown" to everything.

        Args:
            path: Absolute; of the SQLite file.
            clock: Seconds since the epoch.
        """
        index = cls(path, clock)
        with index._lock:
            index._start()
        return index

    @property
    def enabled(self) -> bool:
        """Whether it is in use; False after `close` and when it turned itself off."""
        return self._connection is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        with self._lock:
            self._drop_connection()

    def lookup_hashes(self, files: Iterable[tuple[bytes, os.stat_result]]) -> dict[bytes, Digest]:
        """Return the digests of those files that are unchanged since they were remembered.

        Args:
            files: Absolute path as raw OS bytes, with its stat of now.
        """
        found: dict[bytes, Digest] = {}
        remaining = iter(files)
        while batch := dict(islice(remaining, _KEYS_PER_QUERY)):
            found.update(self._lookup(batch))
        return found

    def remember_hashes(self, rows: Iterable[tuple[bytes, os.stat_result, Digest]]) -> None:
        """Remember digests of files, in one transaction.

        Nothing is kept of a file that was modified less than 2 s ago: another edit could leave
        the same time.

        Args:
            rows: Absolute path as raw OS bytes, its stat from before its bytes were read (and
                unchanged after), and the digest of those bytes.
        """
        now = self._clock()
        settled_ns = int(now * 1_000_000_000) - SETTLED_NS
        kept = sorted(
            (path, *_state(info), bytes.fromhex(digest.hex), int(now))
            for path, info, digest in rows
            if -_HALF <= info.st_mtime_ns <= settled_ns and info.st_size == digest.size
        )
        self._write("INSERT OR REPLACE INTO hash_cache VALUES (?, ?, ?, ?, ?, ?, ?, ?)", kept)

    def known(
        self, store_url: str, digests: Collection[Digest], max_age_seconds: float
    ) -> set[Digest]:
        """Return those of the digests that the store was seen to have, at most that long ago."""
        now = self._clock()
        known: set[Digest] = set()
        remaining = iter(digests)
        while batch := {bytes.fromhex(one.hex): one for one in islice(remaining, _KEYS_PER_QUERY)}:
            rows = self._read(
                "SELECT hash, size FROM existence_cache"  # noqa: S608 - question marks only
                " WHERE store_url = ? AND last_seen BETWEEN ? AND ?"
                f" AND hash IN ({_marks(batch)})",
                [
                    store_url,
                    int(max(0, now - max_age_seconds)),
                    int(now) + _CLOCK_SLACK_SECONDS,
                    *batch,
                ],
            )
            known.update(batch[hash_] for hash_, size in rows if batch[hash_].size == size)
        return known

    def remember_present(self, store_url: str, digests: Iterable[Digest]) -> None:
        """Remember, in one transaction, that the store has these blobs now."""
        now = int(self._clock())
        rows = sorted((store_url, bytes.fromhex(one.hex), one.size, now) for one in digests)
        self._write("INSERT OR REPLACE INTO existence_cache VALUES (?, ?, ?, ?)", rows)

    def forget(self, store_url: str, digest: Digest) -> None:
        """Forget that the store had a blob, because it turned out to lack it."""
        self._write(
            "DELETE FROM existence_cache WHERE store_url = ? AND hash = ?",
            [(store_url, bytes.fromhex(digest.hex))],
        )

    def forget_store(self, store_url: str) -> None:
        """Forget all that a store was seen to have, because it turned out to lack some of it."""
        self._write("DELETE FROM existence_cache WHERE store_url = ?", [(store_url,)])

    def expire(self, *, max_rows: int = _EXPIRED_PER_CALL) -> int:
        """Remove old rows, at most `max_rows` of each kind; return how many.

        Reads the whole file, so it is for the end of a session and not for each task.
        """
        now = int(self._clock())
        hashes = self._write(
            "DELETE FROM hash_cache WHERE path IN"
            " (SELECT path FROM hash_cache WHERE stored_at < ? LIMIT ?)",
            [(now - HASHES_KEPT_SECONDS, max_rows)],
        )
        return hashes + self._write(
            "DELETE FROM existence_cache WHERE (store_url, hash) IN"
            " (SELECT store_url, hash FROM existence_cache WHERE last_seen < ? LIMIT ?)",
            [(now - EXISTENCE_KEPT_SECONDS, max_rows)],
        )

    def _lookup(self, batch: Mapping[bytes, os.stat_result]) -> dict[bytes, Digest]:
        sql = (
            "SELECT path, hash, size, mtime_ns, ctime_ns, inode, device"  # noqa: S608 - as above
            f" FROM hash_cache WHERE path IN ({_marks(batch)})"
        )

        def work(connection: "sqlite3.Connection") -> dict[bytes, Digest]:
            return {
                path: _digest(hash_, size)
                for path, hash_, size, *rest in connection.execute(sql, list(batch)).fetchall()
                if (size, *rest) == _state(batch[path])
            }

        return self._guard(work, {})

    def _read(self, sql: str, parameters: list[Any]) -> list[Any]:
        return self._guard(lambda connection: connection.execute(sql, parameters).fetchall(), [])

    def _write(self, sql: str, rows: Collection[tuple[Any, ...]]) -> int:
        """Run a statement for each row in one transaction; return how many rows changed."""

        def work(connection: "sqlite3.Connection") -> int:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                return connection.executemany(sql, rows).rowcount

        return self._guard(work, 0) if rows else 0

    def _guard(self, work: "Callable[[sqlite3.Connection], Answer]", unknown: Answer) -> Answer:
        """Return what `work` returns, or `unknown` when the index fails or is turned off."""
        with self._lock:
            if self._connection is None:
                return unknown
            import sqlite3  # noqa: PLC0415 - 5 ms, which commands without an index do not pay

            try:
                return work(self._connection)
            except _UnusableError as error:
                self._drop_connection()
                self._start(damaged=error)
            except sqlite3.Error as error:
                self._drop_connection()
                if _is_damaged(error):
                    self._start(damaged=_UnusableError(str(error)))
                else:
                    self._turn_off(error)
            return unknown

    def _start(self, *, damaged: _UnusableError | None = None) -> None:
        """Connect, after setting aside what is damaged; turn off when that is not possible.

        `damaged` is what was found wrong with the file that was in use, whatever it looks like.
        """
        import sqlite3  # noqa: PLC0415 - 5 ms, which commands without an index do not pay

        try:
            _insist_private_directory(self.path.parent)
            if damaged is None:
                with suppress(_UnusableError):
                    self._connection = self._connect(create=False)
                    return
            # One process at a time, or the second would set aside what the first has just made;
            # and switching a new file to WAL does not wait for others by itself.
            with _locked_directory(self.path.parent):
                if damaged is not None and self._identity() == self._in_use:
                    self._set_aside(damaged)
                try:
                    self._connection = self._connect(create=True)
                except _UnusableError as error:
                    self._set_aside(error)
                    self._connection = self._connect(create=True)
        except (OSError, sqlite3.Error, _UnusableError) as error:
            self._turn_off(error)

    def _connect(self, *, create: bool) -> "sqlite3.Connection":
        """Return a connection to a file of our version.

        Raises:
            _UnusableError: It is damaged, of another version, or (without `create`) empty.
            OSError, sqlite3.Error: It can not be opened.
        """
        import sqlite3  # noqa: PLC0415 - 5 ms, which commands without an index do not pay

        _insist_private_file(self.path, create=create)
        connection = sqlite3.connect(
            self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        # No column is text that would be looked at; damage can make one so, and not UTF-8 either.
        connection.text_factory = bytes
        try:
            _insist_version(connection, create=create)
        except sqlite3.Error as error:
            connection.close()
            if _is_damaged(error):
                raise _UnusableError(str(error)) from error
            raise
        except _UnusableError:
            connection.close()
            raise
        self._in_use = self._identity()
        return connection

    def _identity(self) -> tuple[int, int] | None:
        """Return device and inode of the file that stands there now; None when there is none."""
        try:
            info = self.path.lstat()
        except FileNotFoundError:
            return None
        return info.st_dev, info.st_ino

    def _set_aside(self, reason: _UnusableError) -> None:
        """Rename the file, in place of the one set aside before; at most one is kept."""
        aside = self.path.with_name(f"{self.path.name}.quarantined")
        for suffix in ("", *_SIDE_FILES):
            with suppress(FileNotFoundError):
                Path(f"{self.path}{suffix}").replace(f"{aside}{suffix}")
        extra = {"path": str(self.path), "aside": str(aside), "reason": str(reason)}
        log.warning(events.INDEX_QUARANTINED, extra=extra)

    def _turn_off(self, reason: Exception) -> None:
        self._drop_connection()
        log.warning(events.INDEX_DISABLED, extra={"path": str(self.path), "reason": str(reason)})

    def _drop_connection(self) -> None:
        if self._connection is None:
            return
        import sqlite3  # noqa: PLC0415 - imported already when there is a connection

        # Closing copies the log into the file; on a full disk the log stays for the next one.
        with suppress(sqlite3.Error):
            self._connection.close()
        self._connection = None


def _digest(hash_: object, size: int) -> Digest:
    """Return the digest that a row holds.

    Raises:
        _UnusableError: It is none, though its file is the one that was remembered.
    """
    try:
        if isinstance(hash_, bytes):
            return Digest(hash_.hex(), size)
    except ValueError:
        pass
    raise _UnusableError(f"a row has the hash {ascii(hash_)[:80]} for {size} bytes")


def _state(info: os.stat_result) -> tuple[int, int, int, int, int]:
    """Return size, mtime_ns, ctime_ns, inode and device as SQLite can keep them."""
    inode, device = info.st_ino, info.st_dev
    if inode >= _HALF:
        inode -= 2 * _HALF
    if device >= _HALF:
        device -= 2 * _HALF
    return info.st_size, info.st_mtime_ns, info.st_ctime_ns, inode, device


def _marks(keys: Collection[bytes]) -> str:
    return ",".join("?" * len(keys))


def _is_damaged(error: "sqlite3.Error") -> bool:
    code: int = getattr(error, "sqlite_errorcode", 0)
    # The low byte is the primary code, the rest tells where exactly.
    return code & 0xFF in _DAMAGED


def _insist_version(connection: "sqlite3.Connection", *, create: bool) -> None:
    """Accept a file of our version; with `create`, make an empty one so."""
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version == 0 and create:
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise _UnusableError("it has tables and no version")
        connection.execute("PRAGMA journal_mode = WAL")
        schema = Path(__file__).with_name("schema.sql").read_text(encoding="utf-8")
        connection.executescript(f"BEGIN IMMEDIATE;\n{schema}\nCOMMIT;")
    elif version != SCHEMA_VERSION:
        raise _UnusableError(f"version {version}, not {SCHEMA_VERSION}")
    # With WAL this loses the last transactions in a power cut and nothing else:
    # https://sqlite.org/pragma.html#pragma_synchronous
    connection.execute("PRAGMA synchronous = NORMAL")


def _insist_private_directory(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = path.stat()
    if info.st_uid != os.geteuid() or info.st_mode & 0o022:
        mode = stat.S_IMODE(info.st_mode)
        raise PermissionError(
            errno.EPERM, f"others can write it (mode {mode:04o}, user {info.st_uid})", str(path)
        )


def _insist_private_file(path: Path, *, create: bool) -> None:
    """Accept a regular file that only we can write; with `create`, make an absent one."""
    try:
        # Not opened to look: closing it would drop the locks that SQLite holds on it for this
        # process (https://sqlite.org/howtocorrupt.html, 2.2).
        info = path.lstat()
    except FileNotFoundError as error:
        if not create:
            raise _UnusableError("it is not there") from error
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(os.open(path, flags, 0o600))
        return
    if not stat.S_ISREG(info.st_mode):
        raise _UnusableError("it is no regular file")
    if info.st_uid != os.geteuid() or info.st_mode & 0o022:
        raise _UnusableError(f"others can write it (mode {stat.S_IMODE(info.st_mode):04o})")


@contextmanager
def _locked_directory(path: Path) -> Iterator[None]:
    """Hold a flock on a directory, or go on without it after BUSY_SECONDS."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for attempt in range(round(BUSY_SECONDS / _LOCK_POLL_SECONDS)):
            if attempt:
                time.sleep(_LOCK_POLL_SECONDS)
            with suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
        yield
    finally:
        os.close(fd)
