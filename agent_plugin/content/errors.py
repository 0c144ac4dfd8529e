"""Every expected failure, as one tree.

    PropmasterError
    ├── InputError             what we were given is wrong; trying again changes nothing
    │   ├── ManifestInvalidError        JobInvalidError          SettingsInvalidError
    │   ├── PathMappingError            UnsafePathError          PathClashError
    │   ├── UnsupportedPlatformError    NotAllowedError
    │   ├── AgentUnsupportedError       ResultClashError
    │   ├── PlaceholderUnknownError     ArchiveUnsafeError
    │   ├── SourceInvalidError          SourceEmptyError
    │   └── ReadOnlyAttributeError      QueryInvalidError
    ├── StoreError             the content store
    │   ├── BlobNotFoundError           DocumentNotFoundError    StoreAccessError
    │   ├── StoreUnavailableError       StoreThrottledError      BlobCorruptError
    │   ├── StoreProtocolError          ObjectNotFoundError      ObjectChangedError
    │   └── KeyExistsError              ObjectArchivedError      ObjectRestoringError
    ├── LocalError             this host
    │   ├── NoSpaceError                LocalWriteError          LocalReadError
    │   ├── CacheUnsafeError            FileChangedError
    │   ├── MountFailedError            MountReadFailedError
    │   └── ServiceUnavailableError
    └── StateError             a command came at the wrong time
        ├── SessionStateError           TransferStateError
        └── CancelledError              TransferAbortedError

Each class carries what a program needs: `reference` (the heading in docs/TROUBLESHOOTING.md),
`code` (stored in the ledger), `exit_code` (docs/EXIT_CODES.md, never reused), `errno` (what a
mount answers) and `retryable`. The message says what happened to which thing; the hint says what
to do. Neither may hold a credential.
"""

import errno
from typing import ClassVar


class PropmasterError(Exception):
    """An expected failure, with what a person and what a program needs to know.

    Args:
        message: What happened, to which file, blob, key or setting.
        hint: What to do about it, as a sentence; empty when there is nothing to do.
    """

    reference: ClassVar[str] = "failure"
    code: ClassVar[str] = "E_FAILURE"
    exit_code: ClassVar[int] = 64
    errno: ClassVar[int] = errno.EIO
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InputError(PropmasterError):
    """What we were given is wrong; trying again changes nothing."""


class ManifestInvalidError(InputError):
    """A manifest breaks the format or one of our own rules; nothing was written."""

    reference, code, exit_code = "manifest-invalid", "E_MANIFEST", 65


class JobInvalidError(InputError):
    """The job document breaks its schema."""

    reference, code, exit_code = "job-invalid", "E_JOB", 66


class SettingsInvalidError(InputError):
    """The settings file breaks its schema."""

    reference, code, exit_code = "settings-invalid", "E_CONFIG", 67


class PathMappingError(InputError):
    """A root has a file system location, and no path mapping rule leads from it to this host."""

    reference, code, exit_code = "path-mapping-missing", "E_PATH_MAPPING", 78


class UnsafePathError(InputError):
    """A path would leave its root, on its own or through a link that stands in the way."""

    reference, code, exit_code, errno = "unsafe-path", "E_BAD_PATH", 73, errno.ELOOP


class PathClashError(InputError):
    """Two entries want the same place: a file where a directory must be, or names that fold."""

    reference, code, exit_code, errno = "path-clash", "E_PATH_CLASH", 84, errno.ENOTDIR


class UnsupportedPlatformError(InputError):
    """The host is not Linux on x86-64 or arm64, or lacks something that cannot be done without."""

    reference, code, exit_code, errno = "unsupported-platform", "E_UNSUPPORTED", 81, errno.ENOSYS


class NotAllowedError(InputError):
    """Something was asked for to which whoever asked has no right, or gave none."""

    reference, code, exit_code, errno = "not-allowed", "E_NOT_ALLOWED", 89, errno.EPERM


class AgentUnsupportedError(InputError):
    """A worker agent, or a script of it, is not one that propmaster was made for."""

    reference, code, exit_code, errno = "agent-unsupported", "E_AGENT", 90, errno.ENOSYS


class PlaceholderUnknownError(InputError):
    """A publisher's key names a placeholder that there is not, or has a brace on its own."""

    reference, code, exit_code = "placeholder-unknown", "E_PLACEHOLDER", 96


class ArchiveUnsafeError(InputError):
    """An archive of results is not what was published, or would do more than make files."""

    reference, code, exit_code = "archive-unsafe", "E_ARCHIVE", 99


class ReadOnlyAttributeError(InputError):
    """An attribute of a transfer or task that can not be changed, or not now."""

    reference, code, exit_code = "read-only-attribute", "E_READONLY", 95


class ResultClashError(InputError):
    """Results that are to stand at one path differ, or differ from what stands there."""

    reference, code, exit_code, errno = "result-clash", "E_RESULT_CLASH", 101, errno.EEXIST


class SourceInvalidError(InputError):
    """The description of an input source breaks its rules, or what it names can not be taken."""

    reference, code, exit_code = "source-invalid", "E_SOURCE", 97


class SourceEmptyError(InputError):
    """An input source brings no object, and does not say that this is fine."""

    reference, code, exit_code = "source-empty", "E_EMPTY", 98


class QueryInvalidError(InputError):
    """A query breaks the grammar, or asks for what there is not.

    Attributes:
        line, column: Where in the query, from 1; 0 when it is about all of it.
    """

    reference, code, exit_code, errno = "query-invalid", "E_QUERY", 94, errno.EINVAL

    def __init__(self, message: str, *, hint: str = "", line: int = 0, column: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.line = line
        self.column = column


class StoreError(PropmasterError):
    """The content store refused, failed or delivered something wrong."""


class StoreUnavailableError(StoreError):
    """The store did not answer, or answered that it can not now; a later call may succeed."""

    reference, code, exit_code, retryable = "store-unavailable", "E_NETWORK", 68, True


class StoreThrottledError(StoreUnavailableError):
    """The store asked us to slow down."""

    reference, code = "store-throttled", "E_THROTTLED"


class BlobNotFoundError(StoreError):
    """The store answered 404 for a blob; nothing else means that it is absent."""

    reference, code, exit_code, errno = "blob-not-found", "E_NOT_FOUND", 69, errno.EIO


class DocumentNotFoundError(StoreError):
    """The store answered 404 for a manifest."""

    reference, code, exit_code = "manifest-not-found", "E_NOT_FOUND", 79


class StoreAccessError(StoreError):
    """The store answered 401 or 403: credentials, rights or the bucket's owner are not right."""

    reference, code, exit_code, errno = "store-access-denied", "E_ACCESS", 70, errno.EACCES


class BlobCorruptError(StoreError):
    """A blob's bytes are not what its digest says, and stayed so when it was fetched again."""

    reference, code, exit_code, retryable = "blob-corrupt", "E_CHECKSUM", 71, True


class StoreProtocolError(StoreError):
    """The store answered what its protocol does not allow, or refused the request as malformed."""

    reference, code, exit_code = "store-protocol", "E_PROTOCOL", 82


class ObjectNotFoundError(StoreError):
    """There is no object at a key: it never was, or the newest version of it is a delete marker."""

    reference, code, exit_code, errno = "object-not-found", "E_NOT_FOUND", 91, errno.ENOENT


class ObjectChangedError(StoreError):
    """An object is not the one any more that was looked at before: replaced, or deleted."""

    reference, code, exit_code, errno = "object-changed", "E_SOURCE_CHANGED", 92, errno.EIO


class KeyExistsError(StoreError):
    """Something is stored at a key already, and overwriting was not allowed."""

    reference, code, exit_code, errno = "key-exists", "E_KEY_EXISTS", 93, errno.EEXIST


class ObjectArchivedError(StoreError):
    """An object is in an archive class: it has to be restored before anybody can read it."""

    reference, code, exit_code, errno = "object-archived", "E_ARCHIVED", 102, errno.EIO


class ObjectRestoringError(StoreError):
    """An object in an archive class is being restored, and can be read when that has ended."""

    reference, code, exit_code, errno = "object-restoring", "E_RESTORING", 103, errno.EIO


class LocalError(PropmasterError):
    """Something on this host failed."""


class NoSpaceError(LocalError):
    """The disk or quota is full, or would be."""

    reference, code, exit_code, errno = "no-space", "E_NO_SPACE", 72, errno.ENOSPC


class LocalWriteError(LocalError):
    """A file could not be created, written or renamed."""

    reference, code, exit_code = "local-write-failed", "E_WRITE", 80


class LocalReadError(LocalError):
    """A file could not be read."""

    reference, code, exit_code = "local-read-failed", "E_READ", 85


class CacheUnsafeError(LocalError):
    """The blob cache's directory could be written by others, so nothing in it can be trusted."""

    reference, code, exit_code = "cache-unsafe", "E_CACHE_UNSAFE", 75


class FileChangedError(LocalError):
    """A file kept changing, or vanished, while it was read for upload."""

    reference, code, exit_code = "file-changed", "E_SOURCE_CHANGED", 74


class MountFailedError(LocalError):
    """A mount could not be made, or not within its time."""

    reference, code, exit_code = "mount-failed", "E_MOUNT", 86


class MountReadFailedError(LocalError):
    """A task was refused bytes of its inputs; whatever it made of that, the farm failed it."""

    reference, code, exit_code, retryable = "mount-read-failed", "E_MOUNT_READ", 87, True


class ServiceUnavailableError(LocalError):
    """The host service is not running, or went away before it had answered."""

    reference, code, exit_code, retryable = "service-unavailable", "E_SERVICE", 88, True


class StateError(PropmasterError):
    """A command came at the wrong time."""


class SessionStateError(StateError):
    """The session was not started, is still starting, or has ended."""

    reference, code, exit_code = "session-state", "E_STATE", 76


class TransferStateError(StateError):
    """A transfer or task can not go from its state to the wanted one."""

    reference, code, exit_code = "transfer-state", "E_STATE", 83


class CancelledError(StateError):
    """Someone asked us to stop; what was finished is kept, nothing half-written stays."""

    reference, code, exit_code, errno = "cancelled", "E_ABORTED", 77, errno.EINTR


class TransferAbortedError(StateError):
    """A person aborted the transfer; what was finished is kept, nothing half-written stays."""

    reference, code, exit_code, errno = "transfer-aborted", "E_ABORTED", 100, errno.EINTR


_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_CLASH = frozenset({errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST})


def local_write_error(error: OSError, what: str) -> PropmasterError:
    """Return the error of this tree that a failed write of `what` (a path) means."""
    if error.errno in _NO_SPACE:
        return NoSpaceError(
            f"{what}: {error.strerror}", hint="free some space on its file system and start again"
        )
    if error.errno in _CLASH:
        return PathClashError(
            f"{what}: {error.strerror}",
            hint="something of another type stands there; remove it, or correct the manifests",
        )
    if error.errno == errno.ELOOP:
        return UnsafePathError(f"{what}: a symbolic link stands in the way", hint="remove the link")
    return LocalWriteError(
        f"{what}: {error.strerror or error}", hint="check its directory's owner, mode and mount"
    )
