"""The host's settings: one TOML file, typed and strict, with a default for everything.

The file is the one named by `--config`, else by PROPMASTER_CONFIG, else
/etc/propmaster/config.toml, which need not exist. PROPMASTER_CACHE_DIR and PROPMASTER_STATE_DIR
override its paths, so that one host can run several programs apart; nothing else is taken from the
environment here.
"""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import msgspec
from msgspec import Meta

from agent_plugin import schema
from agent_plugin.content.errors import SettingsInvalidError

CONFIG_VARIABLE: Final = "PROPMASTER_CONFIG"
CACHE_VARIABLE: Final = "PROPMASTER_CACHE_DIR"
STATE_VARIABLE: Final = "PROPMASTER_STATE_DIR"
DEFAULT_FILE: Final = Path("/etc/propmaster/config.toml")
DEFAULT_SOCKET: Final = Path("/run/propmaster/worker.socket")

# Sizes of the cache follow the disk unless they are set: docs/OPERATING.md, Disk space.
AUTOMATIC_PERCENT: Final = 25
_LEAST_MIN_FREE: Final = 1024**3

_SIZE: Final = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,6})?)\s*([A-Za-z%]*)")
_UNITS: Final = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000 ** (n + 1) for n, letter in enumerate("kmgt")},
    **{f"{letter}ib": 1024 ** (n + 1) for n, letter in enumerate("kmgt")},
}
_HEADER: Final = re.compile(r"\s*\[\s*([^\[\]]+?)\s*\]")


class Size:
    """An amount of disk space: bytes, or a part of the file system it is on.

    Not a dataclass, because msgspec would then expect a table in the file and not ask `parse`.

    Args:
        bytes: Used when `percent` is 0.
        percent: Of the file system's size, 0 to 100.
    """

    __slots__ = ("bytes", "percent")

    def __init__(self, bytes: int = 0, *, percent: float = 0.0) -> None:  # noqa: A002 - its unit
        self.bytes = bytes
        self.percent = percent

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Size):
            return NotImplemented
        return (self.bytes, self.percent) == (other.bytes, other.percent)

    def __hash__(self) -> int:
        return hash((self.bytes, self.percent))

    def __repr__(self) -> str:
        return f"Size({self.bytes}, percent={self.percent})"

    @classmethod
    def parse(cls, value: object) -> Self:
        """Return the size that a number of bytes, "200 GiB", "1.5TB" or "5 %" says.

        Raises:
            ValueError: It says none.
        """
        match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
        if match is not None and match[2] == "%" and float(match[1]) <= 100:  # noqa: PLR2004 - %
            return cls(percent=float(match[1]))
        if match is not None and match[2].lower() in _UNITS:
            return cls(int(float(match[1]) * _UNITS[match[2].lower()]))
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63:
            return cls(value)
        raise ValueError(
            f"{value!r} is no size; allowed: bytes as a number, or text such as '200 GiB' or '5 %'"
        )

    def on(self, directory: Path) -> int:
        """Return the bytes that it means for a directory, which need not exist yet."""
        if not self.percent:
            return self.bytes
        return int(_filesystem_bytes(directory) * self.percent / 100)


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the file."""


class PathSettings(_Section, frozen=True, forbid_unknown_fields=True):
    """Where this host keeps what outlives a session.

    Attributes:
        cache_dir: The blob cache. Default: /var/cache/propmaster for root, else
            $XDG_CACHE_HOME/propmaster, else ~/.cache/propmaster.
        state_dir: Ledger, index and session states. Default: /var/lib/propmaster for root, else
            $XDG_STATE_HOME/propmaster, else ~/.local/state/propmaster.
    """

    cache_dir: Path
    state_dir: Path


class CacheSettings(_Section, frozen=True, forbid_unknown_fields=True):
    """How much of the disk the blob cache may use.

    Attributes:
        max_bytes: The most the cache may hold; 0 is automatic, a quarter of its file system.
        min_free: What the cache leaves free; default 5 % of its file system and at least 1 GiB.
        shared_between_stores: Whether a blob fetched from one store may serve jobs of another.
            Off by default: who knows a digest could then read content of another store.
    """

    max_bytes: Size = Size()
    min_free: Size | None = None
    shared_between_stores: bool = False

    def max_bytes_on(self, directory: Path) -> int:
        """Return the most bytes the cache in `directory` may hold."""
        chosen = self.max_bytes if self.max_bytes != Size() else Size(percent=AUTOMATIC_PERCENT)
        return chosen.on(directory)

    def min_free_bytes_on(self, directory: Path) -> int:
        """Return how many bytes of its file system the cache in `directory` leaves free."""
        if self.min_free is not None:
            return self.min_free.on(directory)
        return max(Size(percent=5).on(directory), _LEAST_MIN_FREE)


class StoreSettings(_Section, frozen=True, forbid_unknown_fields=True):
    """How stores are talked to.

    Attributes:
        concurrency: Requests at a time.
        attempts: How often a request is tried in all.
        deadline_seconds: No attempt begins later than this after the first one failed; time in
            which bytes moved does not count.
        connect_timeout: Seconds for a connection to be made.
        read_timeout: Seconds without a byte from the store.
        least_bytes_per_second: A request that reads and is slower, on the average, is ended.
        existence_max_age: Seconds for which a blob seen in the store is asked for before it would
            be sent; 0 remembers nothing.
    """

    concurrency: Annotated[int, Meta(ge=1, le=256)] = 16
    attempts: Annotated[int, Meta(ge=1, le=100)] = 12
    deadline_seconds: Annotated[float, Meta(gt=0, le=86400)] = 120.0
    connect_timeout: Annotated[float, Meta(gt=0, le=3600)] = 5.0
    read_timeout: Annotated[float, Meta(gt=0, le=3600)] = 15.0
    least_bytes_per_second: Annotated[int, Meta(ge=1, le=2**30)] = 16384
    existence_max_age: Annotated[int, Meta(ge=0, le=365 * 86400)] = 86400


class OutputSettings(_Section, frozen=True, forbid_unknown_fields=True):
    """What becomes of what tasks leave behind.

    Attributes:
        upload_failed: Whether outputs of a failed task are uploaded too.
    """

    upload_failed: bool = False


class MountSettings(_Section, frozen=True, forbid_unknown_fields=True):
    """How inputs are mounted and read.

    Attributes:
        verify: `stream`: a blob of more than 64 MiB is read while it comes, and verified when it is
            complete. `strict`: no byte of any blob is read before all of it is verified.
        xattrs: Whether extended attributes tell a file's hash and state also where overlayfs is
            above the mount, which then asks once for each file that is looked up.
        transport: `kernel`: our own server on /dev/fuse. `fusepy`: libfuse 2. `auto`: the first of
            them that the host can.
        passthrough: Whether the kernel reads cached blobs itself, if it can: `auto` decides by the
            mean size of a mount's files.
    """

    verify: Literal["stream", "strict"] = "stream"
    xattrs: bool = False
    transport: Literal["auto", "fusepy", "kernel"] = "auto"
    passthrough: Literal["auto", "on", "off"] = "auto"


class WorkerSettings(_Section, frozen=True, forbid_unknown_fields=True):
    """Whom `propmaster worker serve` works for, and where.

    Attributes:
        socket: Where job users ask it.
        agent_user: Who runs the worker agent, and so owns the session directories; empty is the
            service's own user, or root.
        session_roots: Where session directories are; empty is anywhere.
        mapped_roots: Directories outside a session that jobs may have their files in. Job users
            must not be able to rename what is on the way to one.
    """

    socket: Path = DEFAULT_SOCKET
    agent_user: str = ""
    session_roots: list[Path] = []
    mapped_roots: list[Path] = []


class Settings(_Section, frozen=True, forbid_unknown_fields=True):
    """All settings of the host; `load` makes them."""

    paths: PathSettings
    cache: CacheSettings = CacheSettings()
    store: StoreSettings = StoreSettings()
    outputs: OutputSettings = OutputSettings()
    mounts: MountSettings = MountSettings()
    worker: WorkerSettings = WorkerSettings()


def load(
    config: Path | None = None,
    *,
    environment: Mapping[str, str] = os.environ,
    default_file: Path = DEFAULT_FILE,
    user_id: int | None = None,
) -> Settings:
    """Return the host's settings.

    Args:
        config: The file the user named, if one was named.
        environment: Where PROPMASTER_*, XDG_* and HOME are looked up.
        default_file: Read when no file was named; may be absent.
        user_id: Whose default directories; None is this process's effective user.

    Raises:
        SettingsInvalidError: A named file is absent, a file can not be read or is no TOML, or a
            key or value is not allowed; names file, line if it can be found, key and what is
            allowed.
    """
    named = config
    if named is None and environment.get(CONFIG_VARIABLE):
        named = Path(environment[CONFIG_VARIABLE])
    file = named or default_file
    text = _read(file, must_exist=named is not None)
    document = _parse(text, file) if text else {}
    paths = document.setdefault("paths", {})
    if isinstance(paths, dict):
        root = (os.geteuid() if user_id is None else user_id) == 0
        for key, variable in (("cache_dir", CACHE_VARIABLE), ("state_dir", STATE_VARIABLE)):
            if environment.get(variable):
                paths[key] = _from_variable(variable, environment)
            elif key not in paths:
                paths[key] = _default_directory(key, environment, root=root)
    return schema.conform(
        document,
        Settings,
        source=str(file),
        failure=SettingsInvalidError,
        decode=_decode,
        line_of=lambda key: _line_of(key, text),
    )


def _read(file: Path, *, must_exist: bool) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        if not must_exist:
            return ""
        raise SettingsInvalidError(
            f"{file}: there is no such file",
            hint=f"correct --config or {CONFIG_VARIABLE}, or leave it out to have the defaults",
        ) from error
    except OSError as error:
        raise SettingsInvalidError(f"{file} can not be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsInvalidError(f"{file} is not UTF-8: {error}") from error


def _parse(text: str, file: Path) -> dict[str, Any]:
    # Loaded here: 4 ms that a host without a settings file does not need.
    import tomllib  # noqa: PLC0415

    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SettingsInvalidError(f"{file} is not TOML: {error}") from error


def _decode(kind: type, value: object) -> object:
    if kind is Size:
        return Size.parse(value)
    if kind is Path:
        return _directory(value)
    raise NotImplementedError(kind)


def _directory(value: object) -> Path:
    path = Path(value) if isinstance(value, str) else None
    if path is None or not path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{value!r} is no directory; allowed: an absolute path without `..`")
    return path


def _from_variable(variable: str, environment: Mapping[str, str]) -> str:
    try:
        return str(_directory(environment[variable]))
    except ValueError as error:
        raise SettingsInvalidError(f"{variable}: {error}") from error


def _default_directory(key: str, environment: Mapping[str, str], *, root: bool) -> str:
    system, variable, below_home = {
        "cache_dir": ("/var/cache", "XDG_CACHE_HOME", ".cache"),
        "state_dir": ("/var/lib", "XDG_STATE_HOME", ".local/state"),
    }[key]
    if root:
        return f"{system}/propmaster"
    # Relative paths in these variables are to be ignored:
    # https://specifications.freedesktop.org/basedir-spec/latest/
    if environment.get(variable, "").startswith("/"):
        return f"{environment[variable]}/propmaster"
    home = environment.get("HOME", "")
    if not home.startswith("/"):
        raise SettingsInvalidError(
            f"no HOME to derive [paths] {key} from",
            hint=f"set it in the settings file, or set PROPMASTER_{key.upper()}",
        )
    return f"{home}/{below_home}/propmaster"


def _filesystem_bytes(directory: Path) -> int:
    for path in (directory, *directory.parents[:-1]):
        with suppress(OSError):
            filesystem = os.statvfs(path)
            return filesystem.f_blocks * filesystem.f_frsize
    filesystem = os.statvfs("/")
    return filesystem.f_blocks * filesystem.f_frsize


def _line_of(key: str, text: str) -> int | None:
    """Return the number of the line where a key of the file is set, if it can be found."""
    section, _, name = key.rpartition(".")
    own = re.compile(rf"\s*[\"']?{re.escape(name)}[\"']?\s*=")
    dotted = re.compile(rf"\s*{re.escape(key)}\s*=")
    current, header = "", None
    for number, line in enumerate(text.splitlines(), start=1):
        if match := _HEADER.match(line):
            current = match[1]
            if current == key:
                header = number
        elif (current == section and own.match(line)) or (not current and dotted.match(line)):
            return number
    return header
