"""The URLs behind a button "download outputs" in a web page: what they may say, and nothing else.

    deadline://download-output?farm-id=…&queue-id=…&job-id=…[&step-id=…[&task-id=…]][&profile=…]

is the Deadline client's, as the Deadline Cloud monitor makes it. `propmaster://` is the same with
one key more, `store`, for queues that no farm API knows. Anybody can put such a URL into a page, so
each key is checked, and whatever is not known is refused. Nothing of it becomes a command.
"""

import re
from typing import Final, Literal
from urllib.parse import parse_qsl

import msgspec

from agent_plugin.content.errors import JobInvalidError
from agent_plugin.session.job import IdKind, check_id

Scheme = Literal["deadline", "propmaster"]
DEADLINE: Final = "deadline"
PROPMASTER: Final = "propmaster"
SCHEMES: Final[tuple[Scheme, ...]] = (DEADLINE, PROPMASTER)

MAX_URL_CHARACTERS: Final = 4096
_COMMAND: Final = "download-output"
# Some browsers put a slash behind the host.
_URL: Final = re.compile(r"(?P<scheme>[a-z]+)://(?P<command>[a-z-]+)/?(?:\?(?P<query>[!-~]*))?")
_KEYS: Final = ("farm-id", "queue-id", "job-id", "step-id", "task-id", "profile")
_STORE: Final = re.compile(r"s3://[A-Za-z0-9][A-Za-z0-9._-]{1,253}/[A-Za-z0-9_./-]{1,512}")
# What AWS's own tools accept, less what begins like an option.
_PROFILE: Final = re.compile(r"[A-Za-z0-9_.@+=,:/ ][A-Za-z0-9_.@+=,:/ -]{0,127}")


class DownloadUrl(msgspec.Struct, frozen=True, rename="camel"):
    """What a URL asks for.

    Attributes:
        scheme: `deadline` or `propmaster`.
        step_id, task_id: Only of this step, or task.
        profile: The AWS profile; empty for the user's default.
        store: The URL of the store; empty: the farm knows it.
    """

    scheme: str
    farm_id: str
    queue_id: str
    job_id: str
    step_id: str | None = None
    task_id: str | None = None
    profile: str = ""
    store: str = ""


def parse_url(url: str) -> DownloadUrl:
    """Return what a URL asks for.

    Raises:
        JobInvalidError: It is not exactly of the form above; the message never repeats more of it
            than one key or value.
    """
    match = _URL.fullmatch(url) if len(url) <= MAX_URL_CHARACTERS else None
    if match is None or "#" in url:
        raise _invalid(f"it is not of the form deadline://{_COMMAND}?farm-id=…&queue-id=…&job-id=…")
    if match["scheme"] not in SCHEMES:
        raise _invalid(f"its scheme is {match['scheme'][:40]!r}")
    if match["command"] != _COMMAND:
        raise _invalid(f"its command is {match['command'][:40]!r}, and only {_COMMAND} is known")
    allowed = (*_KEYS, "store") if match["scheme"] == PROPMASTER else _KEYS
    values = _values(match["query"] or "", allowed)
    for key in _KEYS[:3]:
        if key not in values:
            raise _invalid(f"{key} is missing")
    if "task-id" in values and "step-id" not in values:
        raise _invalid("it has a task-id and no step-id")
    return DownloadUrl(
        scheme=match["scheme"],
        farm_id=_id(values, "farm"),
        queue_id=_id(values, "queue"),
        job_id=_id(values, "job"),
        step_id=_id(values, "step") if "step-id" in values else None,
        task_id=_id(values, "task") if "task-id" in values else None,
        profile=_matching(values, "profile", _PROFILE),
        store=_matching(values, "store", _STORE),
    )


def _values(query: str, allowed: tuple[str, ...]) -> dict[str, str]:
    try:
        pairs = parse_qsl(
            query,
            keep_blank_values=True,
            strict_parsing=True,
            errors="strict",
            max_num_fields=len(allowed),
        )
    except ValueError as error:
        raise _invalid("its query can not be read, or has too many keys") from error
    values: dict[str, str] = {}
    for key, value in pairs:
        if key not in allowed:
            raise _invalid(f"{key[:40]!r} is not a key of it; known: {', '.join(allowed)}")
        if key in values:
            raise _invalid(f"{key} is there twice")
        values[key] = value
    return values


def _id(values: dict[str, str], kind: IdKind) -> str:
    value = values[f"{kind}-id"]
    try:
        return check_id(value[:100], kind)
    except JobInvalidError as error:
        raise JobInvalidError(
            f"the URL can not be used: {error.message}", hint=error.hint
        ) from None


def _matching(values: dict[str, str], key: str, pattern: re.Pattern[str]) -> str:
    value = values.get(key)
    if value is None:
        return ""
    if not pattern.fullmatch(value) or (key == "store" and {".", ".."} & set(value.split("/"))):
        raise _invalid(f"its {key} is {value[:100]!r}")
    return value


def _invalid(reason: str) -> JobInvalidError:
    return JobInvalidError(
        f"the URL can not be used: {reason}", hint="open it from the page again, or tell its maker"
    )
