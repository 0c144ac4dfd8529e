"""One multipart upload, which is either completed or leaves nothing behind.

S3 keeps the parts of an upload that was neither completed nor aborted, and bills them. So whatever
ends the upload, it is aborted unless it was completed, and aborted again when the parts that were
under way at that moment have ended, because S3 may have kept those:
https://docs.aws.amazon.com/AmazonS3/latest/API/API_AbortMultipartUpload.html
"""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import wait
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from agent_plugin.content import events
from agent_plugin.content.errors import PropmasterError, StoreUnavailableError
from agent_plugin.content.parts import Pending
from agent_plugin.content.s3_access import CONTENT_TYPE
from agent_plugin.content.s3_errors import DamagedAnswerError, UploadGoneError
from agent_plugin.content.s3_requests import Requests
from agent_plugin.content.store import Cancellation

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

# How long an abort may hold up whoever cancelled, in seconds; users are promised one second.
CANCELLED_WAIT_SECONDS: Final = 0.7
ABORT_SECONDS: Final = 10.0
ABORT_ATTEMPTS: Final = 4
ABORT_THREAD: Final = "propmaster-abort"

log = events.get_logger()


class Upload:
    """An upload to one key; `end` must be called, however it went.

    Args:
        requests: To the bucket.
        below: The key below the prefix.
        metadata: Of the object.
        size: Bytes in all.

    Attributes:
        pending: The parts under way (parts.py).
    """

    def __init__(
        self, requests: Requests, below: str, metadata: Mapping[str, str], size: int
    ) -> None:
        self._requests = requests
        self._below = below
        self._key = requests.access.location.key(below)
        self._place = requests.place(below)
        self._metadata = dict(metadata)
        self._size = size
        self._lock = threading.Lock()
        self._id = ""
        self._completed = False
        self._left = False
        self._aborted = threading.Event()
        self.pending: Pending[CompletedPartTypeDef] = deque()

    def create(self, cancellation: Cancellation) -> None:
        """Begin; if nobody waits for it any more, end at once."""
        what = f"begin the upload of {self._place}"

        def ask(client: "S3Client", common: dict[str, Any]) -> str:
            answer = client.create_multipart_upload(
                **common, Key=self._key, ContentType=CONTENT_TYPE, Metadata=self._metadata
            )
            return _told(answer, "UploadId", what)

        upload_id = self._requests.boto(ask, what, cancellation)
        with self._lock:
            self._id = upload_id
            left = self._left
        if left:
            self._abort()

    def send(self, number: int, data: bytes, stop: Cancellation) -> "CompletedPartTypeDef":
        """Send a part, numbered from 1."""
        what = f"upload part {number} of {self._place}"

        def ask(client: "S3Client", common: dict[str, Any]) -> "CompletedPartTypeDef":
            answer = client.upload_part(
                **common, Key=self._key, UploadId=self._id, PartNumber=number, Body=data
            )
            part: CompletedPartTypeDef = {
                "PartNumber": number,
                "ETag": _told(answer, "ETag", what),
            }
            if "ChecksumCRC32" in answer:
                part["ChecksumCRC32"] = answer["ChecksumCRC32"]
            return part

        return self._requests.boto(ask, what, stop, sends=len(data))

    def complete(self, sent: "Sequence[CompletedPartTypeDef]", cancellation: Cancellation) -> None:
        """Make the object of its parts.

        Raises:
            StoreUnavailableError: Somebody aborted the upload.
            StoreProtocolError: The store says neither that it is complete nor why not.
        """
        what = f"complete the upload of {self._place}"

        def ask(client: "S3Client", common: dict[str, Any]) -> None:
            answer = client.complete_multipart_upload(
                **common, Key=self._key, UploadId=self._id, MultipartUpload={"Parts": sent}
            )
            _told(answer, "ETag", what)

        try:
            self._requests.boto(ask, what, cancellation)
        except (UploadGoneError, DamagedAnswerError) as error:
            # It was completed if the answer to an earlier attempt got lost, or came without a word.
            if self._requests.size(self._below, cancellation) != self._size:
                if isinstance(error, DamagedAnswerError):
                    raise
                raise StoreUnavailableError(
                    error.message, hint="Somebody aborted the upload; try again."
                ) from error
        self._completed = True

    def end(self, cancellation: Cancellation) -> None:
        """Abort unless it was completed, waiting for that a moment, or longer if not cancelled."""
        with self._lock:
            self._left = True
            begun = bool(self._id)
        if self._completed or not begun:
            return
        threading.Thread(target=self._abandon, name=ABORT_THREAD, daemon=True).start()
        self._aborted.wait(CANCELLED_WAIT_SECONDS if cancellation.wished else ABORT_SECONDS)

    def _abandon(self) -> None:
        self._abort()
        self._aborted.set()
        under_way = [future for _, future in self.pending]
        wait(under_way)
        if any(future.exception() is None for future in under_way):
            self._abort()

    def _abort(self) -> None:
        policy = self._requests.policy
        policy = replace(
            policy,
            attempts=min(ABORT_ATTEMPTS, policy.attempts),
            deadline_seconds=min(ABORT_SECONDS, policy.deadline_seconds),
        )
        try:
            self._requests.boto(
                lambda client, common: client.abort_multipart_upload(
                    **common, Key=self._key, UploadId=self._id
                ),
                f"abort the upload of {self._place}",
                policy=policy,
            )
        except UploadGoneError:
            pass  # As wished.
        except PropmasterError as error:
            log.warning(events.UPLOAD_LEFT, extra={"object": self._place, "reason": error.message})


def _told(answer: Mapping[str, Any], field: str, what: str) -> str:
    """Return what an answer has to tell; with status 200 but without it, something broke it.

    Raises:
        DamagedAnswerError: It does not.
    """
    told = answer.get(field)
    if not told:
        raise DamagedAnswerError(f"{what}: the answer has no {field}")
    return str(told)
