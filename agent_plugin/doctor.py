"""What this host can do, each thing tried, with its reason and what follows from it.

Probes change nothing: what they write is in scratch directories that are removed at once, and in a
store only where that was asked for. They never tell a credential, only where it comes from.
"""

import importlib.metadata
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from threading import Timer
from typing import Final, TypeVar
from urllib.parse import unquote_to_bytes, urlsplit

from agent_plugin import settings as host_settings
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import (
    BlobNotFoundError,
    CancelledError,
    PropmasterError,
    SettingsInvalidError,
    StoreUnavailableError,
)
from agent_plugin.content.flight import Lanes
from agent_plugin.content.open_store import build_store
from agent_plugin.content.retry import RetryPolicy
from agent_plugin.content.s3_environment import Credentials, locate
from agent_plugin.content.store import Cancellation, Store
from agent_plugin.doctor_files import (
    Probe,
    file_probes,
    privacy_fault,
    privacy_of,
    writing_fault,
)
from agent_plugin.doctor_mounts import mount_probes
from agent_plugin.settings import Settings

__all__ = ["Probe", "examine"]

T = TypeVar("T")

LIBRARIES: Final = (
    "boto3",
    "botocore",
    "click",
    "lark",
    "msgspec",
    "obstore",
    "psutil",
    "regex",
    "rich",
    "xxhash",
)
MACHINES: Final = ("x86_64", "aarch64")
# Directory descriptors (safe_path.MAX_DIRECTORIES, 256), a connection a request, and temporary
# files come to some 400 at most; 1,024 is what systems give by default.
LEAST_OPEN_FILES: Final = 512
# 2025-01-01: this program is younger, and a clock before its birth is wrong.
_YOUNGEST: Final = 1735689600
_STORE_POLICY: Final = RetryPolicy(attempts=2, deadline_seconds=5.0, read_timeout=4.0)
# For each request with all its attempts; a listing alone is otherwise given half a minute.
_STORE_SECONDS: Final = 10.0
_SILENT: Final = "no answer"
_PROBE_KEY: Final = "propmaster-doctor/write-probe"


def examine(
    config: Path | None,
    *,
    session_dir: Path,
    store_url: str | None = None,
    write_probe: bool = False,
    environment: Mapping[str, str] = os.environ,
    clock: Callable[[], float] = time.time,
) -> Iterator[Probe]:
    """Yield the probes one by one; a host is fit for COPIED if no needed one is not ok.

    Args:
        config: The settings file that the user named, if one was named.
        session_dir: Where sessions are made on this host.
        store_url: A store to look at as well.
        write_probe: Store one small document there, the same each time.
        environment: Where settings, endpoints and credentials are looked up.
        clock: Seconds since the epoch.
    """
    yield _platform()
    yield _python()
    yield _libraries()
    probe, settings = _settings(config, environment)
    yield probe
    yield _clock(clock())
    yield _open_files()
    if settings is not None:
        yield _state_directory(settings.paths.state_dir)
        yield from file_probes(settings, session_dir)
    cache_dir = session_dir if settings is None else settings.paths.cache_dir
    yield from mount_probes(session_dir, cache_dir)
    yield _credentials(environment, needed=(store_url or "").startswith("s3:"))
    yield _endpoint(environment)
    if store_url is not None:
        yield from _store_probes(store_url, environment, write_probe=write_probe)


def _platform() -> Probe:
    system, machine = platform.system(), platform.machine()
    return Probe(
        "platform",
        ok=system == "Linux" and machine in MACHINES,
        reason=f"{system} {platform.release()} on {machine}",
        consequence="propmaster runs on Linux, on x86-64 and arm64, and refuses to elsewhere",
        needed=True,
    )


def _python() -> Probe:
    return Probe(
        "python",
        ok=sys.version_info >= (3, 11),
        reason=f"{platform.python_implementation()} {platform.python_version()}",
        consequence="Python 3.11 or newer is needed",
        needed=True,
    )


def _libraries() -> Probe:
    versions, absent = [], []
    for name in LIBRARIES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
    reason = ", ".join(versions) + (f"; not installed: {', '.join(absent)}" if absent else "")
    return Probe(
        "libraries",
        ok=not absent,
        reason=reason,
        consequence="commands that use an absent one fail",
        needed=True,
    )


def _settings(config: Path | None, environment: Mapping[str, str]) -> tuple[Probe, Settings | None]:
    consequence = "every command stops until the file is right"
    try:
        settings = host_settings.load(config, environment=environment)
    except SettingsInvalidError as error:
        return Probe("settings", False, _why(error), consequence, needed=True), None
    named = config or environment.get(host_settings.CONFIG_VARIABLE)
    file = Path(named or host_settings.DEFAULT_FILE)
    reason = f"{file} is valid" if file.exists() else f"{file} is not there: defaults are used"
    return Probe("settings", True, reason, consequence, needed=True), settings


def _clock(now: float) -> Probe:
    return Probe(
        "clock",
        ok=now > _YOUNGEST,
        reason=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)),
        consequence="S3 refuses requests of a clock that is 15 minutes off, and the names of"
        " outputs are made of the time",
        needed=True,
    )


def _open_files() -> Probe:
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    return Probe(
        "open_files",
        ok=unlimited or soft >= LEAST_OPEN_FILES,
        reason="no limit" if unlimited else f"a process may open {soft} files",
        consequence=f"with fewer than {LEAST_OPEN_FILES}, large sessions fail; see `ulimit -n`",
        needed=True,
    )


def _state_directory(directory: Path) -> Probe:
    fault = privacy_fault(directory, may_be_link=True) or writing_fault(directory)
    return Probe(
        "state_directory",
        ok=fault is None,
        reason=f"{directory} {fault or privacy_of(directory)}",
        consequence="no session can start: ledger, index and session states are kept there",
        needed=True,
    )


def _credentials(environment: Mapping[str, str], *, needed: bool) -> Probe:
    consequence = "no s3:// store can be used; file:// stores need none"
    try:
        source = Credentials(environment).source
    except PropmasterError as error:
        return Probe("credentials", False, _why(error), consequence, needed)
    return Probe("credentials", True, f"from {source}", consequence, needed)


def _endpoint(environment: Mapping[str, str]) -> Probe:
    consequence = "this is where requests for s3:// stores go"
    try:
        location = locate("probe", "", environment)
    except PropmasterError as error:
        return Probe("endpoint", False, _why(error), consequence)
    endpoint = location.endpoint_url or "AWS's own"
    return Probe("endpoint", True, f"{endpoint}, region {location.region}", consequence)


def _store_probes(
    url: str, environment: Mapping[str, str], *, write_probe: bool
) -> Iterator[Probe]:
    consequence = "no session of this store's jobs can start"
    try:
        store = _waited_for(
            lambda: build_store(url, environment=environment, policy=_STORE_POLICY, concurrency=2)
        )
    except PropmasterError as error:
        yield Probe("store", False, _why(error), consequence, needed=True)
        return
    parts = urlsplit(store.url)
    directory = Path(os.fsdecode(unquote_to_bytes(parts.path))) if parts.scheme == "file" else None
    if directory is not None and not os.path.lexists(directory):
        yield _new_store(directory, consequence)
    else:
        yield Probe("store", True, f"{store.url} is a store's address", consequence, needed=True)
        listed = _request("store_list", lambda: _list(store), "outputs of others are not found")
        yield listed
        if listed.reason.startswith(_SILENT):
            for name in ("store_get", "store_put"):
                reason = "not tried: the store does not answer"
                yield Probe(name, "unknown", reason, consequence, needed=True)
            return
        yield _request("store_get", lambda: _get(store), consequence)
    if write_probe:
        yield _request("store_put", lambda: _put(store), "no outputs can be stored")
    else:
        reason = "not tried: it stores one small document; --write-probe asks for it"
        yield Probe("store_put", "unknown", reason, "outputs need it")
    yield _owner(getattr(store, "account_id", None), is_s3=parts.scheme == "s3")


def _new_store(directory: Path, consequence: str) -> Probe:
    fault = writing_fault(directory)
    reason = fault or "is not there yet: whoever stores something first makes it"
    return Probe("store", fault is None, f"{directory} {reason}", consequence, needed=True)


def _request(name: str, request: Callable[[], str], consequence: str) -> Probe:
    try:
        return Probe(name, True, _waited_for(request), consequence, needed=True)
    except StoreUnavailableError as error:
        return Probe(name, False, f"{_SILENT}: {_why(error)}", consequence, needed=True)
    except PropmasterError as error:
        return Probe(name, False, _why(error), consequence, needed=True)


def _waited_for(request: Callable[[], T]) -> T:
    """Return what a request returns; another thread makes it, since none that waits is stopped.

    Raises:
        StoreUnavailableError: Nothing came within _STORE_SECONDS.
        PropmasterError: It failed.
    """
    patience = Cancellation()
    timer = Timer(_STORE_SECONDS, patience.cancel)
    timer.start()
    try:
        return Lanes(1).run(request, patience)
    except CancelledError as error:
        raise StoreUnavailableError(f"nothing came within {_STORE_SECONDS:.0f} s") from error
    finally:
        timer.cancel()


def _list(store: Store) -> str:
    first = next(iter(store.list_documents("")), None)
    return "allowed; there are no manifests yet" if first is None else "allowed"


def _get(store: Store) -> str:
    absent = Digest.of(os.urandom(16))
    try:
        store.get(absent)
    except BlobNotFoundError:
        return "allowed: a blob that does not exist is answered as absent"
    return "allowed"


def _put(store: Store) -> str:
    store.put_document(_PROBE_KEY, b"written by propmaster doctor --write-probe\n", {})
    store.get_document(_PROBE_KEY, max_bytes=1024)
    return f"allowed; Manifests/{_PROBE_KEY} was written and read"


def _owner(account_id: str | None, *, is_s3: bool) -> Probe:
    consequence = "requests name the bucket's expected owner, so that no other's is used by mistake"
    if account_id:
        return Probe("store_owner", True, f"account {account_id}", consequence)
    reason = "the account of the credentials can not be told" if is_s3 else "a directory has none"
    return Probe("store_owner", "unknown", reason, consequence)


def _why(error: PropmasterError) -> str:
    return f"{error.message} ({error.hint})" if error.hint else error.message
