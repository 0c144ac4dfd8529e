"""propmaster as what opens `deadline://` and `propmaster://` URLs on a Linux desktop.

Two files say it: a desktop entry, and a line for each scheme in `mimeapps.list`, where a user's
other choices are, too. That file is changed line by line, and every other byte stays. What stood
there before is kept in a record of ours, so that uninstalling brings it back: to the byte if nobody
has changed the file since, else line by line. A record that can not be read is set aside when
propmaster goes: our names are taken out of the lines then, behind which the others' still stand.

One process at a time changes these files, by a lock on the user's home directory, which is there
before anything of ours is and stays when all of it has gone. Other programs know of no lock.

No desktop session is needed, and none is told: desktops look at these files by themselves. The
index of handlers is made anew by `update-desktop-database`, where there is one.

Sources: https://specifications.freedesktop.org/mime-apps-spec/latest/ and
https://specifications.freedesktop.org/desktop-entry-spec/latest/
"""

import os
import re
import secrets
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Self

import msgspec

from agent_plugin.content.errors import (
    LocalReadError,
    LocalWriteError,
    local_write_error,
)
from agent_plugin.content.lock_holder import take_flock
from agent_plugin.desktop_entry import command_of, entry_of, is_ours, kind_of
from agent_plugin.mime_apps import Defaults
from agent_plugin.session.download_url import SCHEMES, Scheme

DESKTOP_ID: Final = "propmaster-url.desktop"
_RECORD: Final = "url-handler.json"
_UPDATE: Final = "update-desktop-database"
# What that program makes.
_INDEX: Final = "mimeinfo.cache"
_UPDATE_SECONDS: Final = 30.0
# Another process may be at that.
_LOCK_SECONDS: Final = 2 * _UPDATE_SECONDS
_MAX_BYTES: Final = 4 * 1024 * 1024
# A list as it was and as it was written, in base64.
_MAX_RECORD_BYTES: Final = 3 * _MAX_BYTES


@dataclass(frozen=True, slots=True)
class Desktop:
    """Where the files are.

    Attributes:
        applications: The directory of desktop entries.
        defaults: `mimeapps.list`.
        records: The directory of our record.
        home: What is locked; above all of them, or the next directory that there is.
        overriding: Lists that the desktops of this session prefer to `defaults`.
    """

    applications: Path
    defaults: Path
    records: Path
    home: Path
    overriding: tuple[Path, ...] = ()

    @classmethod
    def of_user(cls, environment: Mapping[str, str]) -> Self:
        """Return a user's, by the XDG variables."""
        home = Path(environment.get("HOME") or Path.home())
        data = _directory(environment, "XDG_DATA_HOME", home / ".local/share")
        config = _directory(environment, "XDG_CONFIG_HOME", home / ".config")
        desktops = environment.get("XDG_CURRENT_DESKTOP", "").lower().split(":")
        overriding = tuple(
            config / f"{name}-mimeapps.list"
            for name in desktops
            if re.fullmatch(r"[a-z0-9-]+", name)
        )
        return cls(
            *(data / "applications", config / "mimeapps.list", data / "propmaster", home),
            overriding=overriding,
        )

    @classmethod
    def of_system(cls, root: Path = Path("/")) -> Self:
        """Return the host's, for all users who have chosen nothing else."""
        return cls(
            root / "usr/local/share/applications",
            root / "etc/xdg/mimeapps.list",
            root / "var/lib/propmaster",
            root,
        )

    @property
    def entry(self) -> Path:
        """Our desktop entry."""
        return self.applications / DESKTOP_ID

    @property
    def record(self) -> Path:
        """What was there before."""
        return self.records / _RECORD


class HandlerStatus(msgspec.Struct, rename="camel"):
    """Who opens the URLs, as the files say.

    Attributes:
        state: `installed`; `incomplete`: something of it is missing or another's; `absent`.
        desktop_file, mimeapps: The files.
        command: What the entry starts, empty without one.
        defaults: By scheme the desktop entry that comes first, empty without one.
        before: By scheme what came first before the installation.
        overridden_by: A list that this session's desktop prefers, and that names another.
        damage: Why it is not known what was there before, and what to do; empty if it is.
    """

    state: Literal["installed", "incomplete", "absent"]
    desktop_file: str
    mimeapps: str
    command: str
    defaults: dict[str, str]
    before: dict[str, str]
    overridden_by: str = ""
    damage: str = ""


class _Record(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    """What was there before.

    Attributes:
        mimeapps: The file's bytes (in JSON as base64); None when there was no file.
        written: The bytes that were written in their place.
        schemes: Those that were set.
        made: Directories that were made, the outermost first.
    """

    mimeapps: bytes | None
    written: bytes
    schemes: list[Literal["deadline", "propmaster"]]
    made: list[str] = []


class _DamagedError(Exception):
    """The record can not be read; says why."""


def command_line() -> list[str]:
    """Return by what this program is started: the installed command, or Python with the package."""
    installed = Path(sys.executable).with_name("propmaster")
    if os.access(installed, os.X_OK):
        return [os.fspath(installed)]
    return [sys.executable, "-m", "agent_plugin"]


def install(desktop: Desktop, schemes: Sequence[Scheme], command: Sequence[str]) -> HandlerStatus:
    """Make propmaster open URLs of the schemes; what is so already stays.

    Args:
        desktop: For whom.
        schemes: Of DownloadUrl.
        command: By what propmaster is started.

    Raises:
        SettingsInvalidError: The command can not stand in a desktop entry.
        LocalReadError: A file can not be read, or another program has our entry's name.
        NoSpaceError, LocalWriteError: A file can not be written, or another process changes them.
    """
    with _locked(desktop):
        _install(desktop, schemes, command)
        return status(desktop)


def _install(desktop: Desktop, schemes: Sequence[Scheme], command: Sequence[str]) -> None:
    found = _read(desktop.entry)
    if found is not None and not is_ours(found):
        raise LocalReadError(
            f"{desktop.entry} is another program's",
            hint="see who made it, and move it out of the way",
        )
    try:
        record = _read_record(desktop)
    except _DamagedError as error:
        raise LocalReadError(
            f"{desktop.record} can not be read: {error}",
            hint="`propmaster url-handler uninstall` takes propmaster out all the same, and says"
            " what it can not bring back; install it anew then",
        ) from error
    current = _read(desktop.defaults)
    if record is not None:
        schemes = list(dict.fromkeys([*record.schemes, *schemes]))
    text = entry_of(command, schemes)
    wanted = current or b""
    for scheme in schemes:
        wanted = Defaults(wanted).preferring(kind_of(scheme), DESKTOP_ID)
    # What is to be brought back is told before anything is changed.
    made = [
        os.fspath(at)
        for directory in (desktop.records, desktop.applications, desktop.defaults.parent)
        for at in reversed([directory, *directory.parents])
        if not os.path.lexists(at)
    ]
    _make(desktop.records, 0o700)
    if record is None or wanted != (current or b"") or [*schemes] != record.schemes:
        original = current if record is None else _undone(current, record)
        known = record.made if record else []
        directories = [*dict.fromkeys([*known, *made])]
        new = _Record(original, wanted, [*schemes], directories)
        _write_record(desktop, new)
    _make(desktop.applications)
    _make(desktop.defaults.parent)
    if found != text:
        _replace(desktop.entry, text, mode=0o644)
        _update(desktop)
    if wanted != (current or b""):
        _replace(desktop.defaults, wanted)


def uninstall(desktop: Desktop) -> HandlerStatus:
    """Take out what `install` has put in, and bring back what was there before.

    Raises:
        LocalReadError: A file can not be read.
        NoSpaceError, LocalWriteError: A file can not be written or removed, or another process
            changes them.
    """
    with _locked(desktop):
        damage = _uninstall(desktop)
        found = status(desktop)
        found.damage = damage
        return found


def _uninstall(desktop: Desktop) -> str:
    damage, record = "", None
    try:
        record = _read_record(desktop)
    except _DamagedError as error:
        aside = desktop.record.with_name(f"{_RECORD}.damaged")
        damage = (
            f"{desktop.record} could not be read ({error}), and is {aside} now: what was the"
            f" default before is what {desktop.defaults} says now; look whether it is what you want"
        )
        _rename(desktop.record, aside)
    current = _read(desktop.defaults)
    wanted = _undone(current, record)
    if wanted != current:
        if wanted is None:
            _remove(desktop.defaults)
        else:
            _replace(desktop.defaults, wanted)
    found = _read(desktop.entry)
    if found is not None and is_ours(found):
        _remove(desktop.entry)
        _update(desktop)
    _remove(desktop.record)
    _remove_made(desktop, record.made if record else [])
    return damage


def status(desktop: Desktop, schemes: Sequence[str] = ()) -> HandlerStatus:
    """Return who opens the URLs.

    Args:
        desktop: Of whom.
        schemes: Those to tell of; none: those of the record, or all.

    Raises:
        LocalReadError: A file can not be read.
    """
    damage, record = "", None
    try:
        record = _read_record(desktop)
    except _DamagedError as error:
        damage = f"{desktop.record} can not be read: {error}"
    schemes = schemes or (record.schemes if record else SCHEMES)
    entry = _read(desktop.entry) or b""
    ours = is_ours(entry)
    defaults = _first(_read(desktop.defaults), schemes)
    overriding = _overriding(desktop, schemes)
    complete = ours and all(default == DESKTOP_ID for default in defaults.values())
    some = ours or DESKTOP_ID in defaults.values()
    return HandlerStatus(
        state="installed" if complete and not overriding else "incomplete" if some else "absent",
        desktop_file=os.fspath(desktop.entry),
        mimeapps=os.fspath(desktop.defaults),
        command=command_of(entry) if ours else "",
        defaults=defaults,
        before=_first(record.mimeapps, schemes) if record else {},
        overridden_by=overriding,
        damage=damage,
    )


def _remove_made(desktop: Desktop, made: Sequence[str]) -> None:
    """Remove the directories that were made, unless others have put something there since."""
    index = desktop.applications / _INDEX
    is_ours = os.fspath(desktop.applications) in made and desktop.applications.is_dir()
    if is_ours and [*desktop.applications.iterdir()] == [index]:
        _remove(index)
    used = {desktop.applications, desktop.defaults.parent, desktop.records}
    # Whatever the record says: nothing else was ever made.
    possible = used | {parent for directory in used for parent in directory.parents}
    for directory in [*map(Path, reversed(made)), desktop.records]:
        if directory in possible:
            with suppress(OSError):
                directory.rmdir()


# --------------------------------------------------------------------------------- what is written


def _undone(current: bytes | None, record: _Record | None) -> bytes | None:
    """Return `mimeapps.list` as it would be had there been no installation."""
    if record is not None and current == record.written:
        return record.mimeapps
    if current is None:
        return None
    before = record.mimeapps if record else None
    for scheme in record.schemes if record else SCHEMES:
        current = Defaults(current).without(kind_of(scheme), DESKTOP_ID, Defaults(before or b""))
    return current


def _first(data: bytes | None, schemes: Sequence[str]) -> dict[str, str]:
    defaults = Defaults(data or b"")
    return {scheme: defaults.first(kind_of(scheme)) for scheme in schemes}


def _overriding(desktop: Desktop, schemes: Sequence[str]) -> str:
    for path in desktop.overriding:
        for first in _first(_read(path), schemes).values():
            if first not in ("", DESKTOP_ID):
                return os.fspath(path)
    return ""


def _update(desktop: Desktop) -> None:
    """Make the index of handlers anew; desktops that have none look at the entries themselves."""
    program = shutil.which(_UPDATE)
    if program is None or not desktop.applications.is_dir():
        return
    try:
        subprocess.run(  # noqa: S603 - a program of the host's, with a directory
            [program, os.fspath(desktop.applications)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_UPDATE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        # The index is made when the next program is installed.
        return


# ------------------------------------------------------------------------------------------- files


def _directory(environment: Mapping[str, str], name: str, otherwise: Path) -> Path:
    # The base directory specification ignores relative ones.
    value = environment.get(name, "")
    return Path(value) if value.startswith("/") else otherwise


@contextmanager
def _locked(desktop: Desktop) -> Iterator[None]:
    """Keep other processes from changing the files meanwhile.

    Raises:
        LocalWriteError: One of them does not come to its end.
    """
    home = next(at for at in (desktop.home, *desktop.home.parents) if at.is_dir())
    try:
        fd = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise LocalWriteError(f"{home}: {error.strerror}") from error
    try:
        # NFS locks no directory.
        with suppress(OSError):
            take_flock(fd, os.fspath(home), seconds=_LOCK_SECONDS)
        yield
    finally:
        os.close(fd)


def _read(path: Path, most_bytes: int = _MAX_BYTES) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise LocalReadError(f"{path} is not a regular file", hint="remove it")
            data = file.read(most_bytes + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LocalReadError(f"{path}: {error.strerror}") from error
    if len(data) > most_bytes:
        raise LocalReadError(f"{path} has more than {most_bytes} bytes", hint="see what it is")
    return data


def _replace(path: Path, data: bytes, *, mode: int | None = None) -> None:
    """Replace a file whole; a link stays, and what it leads to is replaced."""
    real = Path(os.path.realpath(path))
    temporary = real.with_name(f".{real.name}.{secrets.token_hex(4)}")
    try:
        if mode is None:
            mode = stat.S_IMODE(real.stat().st_mode) if real.exists() else 0o644
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, mode)
            file.write(data)
            file.flush()
            os.fsync(fd)
        temporary.replace(real)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise local_write_error(error, os.fspath(path)) from error


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise LocalWriteError(f"{path}: {error.strerror}") from error


def _rename(path: Path, to: Path) -> None:
    try:
        path.replace(to)
    except OSError as error:
        raise local_write_error(error, os.fspath(path)) from error


def _make(directory: Path, mode: int = 0o755) -> None:
    try:
        directory.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        raise local_write_error(error, os.fspath(directory)) from error


def _read_record(desktop: Desktop) -> _Record | None:
    data = _read(desktop.record, _MAX_RECORD_BYTES)
    if data is None:
        return None
    try:
        return msgspec.json.decode(data, type=_Record)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _DamagedError(str(error)) from error


def _write_record(desktop: Desktop, record: _Record) -> None:
    _replace(desktop.record, msgspec.json.encode(record) + b"\n", mode=0o600)
