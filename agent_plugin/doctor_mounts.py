"""What this host can do of mounting inputs: each part looked at, and the whole tried.

What is tried is a mount as a session makes it, of one small file in a scratch store, read, and
written to, by another process. It goes away with this process, however that ends, and nobody who
may be in the way of a mount that hangs is this process.
"""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Final

from agent_plugin.content import fusermount
from agent_plugin.content.digest import Digest
from agent_plugin.content.directory_store import DirectoryStore
from agent_plugin.content.errors import CancelledError, PropmasterError
from agent_plugin.content.manifest import FileEntry, Manifest
from agent_plugin.content.mount_probe import (
    AUTO,
    FUSEPY,
    KERNEL,
    fusepy_obstacle,
    kernel_obstacle,
    may_allow_other,
)
from agent_plugin.content.mount_spec import NO_WRITES, OVERLAY, OVERLAYFS, Ready
from agent_plugin.content.store import Cancellation
from agent_plugin.doctor_files import Probe, nearest_existing
from agent_plugin.session.mount_control import ask_mount
from agent_plugin.session.mount_request import CachePlace, MountRequest
from agent_plugin.session.mounts import Mounts

# Some 0.5 s on an idle host.
_MOUNT_SECONDS: Final = 20.0
_CONTENT: Final = b"mounted by propmaster doctor\n"
_FEW_BYTES: Final = 64 * 1024 * 1024
# In a mount namespace of its own: whatever happens to the process, no mount is left.
# 0x20000 is CLONE_NEWNS; 0x44000 is MS_REC | MS_PRIVATE: linux/sched.h, linux/mount.h.
# What a session does: changes a mode without copying, renames a directory of inputs, and removes.
_TRY_OVERLAY: Final = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(function, *arguments):
    if function(*arguments):
        sys.exit(os.strerror(ctypes.get_errno()))
call(libc.unshare, 0x20000)
call(libc.mount, b"none", b"/", None, 0x44000, None)
os.chdir(sys.argv[1])
options = b"lowerdir=lower,upperdir=upper,workdir=work,metacopy=on,redirect_dir=on,index=off"
call(libc.mount, b"overlay", b"merged", b"overlay", 0, options)
try:
    open("merged/file", "a").close()
    os.chmod("merged/input", 0o600)
    os.rename("merged/directory", "merged/renamed")
    os.unlink("merged/input")
except OSError as error:
    sys.exit(f"it was mounted, but {error}")
call(libc.umount2, b"merged", 0)
"""
# 0x10000000 is CLONE_NEWUSER: linux/sched.h.
_TRY_USER_NAMESPACE: Final = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x10000000):
    sys.exit(os.strerror(ctypes.get_errno()))
"""
_USE_MOUNT: Final = """
import os, sys
at, expected, writable = sys.argv[1], sys.argv[2].encode(), sys.argv[3] == "writable"
with open(f"{at}/directory/input", "rb") as file:
    if file.read() != expected:
        sys.exit("other bytes were read than were stored")
if writable:
    with open(f"{at}/directory/output", "xb") as file:
        file.write(expected)
    os.rename(f"{at}/directory", f"{at}/renamed")
    os.unlink(f"{at}/renamed/input")
    if os.listdir(f"{at}/renamed") != ["output"]:
        sys.exit("what was written is not what is there")
"""


def mount_probes(session_dir: Path, cache_dir: Path) -> Iterator[Probe]:
    """Yield what is to be known of mounting, and last whether a VIRTUAL session can run."""
    yield _dev_fuse()
    yield _rights()
    yield _fusermount()
    yield _others()
    yield _user_namespaces()
    place = nearest_existing(session_dir)
    overlayfs = _overlayfs(place)
    cache = nearest_existing(cache_dir)
    cache = cache if os.access(cache, os.W_OK) else place
    tried = _try_mount(place, cache, AUTO, OVERLAYFS if overlayfs.ok is True else OVERLAY)
    yield _kernel_transport(place, cache, tried)
    yield _fusepy_transport(tried)
    yield overlayfs
    yield _passthrough(cache, tried)
    yield _virtual(place, tried)


@dataclass(frozen=True, slots=True)
class Tried:
    """What became of a mount: why it failed, or what it said of itself, and its protocol."""

    failure: str
    ready: Ready | None = None
    protocol: str = ""
    passes_through: bool = False
    passthrough_reason: str = ""

    @property
    def transport(self) -> str:
        """By which transport it was; empty if there was none."""
        return self.ready.transport if self.ready is not None else ""


def _dev_fuse() -> Probe:
    consequence = "nothing can be mounted: VIRTUAL sessions are COPIED"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return Probe("dev_fuse", False, f"/dev/fuse: {error.strerror}", consequence)
    return Probe("dev_fuse", True, "/dev/fuse can be opened", consequence)


def _rights() -> Probe:
    consequence = "mounting is left to fusermount3, and there is no overlayfs and no passthrough"
    if not fusermount.may_administer():
        return Probe("cap_sys_admin", False, f"user {os.geteuid()} has it not", consequence)
    namespace = Path("/proc/self/uid_map").read_text(encoding="ascii").split()
    if namespace != ["0", "0", "4294967295"]:
        reason = "only in a user namespace: overlayfs takes fewer options, nothing passes through"
        return Probe("cap_sys_admin", False, reason, consequence)
    return Probe("cap_sys_admin", True, "this process may mount", consequence)


def _fusermount() -> Probe:
    name, consequence = "fusermount", "who has not CAP_SYS_ADMIN can not mount"
    program = shutil.which("fusermount3") or shutil.which("fusermount")
    if program is None:
        reason = "neither fusermount3 nor fusermount is in PATH"
        if fusermount.may_administer():
            reason += "; this process can mount without it"
        return Probe(name, False, reason, consequence)
    if not Path(program).stat().st_mode & stat.S_ISUID and not fusermount.may_administer():
        return Probe(name, False, f"{program} is not setuid root", consequence)
    return Probe(name, True, program, consequence)


def _others() -> Probe:
    consequence = (
        "a mount is for this user alone: sessions whose directory others may enter are COPIED"
    )
    if fusermount.may_administer():
        return Probe("user_allow_other", True, "this process may let others in", consequence)
    if may_allow_other():
        reason = "/etc/fuse.conf lets users let others in"
        return Probe("user_allow_other", True, reason, consequence)
    return Probe("user_allow_other", False, "it is not in /etc/fuse.conf", consequence)


def _user_namespaces() -> Probe:
    refusal = _run(_TRY_USER_NAMESPACE)
    consequence = "only programs that make a namespace of their own miss them"
    reason = refusal or "this user can make them"
    return Probe("user_namespaces", not refusal, reason, consequence)


def _kernel_transport(place: Path, cache: Path, tried: Tried) -> Probe:
    name = "kernel_transport"
    consequence = "mounts go through libfuse 2 (fusepy_transport), or not at all"
    obstacle = kernel_obstacle()
    if not obstacle and tried.transport != KERNEL:
        tried = _try_mount(place, cache, KERNEL, NO_WRITES)
        obstacle = tried.failure
    if obstacle:
        return Probe(name, False, obstacle, consequence)
    return Probe(name, True, f"a file was mounted and read; FUSE {tried.protocol}", consequence)


def _fusepy_transport(tried: Tried) -> Probe:
    name = "fusepy_transport"
    consequence = "only hosts where the kernel transport can not be used miss it"
    if obstacle := fusepy_obstacle():
        return Probe(name, False, obstacle, consequence)
    if tried.transport == FUSEPY:
        return Probe(name, True, "a file was mounted and read by libfuse 2", consequence)
    return Probe(name, True, "libfuse 2 can be loaded; not tried, the other is used", consequence)


def _overlayfs(place: Path) -> Probe:
    name, consequence = (
        "overlayfs",
        "what is written to a mount is kept by our own overlay, slower",
    )
    known = "\toverlay\n" in Path("/proc/filesystems").read_text()
    if not fusermount.may_administer():
        reason = f"it needs CAP_SYS_ADMIN; the kernel {'has' if known else 'has not loaded'} it"
        return Probe(name, False, reason, consequence)
    try:
        with tempfile.TemporaryDirectory(prefix=".propmaster-doctor-", dir=place) as scratch:
            for part in ("lower", "upper", "work", "merged", "lower/directory"):
                Path(scratch, part).mkdir()
            Path(scratch, "lower/input").touch()
            refusal = _run(_TRY_OVERLAY, scratch)
    except OSError as error:
        return Probe(name, "unknown", f"it could not be tried in {place}: {error}", consequence)
    if refusal:
        return Probe(name, False, f"in {place}: {refusal}", consequence)
    return Probe(name, True, f"mounted, written and unmounted in {place}", consequence)


def _passthrough(cache: Path, tried: Tried) -> Probe:
    name, consequence = "passthrough", "large cached files are read through the mount's server"
    if tried.passes_through:
        reason = f"the kernel reads cached files of {cache} itself, where mounts have large ones"
        return Probe(name, True, reason, consequence)
    return Probe(name, False, tried.passthrough_reason or "nothing was mounted", consequence)


def _virtual(place: Path, tried: Tried) -> Probe:
    name, consequence = "virtual", "VIRTUAL and AUTO sessions are COPIED, and say so"
    if tried.ready is None:
        return Probe(name, False, tried.failure, consequence)
    reason = (
        f"transport {tried.transport} ({tried.ready.reason}), writes {tried.ready.writes};"
        f" mounted, read and written in {place}"
    )
    return Probe(name, True, reason, consequence)


def _try_mount(place: Path, cache: Path, transport: str, writes: str) -> Tried:
    """Mount, use and unmount a file; whatever comes of it, nothing is left."""
    try:
        return _mounted(place, cache, transport, writes)
    except (OSError, PropmasterError) as error:
        return Tried(_why(error))


def _mounted(place: Path, cache: Path, transport: str, writes: str) -> Tried:
    with ExitStack() as stack:
        made = tempfile.TemporaryDirectory(prefix=".propmaster-doctor-", dir=place)
        scratch = Path(stack.enter_context(made)).resolve()
        for name in ("state", "mnt"):
            (scratch / name).mkdir(mode=0o700)
        made = tempfile.TemporaryDirectory(prefix=".propmaster-doctor-", dir=cache)
        blobs = CachePlace(Path(stack.enter_context(made)).resolve(), _FEW_BYTES, 0, shared=False)
        mounts = Mounts(scratch / "state", blobs, transport=transport, passthrough="on")
        request = MountRequest(
            manifest=_stored(scratch / "store"),
            mountpoint=scratch / "mnt",
            work_dir=scratch / "work",
            store_url=DirectoryStore(scratch / "store").url,
            account_id="",
            writes=writes,
            uid=os.geteuid(),
            gid=os.getegid(),
            owner_pid=os.getpid(),
        )
        patience = Cancellation()
        timer = Timer(_MOUNT_SECONDS, patience.cancel)
        timer.start()
        stack.callback(timer.cancel)
        try:
            ready = mounts.start(request, cancellation=patience)
        except CancelledError as error:
            raise TimeoutError(f"it was not mounted within {_MOUNT_SECONDS:.0f} s") from error
        try:
            writable = "read-only" if writes == NO_WRITES else "writable"
            refusal = _run(_USE_MOUNT, os.fspath(scratch / "mnt"), _CONTENT.decode(), writable)
            if refusal:
                raise OSError(f"it was mounted, but {refusal}")
            answer = ask_mount(mounts.control_of(scratch / "mnt"), {"ask": "status"})
        finally:
            mounts.end(scratch / "mnt")
    status = json.loads(answer)
    passthrough = status.get("passthrough") or {"used": False, "reason": "not with fusepy"}
    return Tried("", ready, str(status["protocol"]), passthrough["used"], passthrough["reason"])


def _stored(directory: Path) -> Manifest:
    store = DirectoryStore(directory)
    store.make()
    digest = Digest.of(_CONTENT)
    with tempfile.TemporaryFile() as file:
        file.write(_CONTENT)
        file.flush()
        store.put_file(digest, file.fileno(), cancellation=Cancellation())
    return Manifest.of([FileEntry(digest.hex, 0, "directory/input", digest.size)])


def _run(code: str, *arguments: str) -> str:
    """Run Python code in a process of its own; return what it complained of, empty if it did not.

    It is left behind if it hangs, which must not be waited for.
    """
    process = subprocess.Popen(  # noqa: S603 - our own argv, no shell
        [sys.executable, "-I", "-S", "-c", code, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        _, told = process.communicate(timeout=_MOUNT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=1)
        return f"it did not answer within {_MOUNT_SECONDS:.0f} s"
    if process.returncode == 0:
        return ""
    return (told.strip().splitlines() or [f"exit code {process.returncode}"])[-1]


def _why(error: Exception) -> str:
    if isinstance(error, PropmasterError):
        return error.message
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
