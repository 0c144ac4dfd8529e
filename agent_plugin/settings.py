"""The host's settings: one TOML file, typed and strict, with a default for everything.

The file is the one named by `--config`, else by PROPMASTER_CONFIG, else
/etc/propmaster/config.toml, which need not exist. PROPMASTER_CACHE_DIR and PROPMASTER_STATE_DIR
override its paths, so that one host can run several programs apart; nothing else is taken from the
environment here.

A table `[queues."queue-…"]` holds for the sessions of that queue what it sets of the general
tables: `Settings.for_queue`. What `queue set` has set comes above that (queue_settings.py).
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from agent_plugin import schema
from agent_plugin.content.errors import SettingsInvalidError
from agent_plugin.publish.spec import Publishers
from agent_plugin.settings_file import SettingsFile
from agent_plugin.settings_publishers import refuse_publishers, spell_publishers
from agent_plugin.sizes import Rate, Size

CONFIG_VARIABLE: Final = "PROPMASTER_CONFIG"
CACHE_VARIABLE: Final = "PROPMASTER_CACHE_DIR"
STATE_VARIABLE: Final = "PROPMASTER_STATE_DIR"
DEFAULT_FILE: Final = Path("/etc/propmaster/config.toml")
DEFAULT_SOCKET: Final = Path("/run/propmaster/worker.socket")
QUEUE_ID_FORM: Final = (
    "`queue-` and 32 hexadecimal digits in lower case: queue-0123456789abcdef0123456789abcdef"
)
_VARIABLES: Final = {"cache_dir": CACHE_VARIABLE, "state_dir": STATE_VARIABLE}

# Sizes of the cache follow the disk unless they are set: docs/OPERATING.md, Disk space.
AUTOMATIC_PERCENT: Final = 25
_LEAST_MIN_FREE: Final = 1024**3

_QUEUE_ID: Final = re.compile(r"queue-[0-9a-f]{32}")


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


class InputSettings(_Section, frozen=True, forbid_unknown_fields=True):
    """How jobs' inputs get to their sessions.

    Attributes:
        file_system: Whatever jobs say themselves; JOB for what they say.
    """

    file_system: Literal["JOB", "COPIED", "VIRTUAL", "AUTO"] = "JOB"

    @property
    def wished(self) -> Literal["COPIED", "VIRTUAL", "AUTO"] | None:
        """What was decided here; None when the job decides."""
        return None if self.file_system == "JOB" else self.file_system


class CacheSettings(_Section, frozen=True, forbid_unknown_fields=True):
    """How much of the disk the blob cache may use, and who shares it.

    Attributes:
        max_bytes: The most the cache may hold; 0 is automatic, a quarter of its file system.
        min_free: What the cache leaves free; default 5 % of its file system and at least 1 GiB.
        shared_between_stores: Whether a blob fetched from one store may serve jobs of another.
            Off by default: who knows a digest could then read content of another store.
        shared_between_queues: Whether a blob fetched for one queue and job user may serve others of
            the same store. Off by default, for the same reason.
    """

    max_bytes: Size = Size()
    min_free: Size | None = None
    shared_between_stores: bool = False
    shared_between_queues: bool = False

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
        result_endpoints: S3 servers that `get`, `ls`, `cat` and `results` ask with the user's keys
            if a result says that it is there, besides the environment's.
        download_limit, upload_limit: Bytes a second of content and manifests, of all processes of
            this host together; 0 for none.
    """

    concurrency: Annotated[int, Meta(ge=1, le=256)] = 16
    attempts: Annotated[int, Meta(ge=1, le=100)] = 12
    deadline_seconds: Annotated[float, Meta(gt=0, le=86400)] = 120.0
    connect_timeout: Annotated[float, Meta(gt=0, le=3600)] = 5.0
    read_timeout: Annotated[float, Meta(gt=0, le=3600)] = 15.0
    least_bytes_per_second: Annotated[int, Meta(ge=1, le=2**30)] = 16384
    existence_max_age: Annotated[int, Meta(ge=0, le=365 * 86400)] = 86400
    result_endpoints: Annotated[tuple[str, ...], Meta(max_length=100)] = ()
    download_limit: Rate = Rate()
    upload_limit: Rate = Rate()


class OutputSettings(_Section, frozen=True, forbid_unknown_fields=True):
    """What becomes of what tasks leave behind.

    Attributes:
        upload_failed: Whether outputs of a failed task are uploaded too.
        publishers: Where tasks' outputs are published, after what their jobs say themselves.
    """

    upload_failed: bool = False
    publishers: Publishers = ()


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
        source_bytes: The most that one mount keeps, on the disk of its session, of what was read
            and is in no cache: of an input source all, of other inputs what the cache can not take.
            `cache.min_free` is left free there as well.
    """

    verify: Literal["stream", "strict"] = "stream"
    xattrs: bool = False
    transport: Literal["auto", "fusepy", "kernel"] = "auto"
    passthrough: Literal["auto", "on", "off"] = "auto"
    source_bytes: Size = Size(percent=10)


class WorkerSettings(_Section, frozen=True, forbid_unknown_fields=True):
    """Whom `propmaster worker serve` works for, and where.

    Attributes:
        socket: Where job users ask it.
        agent_user: Who runs the worker agent, and so owns the session directories; empty is the
            service's own user, or root.
        session_roots: Where session directories are; empty is anywhere.
        mapped_roots: Directories outside a session that jobs may have their files in. Job users
            must not be able to rename what is on the way to one.
        user_memory: The most memory that the calls of one job user take together, a percentage
            being one of the host's; 0 for no limit.
    """

    socket: Path = DEFAULT_SOCKET
    agent_user: str = ""
    session_roots: list[Path] = []
    mapped_roots: list[Path] = []
    user_memory: Size = Size(percent=50)

    def user_memory_bytes(self) -> int:
        """Return the bytes that the calls of one job user may take; 0 for no limit."""
        if not self.user_memory.percent:
            return self.user_memory.bytes
        host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return int(host * self.user_memory.percent / 100)


class LogSettings(_Section, frozen=True, forbid_unknown_fields=True):
    """What becomes of the events of sessions and mounts, besides going to standard error.

    Attributes:
        directory: One file for each session. Default: `logs` in the state directory.
        keep_days: How long after its last event a file is kept; 0 writes none.
        max_bytes: The most that all of them may take: the oldest go first, and one that is as large
            is not written to any more.
    """

    directory: Path | None = None
    keep_days: Annotated[int, Meta(ge=0, le=3650)] = 14
    max_bytes: Size = Size(256 * 1024**2)


class _CachePath(_Section, frozen=True, forbid_unknown_fields=True):
    """The one path that a queue may have of its own."""

    cache_dir: Path


class QueueTables(_Section, frozen=True, forbid_unknown_fields=True):
    """What may be different for the sessions of a queue."""

    paths: _CachePath
    inputs: InputSettings = InputSettings()
    cache: CacheSettings = CacheSettings()
    store: StoreSettings = StoreSettings()
    outputs: OutputSettings = OutputSettings()
    mounts: MountSettings = MountSettings()


@dataclass(frozen=True, slots=True)
class Queue:
    """A table of `[queues]`.

    Attributes:
        tables: What holds for the queue: its own keys, and the general ones that it leaves out.
        own: The keys that it sets itself, `store.concurrency` for example.
    """

    tables: QueueTables
    own: frozenset[str]


class Settings(_Section, frozen=True, forbid_unknown_fields=True):
    """Everything an operator can set; see each table.

    Attributes:
        queues: Queues with a table of their own, by their id.
    """

    paths: PathSettings
    inputs: InputSettings = InputSettings()
    cache: CacheSettings = CacheSettings()
    store: StoreSettings = StoreSettings()
    outputs: OutputSettings = OutputSettings()
    mounts: MountSettings = MountSettings()
    worker: WorkerSettings = WorkerSettings()
    logs: LogSettings = LogSettings()
    queues: dict[str, Queue] = {}

    def for_queue(self, queue_id: str) -> "Settings":
        """Return what the file says for the sessions of a queue; for "" what it says in general."""
        queue = self.queues.get(queue_id)
        if queue is None:
            return self
        tables = queue.tables
        return msgspec.structs.replace(
            self,
            paths=msgspec.structs.replace(self.paths, cache_dir=tables.paths.cache_dir),
            inputs=tables.inputs,
            cache=tables.cache,
            store=tables.store,
            outputs=tables.outputs,
            mounts=tables.mounts,
        )

    def is_own(self, queue_id: str, key: str) -> bool:
        """Whether a queue has a key, such as `store.upload_limit`, in a table of its own."""
        return queue_id in self.queues and key in self.queues[queue_id].own

    @property
    def log_directory(self) -> Path:
        """Where the log files of sessions are."""
        return self.logs.directory or self.paths.state_dir / "logs"


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, and where each of them comes from.

    Attributes:
        settings: The settings.
        file: The file, which may be absent.
        variables: The keys that environment variables have set, with the variable.
    """

    settings: Settings
    file: SettingsFile
    variables: Mapping[str, str]

    def source(self, key: str, queue_id: str = "") -> str:
        """Return where a key's value comes from, `<file>:<line>`, a variable or `built-in`.

        Args:
            key: Table and name, `store.concurrency` for example.
            queue_id: For the sessions of which queue.
        """
        if key in self.variables:
            return self.variables[key]
        names = key.split(".")
        if self.settings.is_own(queue_id, key):
            return self.file.place("queues", queue_id, *names)
        return self.file.place(*names) if self.file.says(*names) else "built-in"


def load(
    config: Path | None = None,
    *,
    environment: Mapping[str, str] = os.environ,
    default_file: Path = DEFAULT_FILE,
    user_id: int | None = None,
) -> Settings:
    """Return the host's settings; arguments and errors are those of `load_explained`."""
    return load_explained(
        config, environment=environment, default_file=default_file, user_id=user_id
    ).settings


def load_explained(
    config: Path | None = None,
    *,
    environment: Mapping[str, str] = os.environ,
    default_file: Path = DEFAULT_FILE,
    user_id: int | None = None,
) -> Loaded:
    """Return the host's settings, and where they come from.

    Args:
        config: The file the user named, if one was named.
        environment: Where PROPMASTER_*, XDG_* and HOME are looked up.
        default_file: Read when no file was named; may be absent.
        user_id: Whose default directories; None is this process's effective user.

    Raises:
        SettingsInvalidError: A named file is absent, a file can not be read, could be written by
            others or is no TOML, or a key or value is not allowed; names file, line, key and what
            is allowed.
    """
    named = config
    if named is None and environment.get(CONFIG_VARIABLE):
        named = Path(environment[CONFIG_VARIABLE])
    file = SettingsFile.read(
        named or default_file,
        must_exist=named is not None,
        hint=f"correct --config or {CONFIG_VARIABLE}, or leave it out to have the defaults",
    )
    document = dict(file.document)
    variables = {
        f"paths.{key}": variable
        for key, variable in _VARIABLES.items()
        if environment.get(variable)
    }
    paths = document.get("paths", {})
    if isinstance(paths, dict):
        root = (os.geteuid() if user_id is None else user_id) == 0
        document["paths"] = paths = dict(paths)
        for key, variable in _VARIABLES.items():
            if f"paths.{key}" in variables:
                paths[key] = _from_variable(variable, environment)
            elif key not in paths:
                paths[key] = _default_directory(key, environment, root=root)
    queues = document.pop("queues", {})
    spell_publishers(document)
    general = schema.conform(
        document,
        Settings,
        source=str(file.path),
        failure=SettingsInvalidError,
        decode=_decode,
        line_of=lambda key: file.line(*key.split(".")),
    )
    refuse_publishers(general.outputs.publishers, file)
    read = _Queues(file, document, variables)
    settings = msgspec.structs.replace(general, queues=read.read_all(queues))
    return Loaded(settings, file, variables)


class _Queues:
    """The tables `[queues."queue-…"]` of a file.

    Args:
        file: The file.
        document: What it says in general, which is known to be allowed, with all paths.
        variables: As of Loaded.
    """

    def __init__(
        self, file: SettingsFile, document: Mapping[str, Any], variables: Mapping[str, str]
    ) -> None:
        self._file = file
        self._general = document
        self._variables = variables

    def read_all(self, queues: object) -> dict[str, Queue]:
        """Return the queues of the table `[queues]`.

        Raises:
            SettingsInvalidError: As for `load_explained`.
        """
        if not isinstance(queues, dict):
            raise self._refusal("a table is expected", 'allowed: [queues."queue-…"]')
        read = {queue_id: self._read(queue_id, table) for queue_id, table in queues.items()}
        if "paths.cache_dir" not in self._variables:
            self._insist_one_size(read)
        return read

    def _insist_one_size(self, queues: Mapping[str, Queue]) -> None:
        """Refuse a directory with two sizes: each session would evict by its own."""
        general = schema.conform(
            self._general.get("cache", {}),
            CacheSettings,
            source=str(self._file.path),
            failure=SettingsInvalidError,
            decode=_decode,
        )
        sizes = {Path(self._general["paths"]["cache_dir"]): ("[cache]", _sizes(general))}
        for queue_id, queue in queues.items():
            of_queue = _sizes(queue.tables.cache)
            whose, first = sizes.setdefault(
                queue.tables.paths.cache_dir, (f'[queues."{queue_id}"]', of_queue)
            )
            if first != of_queue:
                raise self._refusal(
                    f"that directory has other sizes by {whose}",
                    f"set cache.max_bytes and cache.min_free alike, or another directory than"
                    f" {queue.tables.paths.cache_dir}",
                    queue_id,
                    "paths",
                    "cache_dir",
                )

    def _read(self, queue_id: str, table: object) -> Queue:
        if not _QUEUE_ID.fullmatch(queue_id):
            raise self._refusal("no id of a queue", f"allowed: {QUEUE_ID_FORM}", queue_id)
        names = [field.name for field in msgspec.structs.fields(QueueTables)]
        if not isinstance(table, dict):
            raise self._refusal("a table is expected", f"known: {', '.join(names)}", queue_id)
        merged: dict[str, Any] = {name: self._general.get(name, {}) for name in names}
        merged["paths"] = {"cache_dir": self._general["paths"]["cache_dir"]}
        for name, own in table.items():
            above = merged.get(name)
            merged[name] = above | own if isinstance(own, dict) and above is not None else own
        if "paths.cache_dir" in self._variables and isinstance(merged["paths"], dict):
            merged["paths"]["cache_dir"] = self._general["paths"]["cache_dir"]
        spell_publishers(merged)
        tables = schema.conform(
            merged,
            QueueTables,
            source=str(self._file.path),
            failure=SettingsInvalidError,
            decode=_decode,
            line_of=lambda key: self._file.line("queues", queue_id, *key.split(".")),
            prefix=f'queues."{queue_id}".',
        )
        refuse_publishers(tables.outputs.publishers, self._file, queue_id)
        own_keys = frozenset(f"{name}.{key}" for name in table for key in table[name])
        for size in ("cache.max_bytes", "cache.min_free"):
            if size in own_keys and "paths.cache_dir" not in own_keys:
                raise self._refusal(
                    "the sizes are those of a directory, and this queue has none of its own",
                    "set paths.cache_dir in the queue's table too, or the size in [cache]",
                    queue_id,
                    *size.split("."),
                )
        return Queue(tables, own_keys)

    def _refusal(self, reason: str, hint: str, *key: str) -> SettingsInvalidError:
        line = self._file.line("queues", *key)
        place = f"{self._file.path}, line {line}" if line else f"{self._file.path}"
        name = ".".join(["queues", *(f'"{key[0]}"' for _ in key[:1]), *key[1:]])
        return SettingsInvalidError(f"{place}: {name}: {reason}", hint=hint)


def _sizes(cache: CacheSettings) -> tuple[Size, Size | None]:
    return cache.max_bytes, cache.min_free


def _decode(kind: type, value: object) -> object:
    if kind in (Size, Rate):
        return kind.parse(value)
    if kind is Path:
        return _directory(value)
    raise NotImplementedError(kind)


def _directory(value: object) -> Path:
    path = Path(value) if isinstance(value, str) else None
    if path is None or not path.is_absolute() or ".." in path.parts or "\0" in str(path):
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
