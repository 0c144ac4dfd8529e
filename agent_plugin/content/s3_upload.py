"""One multipart upload, which is either completed or leaves nothing behind.

S3 keeps the parts of an upload that was neither completed nor aborted, and bills them. So whatever
ends the upload, it is aborted unless it was completed, and aborted again when the parts that were
under way at that moment have ended, because S3 may have kept those:
https://docs.aws.amazon.com/AmazonS3/latest/API/API_AbortMultipartUpload.html
The exception is an upload that somebody wants to go on with: its owner aborts it.

A process that is killed can abort nothing. So what is under way can be remembered outside of it
(UploadMemory): the next process goes on with the upload, and sends again only what the store lacks,
or what is read as something else by then. A part is known by our own hash of what was sent, since
what a store calls it need not be one.
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from agent_plugin.content import events
from agent_plugin.content.digest import hash_of
from agent_plugin.content.errors import (
    KeyExistsError,
    PropmasterError,
    StoreAccessError,
    StoreUnavailableError,
)
from agent_plugin.content.parts import Pending
from agent_plugin.content.s3_access import CONTENT_TYPE
from agent_plugin.content.s3_errors import (
    ConditionRacedError,
    DamagedAnswerError,
    ObjectExistsError,
    UploadGoneError,
)
from agent_plugin.content.s3_requests import Requests, told
from agent_plugin.content.store import Cancellation, SentPart, UploadMemory

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import (
        CompletedPartTypeDef,
        CompleteMultipartUploadOutputTypeDef,
        ListPartsOutputTypeDef,
    )

# Told what was sent, returns whether the object at the key was made of that.
IsComplete: TypeAlias = "Callable[[Sequence[CompletedPartTypeDef], Cancellation], bool]"

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
        headers: What else the object is to have, as boto3 names it.
        exclusive: Whether it may only be completed while nothing is stored at the key.
        upload_id: Of an upload to go on with; empty to begin one.
        is_complete: Whether what is at the key now was made of these parts, for when the answer to
            the request that completes it got lost. By default, whether it has the right size.
        memory: Where to remember what `begin` begins, if anywhere.

    Attributes:
        pending: The parts under way (parts.py).
        kept: Whether `end` leaves the upload as it is, because somebody will go on with it.
        id: The store's name of the upload; empty until it has begun.
    """

    def __init__(
        self,
        requests: Requests,
        below: str,
        metadata: Mapping[str, str],
        size: int,
        *,
        headers: Mapping[str, Any] | None = None,
        exclusive: bool = False,
        upload_id: str = "",
        is_complete: "IsComplete | None" = None,
        memory: UploadMemory | None = None,
    ) -> None:
        self._requests = requests
        self._below = below
        self._key = requests.access.location.key(below)
        self._place = requests.place(below)
        self._headers = {"ContentType": CONTENT_TYPE, "Metadata": dict(metadata), **(headers or {})}
        self._size = size
        self._exclusive = exclusive
        self._is_complete = is_complete or self._has_size
        self._memory = memory
        self._sent: dict[int, SentPart] = {}
        self._lock = threading.Lock()
        self._completed = False
        self._left = False
        self._aborted = threading.Event()
        self.id = upload_id
        self.kept = False
        self.pending: Pending[CompletedPartTypeDef] = deque()

    def begin(self, cancellation: Cancellation) -> None:
        """Go on with what is remembered, or create; what is sent is remembered from now on."""
        if self._memory is None or not self._recall(self._memory, cancellation):
            self.create(cancellation)
        if self._memory is not None and not self._left:
            self._memory.remember(self.id, list(self._sent.values()))

    def _recall(self, memory: UploadMemory, cancellation: Cancellation) -> bool:
        """Take up the upload that is remembered, if the store still knows it."""
        self.id, sent = memory.recall()
        if not self.id:
            return False
        try:
            there = self.stored(cancellation)
        except UploadGoneError:
            return False
        except StoreAccessError:
            # What the store has of it, it tells nobody (s3:ListMultipartUploadParts).
            self._abort()
            return False
        self._sent = {
            part.number: part
            for part in sent
            if part.number in there and there[part.number][0]["ETag"] == part.tag
        }
        extra = {"object": self._place, "parts": len(self._sent)}
        log.info(events.UPLOAD_RESUMED, extra=extra)
        return True

    def create(self, cancellation: Cancellation) -> None:
        """Begin; if nobody waits for it any more, end at once."""
        what = f"begin the upload of {self._place}"

        def ask(client: "S3Client", common: dict[str, Any]) -> str:
            answer = client.create_multipart_upload(**common, Key=self._key, **self._headers)
            return told(answer, "UploadId", what)

        upload_id = self._requests.boto(ask, what, cancellation)
        with self._lock:
            self.id = upload_id
            left = self._left
        if left:
            self._abort()

    def send(self, number: int, data: bytes, stop: Cancellation) -> "CompletedPartTypeDef":
        """Send a part, numbered from 1, unless it is remembered that the store has it."""
        hashed = hash_of(data) if self._memory is not None else ""
        known = self._sent.get(number)
        if known is not None and known.hash == hashed:
            return _completed(known)
        what = f"upload part {number} of {self._place}"

        def ask(client: "S3Client", common: dict[str, Any]) -> SentPart:
            answer = client.upload_part(
                **common, Key=self._key, UploadId=self.id, PartNumber=number, Body=data
            )
            tag = told(answer, "ETag", what)
            return SentPart(number, tag, answer.get("ChecksumCRC32", ""), hashed)

        part = self._requests.boto(ask, what, stop, sends=len(data))
        if self._memory is not None:
            with self._lock:
                self._sent[number] = part
                sent = list(self._sent.values())
            self._memory.remember(self.id, sent)
        return _completed(part)

    def copy(
        self, number: int, source: Mapping[str, Any], stop: Cancellation
    ) -> "CompletedPartTypeDef":
        """Have the store copy a part, numbered from 1, from another object.

        Args:
            number: Of the part.
            source: Object, range and conditions, as boto3 names them.
            stop: Checked between attempts.

        Raises:
            ObjectExistsError: A condition does not hold.
        """
        what = f"copy part {number} of {self._place}"

        def ask(client: "S3Client", common: dict[str, Any]) -> "CompletedPartTypeDef":
            answer = client.upload_part_copy(
                **common, Key=self._key, UploadId=self.id, PartNumber=number, **source
            )
            etag = told(answer.get("CopyPartResult", {}), "ETag", what)
            return {"PartNumber": number, "ETag": etag}

        return self._requests.boto(ask, what, stop)

    def stored(self, cancellation: Cancellation) -> "dict[int, tuple[CompletedPartTypeDef, int]]":
        """Return the parts that the store has, by number, each with its bytes.

        Raises:
            UploadGoneError: It has none of that upload.
            StoreAccessError: It tells nobody (s3:ListMultipartUploadParts).
        """
        found: dict[int, tuple[CompletedPartTypeDef, int]] = {}
        what = f"list the parts of {self._place}"

        def ask(client: "S3Client", common: dict[str, Any]) -> "ListPartsOutputTypeDef":
            return client.list_parts(
                **common,
                Key=self._key,
                UploadId=self.id,
                PartNumberMarker=max(found, default=0),
            )

        while True:
            page = self._requests.boto(ask, what, cancellation)
            before = len(found)
            for part in page.get("Parts", []):
                number = part["PartNumber"]
                completed: CompletedPartTypeDef = {"PartNumber": number, "ETag": part["ETag"]}
                if "ChecksumCRC32" in part:
                    completed["ChecksumCRC32"] = part["ChecksumCRC32"]
                found[number] = completed, part["Size"]
            if not page.get("IsTruncated") or len(found) == before:
                return found

    def complete(
        self, sent: "Sequence[CompletedPartTypeDef]", cancellation: Cancellation
    ) -> "CompleteMultipartUploadOutputTypeDef | None":
        """Make the object of its parts; return the answer, None if it got lost.

        Raises:
            KeyExistsError: It was to be exclusive, and something is at the key.
            StoreUnavailableError: Somebody aborted the upload, or wrote the key at this moment.
            StoreProtocolError: The store says neither that it is complete nor why not.
        """
        what = f"complete the upload of {self._place}"
        tries = 0

        def ask(
            client: "S3Client", common: dict[str, Any]
        ) -> "CompleteMultipartUploadOutputTypeDef":
            nonlocal tries
            tries += 1
            if self._exclusive:
                common = {**common, "IfNoneMatch": "*"}
            answer = client.complete_multipart_upload(
                **common, Key=self._key, UploadId=self.id, MultipartUpload={"Parts": sent}
            )
            told(answer, "ETag", what)
            return answer

        answer = None
        try:
            answer = self._requests.boto(ask, what, cancellation)
        except ConditionRacedError as error:
            raise StoreUnavailableError(
                error.message, hint="Somebody wrote the same key meanwhile; try again."
            ) from error
        except ObjectExistsError as error:
            # It may be ours, if the answer to an earlier attempt got lost.
            if not self._exclusive:
                raise
            if tries == 1 or not self._is_complete(sent, cancellation):
                raise key_exists(self._place) from error
        except (UploadGoneError, DamagedAnswerError) as error:
            # It was completed if the answer to an earlier attempt got lost, or came without a word.
            if not self._is_complete(sent, cancellation):
                if isinstance(error, DamagedAnswerError):
                    raise
                raise StoreUnavailableError(
                    error.message, hint="Somebody aborted the upload; try again."
                ) from error
        self._completed = True
        return answer

    def without_condition(self) -> None:
        """Complete it whatever is at the key: the store can not hold an upload to conditions."""
        self._exclusive = False

    def end(self, cancellation: Cancellation) -> None:
        """Abort unless it was completed, waiting for that a moment, or longer if not cancelled."""
        with self._lock:
            self._left = not self.kept
            begun = bool(self.id)
        if self._completed or self.kept or not begun:
            return
        threading.Thread(target=self._abandon, name=ABORT_THREAD, daemon=True).start()
        self._aborted.wait(CANCELLED_WAIT_SECONDS if cancellation.wished else ABORT_SECONDS)

    def _has_size(
        self, _sent: "Sequence[CompletedPartTypeDef]", cancellation: Cancellation
    ) -> bool:
        return self._requests.size(self._below, cancellation) == self._size

    def _abandon(self) -> None:
        self._abort()
        self._aborted.set()
        under_way = [future for _, future in self.pending]
        wait(under_way)
        if any(future.exception() is None for future in under_way):
            self._abort()

    def _abort(self) -> None:
        try:
            self.drop()
        except PropmasterError as error:
            log.warning(events.UPLOAD_LEFT, extra={"object": self._place, "reason": error.message})
        if self._memory is not None:
            self._memory.remember("", ())

    def drop(self) -> None:
        """Have the store forget it, as far as it has not done so already.

        Raises:
            StoreError: It is there still.
        """
        policy = self._requests.policy
        policy = replace(
            policy,
            attempts=min(ABORT_ATTEMPTS, policy.attempts),
            deadline_seconds=min(ABORT_SECONDS, policy.deadline_seconds),
        )
        with suppress(UploadGoneError):
            self._requests.boto(
                lambda client, common: client.abort_multipart_upload(
                    **common, Key=self._key, UploadId=self.id
                ),
                f"abort the upload of {self._place}",
                policy=policy,
            )


def _completed(part: SentPart) -> "CompletedPartTypeDef":
    completed: CompletedPartTypeDef = {"PartNumber": part.number, "ETag": part.tag}
    if part.checksum:
        completed["ChecksumCRC32"] = part.checksum
    return completed


def key_exists(place: str) -> KeyExistsError:
    """Return the error for a key that is taken."""
    return KeyExistsError(
        f"{place}: something is stored there already",
        hint="Choose another key, or allow overwriting.",
    )
