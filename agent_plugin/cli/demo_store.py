"""A real S3 server on this machine, for `propmaster demo` and for the tests.

It is SeaweedFS, as one process that listens on loopback only and verifies signatures. Its S3 port
asks for the generated keys; its inner ports (master, volume, filer) ask for none, so whoever may
open a connection on this host can read what is stored: a demonstration, not a service.

The process ends when the store is closed and, by PR_SET_PDEATHSIG, when the *thread* that opened
it ends in any way: open it from a thread that lives as long as it is needed
(https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html); ended that way it leaves
five unused sockets `/tmp/seaweedfs-*-grpc-<port>.sock` behind. The signal is asked for by a
small launcher that then becomes the server, because Python's preexec_fn may deadlock in a process
that has threads.
"""

import contextlib
import http.client
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final, Self

from agent_plugin.content.errors import (
    LocalWriteError,
    StoreAccessError,
    StoreProtocolError,
    StoreUnavailableError,
    UnsupportedPlatformError,
)

REGION: Final = "us-east-1"
# Up in 0.7 to 1.2 s on an idle machine; the rest is for a machine that is busy with other tests.
READY_SECONDS: Final = 30.0
# A clean stop takes about 2 s, most of it the volume server's own grace period.
STOP_SECONDS: Final = 10.0

_HOST: Final = "127.0.0.1"
_START_ATTEMPTS: Final = 3
_POLL_SECONDS: Final = 0.05
_REQUEST_SECONDS: Final = 5.0
_LOG_TAIL_BYTES: Final = 2000
# Only these may be told apart by number afterwards: the server makes a socket for each gRPC port
# in /tmp, whatever TMPDIR says, and leaves some behind.
_GRPC_SERVICES: Final = ("s3", "master", "volume", "filer", "admin")
_PORT_FLAGS: Final = tuple(
    f"{service}.port{suffix}" for service in _GRPC_SERVICES for suffix in ("", ".grpc")
)
# 1 is PR_SET_PDEATHSIG; the parent may have ended before it was set, hence the comparison.
_LAUNCHER: Final = """
import ctypes, os, signal, sys
if ctypes.CDLL(None).prctl(1, signal.SIGKILL) or os.getppid() != int(sys.argv[1]):
    sys.exit("can not be bound to the life of its parent")
os.execv(sys.argv[2], sys.argv[2:])
"""


def bound_to_this_process(argv: list[str]) -> list[str]:
    """Return a command that runs `argv` and is killed when the thread that started it ends.

    The command keeps its process id when it becomes `argv`; `argv[0]` is an absolute path.
    """
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *argv]


def find_weed() -> Path:
    """Return the SeaweedFS program, from beside the Python that runs or from PATH.

    Raises:
        UnsupportedPlatformError: It is in neither place.
    """
    beside = Path(sys.executable).parent / "weed"
    if os.access(beside, os.X_OK) and beside.is_file():
        return beside
    if found := shutil.which("weed"):
        return Path(found).absolute()
    raise UnsupportedPlatformError(
        "the S3 server for demonstrations (SeaweedFS, `weed`) is not installed",
        hint="Run: pip install 'propmaster[demo]'",
    )


@dataclass(frozen=True, slots=True)
class _Identity:
    access_key: str = field(default_factory=lambda: f"demo{secrets.token_hex(8)}")
    secret_key: str = field(default_factory=lambda: secrets.token_hex(20), repr=False)


class DemoStore:
    """A SeaweedFS process; entered it serves, left it is gone. Not for more than one thread.

    Data stays in the directory and is served again by the next store opened there, under new
    keys. Two stores must not use one directory at a time.

    Args:
        directory: Where data, logs and the configuration (0600) go; made 0700 if missing.
        weed: The program, instead of the one `find_weed` finds.
        open_buckets: What everybody may list and read, without a signature.
    """

    def __init__(
        self, directory: Path, *, weed: Path | None = None, open_buckets: Sequence[str] = ()
    ) -> None:
        self._directory = directory.absolute()
        self._open_buckets = open_buckets
        self._weed = weed
        self._admin = _Identity()
        self._reader = _Identity()
        self._ports: dict[str, int] = {}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint_url(self) -> str:
        """`http://127.0.0.1:<port>`, once entered."""
        return f"http://{_HOST}:{self._ports['s3.port']}"

    @property
    def access_key(self) -> str:
        """The access key that may do everything."""
        return self._admin.access_key

    @property
    def secret_key(self) -> str:
        """The secret of `access_key`."""
        return self._admin.secret_key

    @property
    def read_only_access_key(self) -> str:
        """The access key that may list and read every bucket, and nothing else."""
        return self._reader.access_key

    @property
    def read_only_secret_key(self) -> str:
        """The secret of `read_only_access_key`."""
        return self._reader.secret_key

    @property
    def pid(self) -> int:
        """The server's process id, once entered."""
        if self._process is None:
            raise StoreUnavailableError("the demonstration store is not open")
        return self._process.pid

    @property
    def environment(self) -> dict[str, str]:
        """The AWS variables with which any S3 client finds this store; all others should go."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def __enter__(self) -> Self:
        """Start the server and wait until it answers a signed request.

        Raises:
            UnsupportedPlatformError: SeaweedFS is not installed.
            StoreUnavailableError: It did not come up, three times, or not within READY_SECONDS.
            LocalWriteError: The directory could not be written.
        """
        weed = self._weed or find_weed()
        try:
            self._prepare_directory()
        except OSError as error:
            raise LocalWriteError(f"{self._directory}: {error.strerror or error}") from error
        for attempt in range(1, _START_ATTEMPTS + 1):
            try:
                self._start(weed)
            except StoreUnavailableError:
                self.close()
                if attempt == _START_ATTEMPTS:
                    raise
            except BaseException:
                self.close()
                raise
            else:
                break
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server, by force if it does not go within STOP_SECONDS; safe to repeat."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for service in _GRPC_SERVICES:
            port = self._ports[f"{service}.port.grpc"]
            # The name is the server's; nobody else's socket can have it while we have the port.
            Path(f"/tmp/seaweedfs-{service}-grpc-{port}.sock").unlink(missing_ok=True)  # noqa: S108 - see _GRPC_SERVICES

    def create_bucket(self, name: str) -> None:
        """Make a bucket; one that exists already is kept as it is.

        Raises:
            StoreAccessError, StoreProtocolError: The server refused.
            StoreUnavailableError: It did not answer.
        """
        status, body = self._request("PUT", f"/{name}")
        if status in {http.client.OK, http.client.CONFLICT}:
            return
        failure = StoreAccessError if status == http.client.FORBIDDEN else StoreProtocolError
        raise failure(f"bucket {name}: the demonstration store answered {status}: {body[:200]!r}")

    def _prepare_directory(self) -> None:
        for directory in (self._directory, self._directory / "data", self._directory / "log"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        identities = [
            _identity("admin", self._admin, ["Admin", "Read", "Write", "List", "Tagging"]),
            _identity("read-only", self._reader, ["Read", "List"]),
        ]
        rights = [f"{right}:{name}" for name in self._open_buckets for right in ("Read", "List")]
        if rights:
            # The name is SeaweedFS's for whoever does not sign.
            identities.append({"name": "anonymous", "actions": rights})
        with self._create("s3.json") as file:
            file.write(json.dumps({"identities": identities}).encode())

    def _create(self, name: str) -> IO[bytes]:
        path = self._directory / name
        path.unlink(missing_ok=True)
        return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")  # noqa: PTH123 - opens a descriptor, not a path

    def _start(self, weed: Path) -> None:
        self._ports = dict(zip(_PORT_FLAGS, _free_ports(len(_PORT_FLAGS)), strict=True))
        with self._create("weed.out") as output:
            self._process = subprocess.Popen(  # noqa: S603 - our own argv, no shell
                bound_to_this_process([str(weed), *self._arguments()]),
                cwd=self._directory,
                # Nothing of ours: the server would take AWS_* as a further identity, and settings
                # from ~/.seaweedfs.
                env={"PATH": os.defpath, "HOME": str(self._directory)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                umask=0o077,
                # Ctrl-C is for us; we then end the server in order.
                start_new_session=True,
            )
        deadline = time.monotonic() + READY_SECONDS
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                tail = (self._directory / "weed.out").read_bytes()[-_LOG_TAIL_BYTES:]
                raise StoreUnavailableError(
                    f"the demonstration store did not start: {tail.decode(errors='replace')}",
                    hint=f"See {self._directory / 'log'}.",
                )
            time.sleep(_POLL_SECONDS)

    def _arguments(self) -> list[str]:
        # Relative paths, since a socket's path may have 107 bytes (unix(7)) and a directory more.
        settings = {
            "dir": "data",
            "ip": _HOST,
            "ip.bind": _HOST,
            **self._ports,
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.config": "s3.json",
            "s3.autoCreateBucket": "false",
            "s3.domainName": "localhost",
            "s3.localSocket": "s3.sock",
            "filer.localSocket": "filer.sock",
            "webdav": "false",
            "admin.ui": "false",
            "master.telemetry": "false",
        }
        flags = [f"-{name}={value}" for name, value in settings.items()]
        return ["-logdir=log", "-alsologtostderr=false", "mini", *flags]

    def _ready(self) -> bool:
        # A signed request: whoever else got hold of the port does not know our key.
        try:
            return self._request("GET", "/")[0] == http.client.OK
        except StoreUnavailableError:
            return False

    def _request(self, method: str, path: str) -> tuple[int, bytes]:
        # Imported here: it takes 100 ms, and every command may import this module.
        from botocore.auth import S3SigV4Auth  # noqa: PLC0415
        from botocore.awsrequest import AWSRequest  # noqa: PLC0415
        from botocore.credentials import Credentials  # noqa: PLC0415

        # Not a boto3 client: that would read this machine's profiles and proxies.
        request = AWSRequest(method, self.endpoint_url + path)
        S3SigV4Auth(Credentials(self.access_key, self.secret_key), "s3", REGION).add_auth(request)
        connection = http.client.HTTPConnection(
            _HOST, self._ports["s3.port"], timeout=_REQUEST_SECONDS
        )
        with contextlib.closing(connection):
            try:
                connection.request(method, path, headers=dict(request.headers.items()))
                response = connection.getresponse()
                return response.status, response.read()
            except (OSError, http.client.HTTPException) as error:
                raise StoreUnavailableError(
                    f"{self.endpoint_url}: the demonstration store does not answer: {error}"
                ) from error


def _identity(name: str, identity: _Identity, actions: list[str]) -> dict[str, object]:
    keys = {"accessKey": identity.access_key, "secretKey": identity.secret_key}
    return {"name": name, "credentials": [keys], "actions": actions}


def _free_ports(count: int) -> list[int]:
    # Held together, so that they differ; another process may still take one once they are released.
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind((_HOST, 0))
        return [listener.getsockname()[1] for listener in listeners]
