"""What S3's answers and its clients' exceptions mean, as errors of ours.

obstore tells the status and the answer's body only in the text of its exceptions, so that text is
taken apart here. Of an answer only status, code, message and region are passed on: bodies hold
access keys and strings to sign, and nothing of that may be in a message.

Sources: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html and, for the text,
object_store 0.14 (`src/client/retry.rs`), which tests/unit/test_s3_errors.py holds us to.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from agent_plugin.content.errors import (
    ObjectArchivedError,
    PropmasterError,
    SettingsInvalidError,
    StoreAccessError,
    StoreProtocolError,
    StoreThrottledError,
    StoreUnavailableError,
)

if TYPE_CHECKING:
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError


class ObjectAbsentError(StoreProtocolError):
    """404 for an object; whoever asked knows whether that is a blob or a document."""


class BucketAbsentError(StoreAccessError):
    """404 for the bucket itself, which must never be taken for an absent object."""


class ObjectExistsError(StoreProtocolError):
    """409 or 412: a condition did not hold, which for our writes means that the object exists."""


class ConditionRacedError(ObjectExistsError):
    """409: somebody else wrote the same key meanwhile; who has won is not known yet."""


class RangeUnsatisfiableError(StoreProtocolError):
    """416: the object ends before the range begins."""


class UploadGoneError(StoreProtocolError):
    """The multipart upload was completed or aborted."""


class UnsupportedByStoreError(StoreProtocolError):
    """501: the store lacks what was asked for, such as conditional writes."""


class RequestRefusedError(StoreProtocolError):
    """400: the store takes something in the request for wrong, and its code does not say what."""


class DamagedAnswerError(StoreProtocolError):
    """An answer that can only have been damaged on the way; asking again is worth a few tries."""

    retryable = True


class ExpiredCredentialsError(StoreAccessError):
    """The credentials were good once; new ones from the same source may be good again."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What is known of an unwelcome answer.

    Attributes:
        status: HTTP status; None if there was no answer.
        code: S3's error code; empty in answers without body, such as those to HEAD.
        message: Words of the server or of the client library.
        region: The region that the server names instead of ours, or empty.
    """

    status: int | None
    code: str
    message: str
    region: str = ""


THROTTLING: Final = frozenset(
    {
        "SlowDown",
        "ServiceUnavailable",
        "Throttling",
        "ThrottlingException",
        "RequestLimitExceeded",
        "TooManyRequests",
    }
)
# Some of these come with status 400.
TRANSIENT: Final = frozenset(
    {
        "RequestTimeout",
        "InternalError",
        "OperationAborted",
        "IncompleteBody",
        "BadDigest",
        "XAmzContentSHA256Mismatch",
        "XAmzContentChecksumMismatch",
    }
)
EXPIRED: Final = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"})
WRONG_REGION: Final = frozenset(
    {"PermanentRedirect", "TemporaryRedirect", "Redirect", "AuthorizationHeaderMalformed"}
)
# What a 404 says of an object; a proxy's says nothing, and an answer to HEAD can not.
ABSENT: Final = frozenset({"", "NoSuchKey", "NotFound", "404"})
WRONG_KEYS: Final = frozenset(
    {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidSecurity"}
)

_STATUS: Final = re.compile(r"Server returned (?:non-2xx|error) status code: (\d{3})")
_CODE: Final = re.compile(r"<Code>\s*([A-Za-z0-9.]{1,64})\s*</Code>")
_MESSAGE: Final = re.compile(r"<Message>([^<]{1,300})")
_REGION: Final = re.compile(r"<Region>([a-z0-9-]{1,32})</Region>")
_KIND: Final = re.compile(r"HttpError \{\s*kind: (\w+)")
_OS_MESSAGE: Final = re.compile(r'(?:message|error): "([^"]{1,200})"')
_CERTIFICATE: Final = re.compile(r"(InvalidCertificate|UnknownIssuer|NotValidForName|CertExpired)")
_PROVIDER: Final = "External AWS credential provider: "
# An answer whose headers contradict the request or each other.
_DAMAGED: Final = (
    "non-partial response",
    "Requested ",
    "Content-Range",
    "Content-Length",
    "header",
)
_CONNECTION_WORDS: Final = {
    "Timeout": "timed out",
    "Connect": "no connection",
    "Interrupted": "the connection was cut",
    "Decode": "the answer broke off",
    "Request": "the connection was lost",
    "Unknown": "the connection was lost",
}


def error_of_obstore(error: Exception, what: str) -> PropmasterError:
    """Return ours for an exception of obstore (BaseError, FileNotFoundError, ValueError).

    Args:
        error: The exception.
        what: The request in words, naming bucket and key.
    """
    text, _, debug = str(error).partition("\n\nDebug source:")
    if status := _STATUS.search(text):
        # The key stands before the status and the body behind it; only the body is the store's.
        body = text[status.end() :]
        return error_of_answer(
            Answer(
                int(status[1]),
                _first(_CODE, body),
                _first(_MESSAGE, body),
                _first(_REGION, body),
            ),
            what,
        )
    if "redirect without LOCATION" in text or "error following redirect" in text:
        return error_of_answer(Answer(301, "Redirect", ""), what)
    if _PROVIDER in text:
        return _no_credentials(what, text.rpartition(_PROVIDER)[2])
    if kind := _KIND.search(debug):
        return _connection_error(kind[1], debug, what)
    reason = text.removeprefix("Generic S3 error: ").partition("\n")[0][:300]
    if any(words in reason for words in _DAMAGED):
        return DamagedAnswerError(f"{what}: {reason}")
    return StoreProtocolError(f"{what}: {reason}")


def error_of_boto(  # noqa: PLR0911 - one for each family
    error: "BotoCoreError | ClientError | ResponseParserError", what: str
) -> PropmasterError:
    """Return ours for an exception of botocore, which has these three families.

    Args:
        error: The exception.
        what: The request in words, naming bucket and key.
    """
    from botocore import exceptions as boto  # noqa: PLC0415 - 200 ms that most commands do not need
    from botocore.parsers import ResponseParserError  # noqa: PLC0415 - as above

    if isinstance(error, boto.ClientError):
        answer = error.response.get("Error", {})
        return error_of_answer(
            Answer(
                error.response.get("ResponseMetadata", {}).get("HTTPStatusCode"),
                str(answer.get("Code", "")),
                str(answer.get("Message", ""))[:300],
            ),
            what,
        )
    reason = str(error).partition("\n")[0][:300]
    if isinstance(error, ResponseParserError | boto.FlexibleChecksumError):
        return DamagedAnswerError(f"{what}: the answer can not be read")
    if isinstance(error, boto.SSLError):
        return _untrusted(what)
    if isinstance(error, boto.HTTPClientError | boto.ConnectionError | boto.IncompleteReadError):
        # Only the class: its text has the whole URL.
        return StoreUnavailableError(f"{what}: {type(error).__name__}", hint=_UNREACHABLE)
    if isinstance(error, boto.ProfileNotFound | boto.ConfigParseError | boto.ConfigNotFound):
        return SettingsInvalidError(
            f"{what}: {reason}", hint="Check AWS_PROFILE, AWS_CONFIG_FILE and the file it names."
        )
    if isinstance(error, boto.ParamValidationError):
        return StoreProtocolError(f"{what}: {reason}")
    return _no_credentials(what, f"{type(error).__name__}: {reason}")


def error_of_answer(  # noqa: PLR0911 - one for each kind of answer
    answer: Answer, what: str
) -> PropmasterError:
    """Return ours for an answer that is not a success."""
    reason = f"{what}: {_words(answer)}"
    if answer.code in THROTTLING or (answer.status in (429, 503) and answer.code not in TRANSIENT):
        return StoreThrottledError(reason, hint="Try again later, or with less concurrency.")
    if answer.code in TRANSIENT or answer.status == 408 or (answer.status or 0) >= 502:  # noqa: PLR2004 - HTTP
        return StoreUnavailableError(reason, hint=_UNREACHABLE)
    if answer.code in _BY_CODE:
        return _BY_CODE[answer.code](reason)
    if answer.code in EXPIRED:
        return ExpiredCredentialsError(reason, hint="Renew the credentials.")
    if answer.code in WRONG_REGION or answer.status in (301, 307):
        where = f" to {answer.region}" if answer.region else ""
        return StoreProtocolError(
            f"{reason} (the bucket is in another region)", hint=f"Set AWS_REGION{where}."
        )
    if answer.code in WRONG_KEYS:
        return StoreAccessError(reason, hint="Check the credentials: the store does not know them.")
    if answer.status == 404 and answer.code not in ABSENT:  # noqa: PLR2004 - HTTP
        return StoreProtocolError(reason)
    return _BY_STATUS.get(answer.status, StoreProtocolError)(reason)


_UNREACHABLE: Final = "Check the network and the endpoint; a later try may succeed."
# Of requests that nobody has signed.
NOT_OPEN: Final = (
    "The bucket is not open to everybody, or not for this: use credentials (leave NoSign out)."
)
_FORBIDDEN: Final = (
    "Check the identity's rights (s3:GetObject, s3:PutObject, s3:ListBucket) and that the bucket"
    " belongs to the expected account; without s3:ListBucket S3 also answers so for what is absent."
)

RESTORE_HINT: Final = (
    "Restore it first (`aws s3api restore-object`, or an S3 Batch Operations job), or leave it out."
)
_BY_CODE: Final[dict[str, Callable[[str], PropmasterError]]] = {
    "NoSuchBucket": lambda reason: BucketAbsentError(
        f"{reason} (the bucket itself is missing)", hint="Check the bucket's name."
    ),
    "NoSuchUpload": UploadGoneError,
    "InvalidObjectState": lambda reason: ObjectArchivedError(reason, hint=RESTORE_HINT),
    "ConditionalRequestConflict": ConditionRacedError,
    "NotImplemented": UnsupportedByStoreError,
    "RequestTimeTooSkewed": lambda reason: StoreAccessError(
        reason, hint="Set this host's clock: it differs too much from the store's."
    ),
}
_BY_STATUS: Final[dict[int | None, Callable[[str], PropmasterError]]] = {
    400: RequestRefusedError,
    401: lambda reason: StoreAccessError(reason, hint=_FORBIDDEN),
    403: lambda reason: StoreAccessError(reason, hint=_FORBIDDEN),
    404: ObjectAbsentError,
    409: ObjectExistsError,
    412: ObjectExistsError,
    416: RangeUnsatisfiableError,
    500: lambda reason: StoreUnavailableError(reason, hint=_UNREACHABLE),
    501: UnsupportedByStoreError,
}


def _connection_error(kind: str, debug: str, what: str) -> PropmasterError:
    if _CERTIFICATE.search(debug):
        return _untrusted(what)
    words = _CONNECTION_WORDS.get(kind, kind)
    if detail := _first(_OS_MESSAGE, debug):
        words = f"{words} ({detail})"
    return StoreUnavailableError(f"{what}: {words}", hint=_UNREACHABLE)


def _untrusted(what: str) -> StoreProtocolError:
    return StoreProtocolError(
        f"{what}: the server's certificate is not trusted",
        hint="Check the endpoint, or set AWS_CA_BUNDLE to the authority that signed it.",
    )


def _no_credentials(what: str, reason: str) -> StoreAccessError:
    return StoreAccessError(
        f"{what}: no credentials ({_one_line(reason)[:300]})",
        hint="Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
    )


def _words(answer: Answer) -> str:
    parts = [str(answer.status) if answer.status is not None else "", answer.code]
    words = " ".join(part for part in parts if part) or "no answer"
    message = _one_line(answer.message)
    return f"{words}: {message}" if message else words


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _first(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.search(text)
    return match[1] if match else ""
