"""The placeholders of a publisher's key, such as `{jobID}`, and what they become. Pure.

A template is read when the job document is, so that a misspelled name is told before a task has
run; it is filled when a task has finished. What is filled in can add no component to a key and can
not be `.` or `..`, whatever a host calls itself.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from agent_plugin.content.errors import PlaceholderUnknownError

NAMES: Final = (
    *("executionID", "jobID", "nodeID", "date", "time"),
    *("queueID", "stepID", "taskID", "sessionID"),
)

# Literal braces are doubled; what is left of a brace is a mistake.
_TOKEN: Final = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")
# What keys hold safely everywhere, but for what separates or ends something:
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._=@+-]|\.{2,}")


@dataclass(frozen=True, slots=True)
class Execution:
    """One run of a task, whose outputs are published.

    Attributes:
        execution_id: The session action.
        task_id: None for a chunk of tasks.
        node_id: The worker.
        instant: When its outputs began to be published, seconds since the epoch; one for all.
    """

    farm_id: str
    queue_id: str
    job_id: str
    step_id: str
    task_id: str | None
    execution_id: str
    session_id: str
    node_id: str
    instant: float

    @property
    def values(self) -> Mapping[str, str]:
        """What each of NAMES becomes, as it is; a chunk is told from others by its execution."""
        moment = datetime.fromtimestamp(self.instant, UTC)
        return {
            "executionID": self.execution_id,
            "jobID": self.job_id,
            "nodeID": self.node_id,
            "date": moment.strftime("%Y%m%d"),
            "time": moment.strftime("%H%M%S"),
            "queueID": self.queue_id,
            "stepID": self.step_id,
            "taskID": self.task_id or self.execution_id,
            "sessionID": self.session_id,
        }


def fill(template: str, values: Mapping[str, str]) -> str:
    """Return a template with its placeholders replaced, and `{{` and `}}` by `{` and `}`.

    Args:
        template: A key.
        values: For each of NAMES; what a key can not hold, or what would be another component of
            it, becomes `-`.

    Raises:
        PlaceholderUnknownError: It names a placeholder that there is not, or has a brace that is
            neither doubled nor part of a placeholder; the message says in which column.
    """
    return "".join(_replaced(token, values) for token in _TOKEN.finditer(template))


def safe(value: str) -> str:
    """Return a value as a key may hold it within one component: never empty, never dots alone."""
    kept = _UNSAFE.sub("-", value)
    return "-" if kept in ("", ".") else kept


def _replaced(token: re.Match[str], values: Mapping[str, str]) -> str:
    text, name = token[0], token[1]
    if name is not None:
        if name not in NAMES:
            raise _unknown(name, token.start() + 1)
        return safe(values[name])
    if text in ("{{", "}}"):
        return text[0]
    if text in ("{", "}"):
        raise PlaceholderUnknownError(
            f"column {token.start() + 1}: {text!r} stands alone",
            hint=f"write {text * 2} for a brace; placeholders are {_known()}",
        )
    return text


def _unknown(name: str, column: int) -> PlaceholderUnknownError:
    # Loaded here: 4 ms that only a failure needs.
    from difflib import get_close_matches  # noqa: PLC0415

    folded = {known.lower(): known for known in NAMES}
    nearest = get_close_matches(name.lower(), folded, n=1)
    guess = f"did you mean {{{folded[nearest[0]]}}}? " if nearest else ""
    return PlaceholderUnknownError(
        f"column {column}: there is no placeholder {{{name[:100]}}}",
        hint=f"{guess}known: {_known()}; write {{{{ and }}}} for braces",
    )


def _known() -> str:
    return ", ".join(f"{{{name}}}" for name in NAMES)
