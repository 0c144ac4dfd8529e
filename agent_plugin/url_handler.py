"""propmaster as what opens `deadline://` and `propmaster://` URLs on a Linux desktop.

Two files say it: a desktop entry, and a line for each scheme in `mimeapps.list`, where a user's
other choices are, too. That file is changed line by line, and every other byte stays. What stood
there before is kept in a record of ours, so that uninstalling brings it back: to the byte if nobody
has changed the file since, else line by line.

No desktop session is needed, and none is told: desktops look at these files by themselves. The
index of handlers is made anew by `update-desktop-database`, where there is one.

Sources: https://specifications.freedesktop.org/mime-apps-spec/latest/ and
https://specifications.freedesktop.org/desktop-entry-spec/latest/
"""

import base64
import os
import re
import secrets
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Self

import msgspec

from agent_plugin.content.errors import (
    LocalReadError,
    LocalWriteError,
    SettingsInvalidError,
    local_write_error,
)
from agent_plugin.mime_apps import Defaults
from agent_plugin.session.download_url import SCHEMES

DESKTOP_ID: Final = "propmaster-url.desktop"
# By which an entry of ours is known, whatever program it names.
_MARK: Final = "X-Propmaster-Handler=true\n"
_RECORD: Final = "url-handler.json"
_UPDATE: Final = "update-desktop-database"
# What that program makes.
_INDEX: Final = "mimeinfo.cache"
_UPDATE_SECONDS: Final = 30.0
_MAX_BYTES: Final = 4 * 1024 * 1024
# https://specifications.freedesktop.org/desktop-entry-spec/latest/exec-variables.html
_QUOTED: Final = re.compile(r'(["`$\\])')
_PLAIN: Final = re.compile(r"[A-Za-z0-9_./+:@,-]+")


@dataclass(frozen=True, slots=True)
class Desktop:
    """Where the files are.

    Attributes:
        applications: The directory of desktop entries.
        defaults: `mimeapps.list`.
        records: The directory of our record.
        overriding: Lists that the desktops of this session prefer to `defaults`.
    """

    applications: Path
    defaults: Path
    records: Path
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
        return cls(data / "applications", config / "mimeapps.list", data / "propmaster", overriding)

    @classmethod
    def of_system(cls, root: Path = Path("/")) -> Self:
        """Return the host's, for all users who have chosen nothing else."""
        return cls(
            root / "usr/local/share/applications",
            root / "etc/xdg/mimeapps.list",
            root / "var/lib/propmaster",
        )

    @property
    def entry(self) -> Path:
        """Our desktop entry."""
        return self.applications / DESKTOP_ID


class HandlerStatus(msgspec.Struct, rename="camel"):
    """Who opens the URLs, as the files say.

    Attributes:
        state: `installed`; `incomplete`: something of it is missing or another's; `absent`.
        desktop_file, mimeapps: The files.
        command: What the entry starts, empty without one.
        defaults: By scheme the desktop entry that comes first, empty without one.
        before: By scheme what came first before the installation.
        overridden_by: A list that this session's desktop prefers, and that names another.
    """

    state: Literal["installed", "incomplete", "absent"]
    desktop_file: str
    mimeapps: str
    command: str
    defaults: dict[str, str]
    before: dict[str, str]
    overridden_by: str = ""


class _Record(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    """What was there before.

    Attributes:
        mimeapps: The file's bytes, base64; None when there was no file.
        written: The bytes that were written in their place, base64.
        schemes: Those that were set.
        made: Directories that were made, the outermost first.
    """

    mimeapps: str | None
    written: str
    schemes: list[str]
    made: list[str] = []


def command_line() -> list[str]:
    """Return by what this program is started: the installed command, or Python with the package."""
    installed = Path(sys.executable).with_name("propmaster")
    if os.access(installed, os.X_OK):
        return [os.fspath(installed)]
    return [sys.executable, "-m", "agent_plugin"]


def install(desktop: Desktop, schemes: Sequence[str], command: Sequence[str]) -> HandlerStatus:
    """Make propmaster open URLs of the schemes; what is so already stays.

    Args:
        desktop: For whom.
        schemes: Of DownloadUrl.
        command: By what propmaster is started.

    Raises:
        SettingsInvalidError: The command can not stand in a desktop entry.
        LocalReadError: A file can not be read, or another program has our entry's name.
        NoSpaceError, LocalWriteError: A file can not be written.
    """
    found = _read(desktop.entry)
    if found is not None and _MARK.encode() not in found:
        raise LocalReadError(
            f"{desktop.entry} is another program's",
            hint="see who made it, and move it out of the way",
        )
    record, current = _read_record(desktop), _read(desktop.defaults)
    if record is not None:
        schemes = list(dict.fromkeys([*record.schemes, *schemes]))
    text = _entry(command, schemes)
    wanted = current or b""
    for scheme in schemes:
        wanted = Defaults(wanted).preferring(_kind(scheme), DESKTOP_ID)
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
        new = _Record(_pack(original), _packed(wanted), [*schemes], directories)
        _write_record(desktop, new)
    _make(desktop.applications)
    _make(desktop.defaults.parent)
    if found != text:
        _replace(desktop.entry, text, mode=0o644)
        _update(desktop)
    if wanted != (current or b""):
        _replace(desktop.defaults, wanted)
    return status(desktop)


def uninstall(desktop: Desktop) -> HandlerStatus:
    """Take out what `install` has put in, and bring back what was there before.

    Raises:
        LocalReadError: A file can not be read.
        NoSpaceError, LocalWriteError: A file can not be written or removed.
    """
    record = _read_record(desktop)
    current = _read(desktop.defaults)
    wanted = _undone(current, record)
    if wanted != current:
        if wanted is None:
            _remove(desktop.defaults)
        else:
            _replace(desktop.defaults, wanted)
    found = _read(desktop.entry)
    if found is not None and _MARK.encode() in found:
        _remove(desktop.entry)
        _update(desktop)
    _remove(desktop.records / _RECORD)
    _remove_made(desktop, record.made if record else [])
    return status(desktop)


def status(desktop: Desktop, schemes: Sequence[str] = ()) -> HandlerStatus:
    """Return who opens the URLs.

    Args:
        desktop: Of whom.
        schemes: Those to tell of; none: those of the record, or all.

    Raises:
        LocalReadError: A file can not be read.
    """
    record = _read_record(desktop)
    schemes = schemes or (record.schemes if record else SCHEMES)
    entry = _read(desktop.entry) or b""
    ours = _MARK.encode() in entry
    defaults = _first(_read(desktop.defaults), schemes)
    overriding = _overriding(desktop, schemes)
    complete = ours and all(default == DESKTOP_ID for default in defaults.values())
    some = ours or DESKTOP_ID in defaults.values()
    return HandlerStatus(
        state="installed" if complete and not overriding else "incomplete" if some else "absent",
        desktop_file=os.fspath(desktop.entry),
        mimeapps=os.fspath(desktop.defaults),
        command=_command_of(entry) if ours else "",
        defaults=defaults,
        before=_first(_unpack(record.mimeapps), schemes) if record else {},
        overridden_by=overriding,
    )


def _remove_made(desktop: Desktop, made: Sequence[str]) -> None:
    """Remove the directories that were made, unless others have put something there since."""
    index = desktop.applications / _INDEX
    ours = os.fspath(desktop.applications) in made and desktop.applications.is_dir()
    if ours and [*desktop.applications.iterdir()] == [index]:
        _remove(index)
    for directory in [*map(Path, reversed(made)), desktop.records]:
        with suppress(OSError):
            directory.rmdir()


# --------------------------------------------------------------------------------- what is written


def _entry(command: Sequence[str], schemes: Sequence[str]) -> bytes:
    # The one is forbidden there; with the other GLib looks for the program as it is spelled here.
    if {"=", "%"} & set(command[0]):
        raise _unfit(command[0])
    program = " ".join(map(_exec_word, command))
    types = "".join(f"x-scheme-handler/{scheme};" for scheme in schemes)
    text = (
        "[Desktop Entry]\n"
        "Type=Application\n"
        "Name=propmaster: download outputs\n"
        "Comment=Brings the outputs of a render job to this computer\n"
        f"Exec={program} handle-url --prompt-when-complete -- %u\n"
        "Terminal=true\n"
        "NoDisplay=true\n"
        f"MimeType={types}\n"
        f"{_MARK}"
    )
    return os.fsencode(text)


def _exec_word(word: str) -> str:
    """Return a word as it stands in an Exec line: quoted, then escaped like any value."""
    if not word.isprintable():
        raise _unfit(word)
    if _PLAIN.fullmatch(word):
        return word
    quoted = _QUOTED.sub(r"\\\1", word).replace("%", "%%")
    return '"' + quoted.replace("\\", "\\\\") + '"'


def _unfit(word: str) -> SettingsInvalidError:
    return SettingsInvalidError(
        f"{word!r} can not stand in a desktop entry",
        hint="install propmaster below a path of letters, digits, `.`, `-` and `_`",
    )


def _command_of(entry: bytes) -> str:
    found = re.search(rb"^Exec=(.*)$", entry, re.MULTILINE)
    return os.fsdecode(found[1]) if found else ""


def _undone(current: bytes | None, record: _Record | None) -> bytes | None:
    """Return `mimeapps.list` as it would be had there been no installation."""
    if record is not None and current == _unpack(record.written):
        return _unpack(record.mimeapps)
    if current is None:
        return None
    before = _unpack(record.mimeapps) if record else None
    for scheme in record.schemes if record else SCHEMES:
        current = Defaults(current).without(_kind(scheme), DESKTOP_ID, Defaults(before or b""))
    return current


def _kind(scheme: str) -> str:
    return f"x-scheme-handler/{scheme}"


def _first(data: bytes | None, schemes: Sequence[str]) -> dict[str, str]:
    defaults = Defaults(data or b"")
    return {scheme: defaults.first(_kind(scheme)) for scheme in schemes}


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


def _read(path: Path) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise LocalReadError(f"{path} is not a regular file", hint="remove it")
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LocalReadError(f"{path}: {error.strerror}") from error
    if len(data) > _MAX_BYTES:
        raise LocalReadError(f"{path} has more than {_MAX_BYTES} bytes", hint="see what it is")
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


def _make(directory: Path, mode: int = 0o755) -> None:
    try:
        directory.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        raise local_write_error(error, os.fspath(directory)) from error


def _read_record(desktop: Desktop) -> _Record | None:
    path = desktop.records / _RECORD
    data = _read(path)
    if data is None:
        return None
    try:
        return msgspec.json.decode(data, type=_Record)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise LocalReadError(
            f"{path} can not be read: {error}",
            hint="remove it; what was the default before is forgotten with it",
        ) from error


def _write_record(desktop: Desktop, record: _Record) -> None:
    _replace(desktop.records / _RECORD, msgspec.json.encode(record) + b"\n", mode=0o600)


def _packed(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _pack(data: bytes | None) -> str | None:
    return None if data is None else _packed(data)


def _unpack(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)
