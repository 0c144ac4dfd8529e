"""Whatever a host, a farm or a person calls things: a key stays the key that was meant."""

import re
from datetime import UTC, datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent_plugin.content.errors import PlaceholderUnknownError
from agent_plugin.publish.placeholders import NAMES, Execution, fill, safe

EXECUTION = Execution(
    farm_id="farm-1",
    queue_id="queue-2",
    job_id="job-3",
    step_id="step-4",
    task_id="task-4-0",
    execution_id="sessionaction-5-0",
    session_id="session-6",
    node_id="worker-7",
    instant=datetime(2026, 2, 3, 4, 5, 6, 999_000, UTC).timestamp(),
)

anything = st.text(max_size=40)
values = st.fixed_dictionaries(dict.fromkeys(NAMES, anything))
literal = st.text(st.characters(exclude_characters="{}"), max_size=10)
token = st.sampled_from([*(f"{{{name}}}" for name in NAMES), "{{", "}}"]) | literal


def test_o3_each_placeholder_has_its_value() -> None:
    template = "/".join(f"{{{name}}}" for name in NAMES)

    assert fill(template, EXECUTION.values) == (
        "sessionaction-5-0/job-3/worker-7/20260203/040506/queue-2/step-4/task-4-0/session-6"
    )


def test_o3_the_time_is_utc_whatever_the_hosts_zone_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import time  # noqa: PLC0415 - for this one

    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        filled = fill("{date}-{time}", EXECUTION.values)
    finally:
        monkeypatch.undo()
        time.tzset()

    assert filled == "20260203-040506"


def test_o3_a_chunk_of_tasks_is_told_from_others_by_its_execution() -> None:
    from dataclasses import replace  # noqa: PLC0415 - for this one

    assert fill("{taskID}", replace(EXECUTION, task_id=None).values) == "sessionaction-5-0"


@pytest.mark.parametrize(
    ("template", "column", "words"),
    [
        ("a/{job}", 3, "there is no placeholder {job}"),
        ("{}", 1, "there is no placeholder {}"),
        ("{ jobID}", 1, "there is no placeholder { jobID}"),
        ("{JOBID}", 1, "there is no placeholder {JOBID}"),
        ("ab}", 3, "'}' stands alone"),
        ("a{jobID", 2, "'{' stands alone"),
        ("{{jobID}", 8, "'}' stands alone"),
        ("{{{jobID}", 9, ""),
    ],
)
def test_o3_what_is_no_placeholder_is_told_with_its_column(
    template: str, column: int, words: str
) -> None:
    if not words:
        assert fill(template, EXECUTION.values) == "{job-3"
        return
    with pytest.raises(PlaceholderUnknownError) as caught:
        fill(template, EXECUTION.values)

    assert caught.value.message == f"column {column}: {words}"
    assert "{sessionID}" in caught.value.hint


@given(st.lists(token, max_size=8).map("".join), values)
@example("{nodeID}", dict.fromkeys(NAMES, ".."))
@example("a/{nodeID}/b", dict.fromkeys(NAMES, "../../etc"))
@example(".{nodeID}", dict.fromkeys(NAMES, "."))
def test_o3_what_is_filled_in_adds_no_component_and_leaves_none_empty(
    template: str, hostile: dict[str, str]
) -> None:
    """Seen to fail with `safe` returning the value as it is, and with it letting `.` through."""
    shape = fill(template, dict.fromkeys(NAMES, "x"))

    filled = fill(template, hostile)

    assert len(filled.split("/")) == len(shape.split("/"))
    for before, after in zip(shape.split("/"), filled.split("/"), strict=True):
        assert (after in ("", ".", "..")) == (before in ("", ".", ".."))


@given(anything)
def test_o3_a_value_is_safe_once_and_for_all(value: str) -> None:
    """Seen to fail with a replacement that is not safe itself."""
    kept = safe(value)

    assert re.fullmatch(r"[A-Za-z0-9._=@+-]+", kept)
    assert safe(kept) == kept


@given(st.text(max_size=60))
def test_o3_a_template_is_filled_or_refused_and_nothing_else(template: str) -> None:
    """Seen to fail with a pattern that passes over a closing brace."""
    try:
        filled = fill(template, EXECUTION.values)
    except PlaceholderUnknownError as error:
        column = int(re.match(r"column (\d+)", error.message)[1])  # type: ignore[index]
        assert template[column - 1] in "{}"
    else:
        doubled = template.replace("{{", "").replace("}}", "")
        assert set(re.findall(r"\{([^{}]*)\}", doubled)) <= set(NAMES)
        assert filled or not template


@given(st.text(st.characters(exclude_characters="{}"), max_size=60))
def test_o3_literal_braces_are_doubled(text: str) -> None:
    """Seen to fail with doubled braces kept as they are."""
    assert fill(f"{{{{{text}}}}}", EXECUTION.values) == f"{{{text}}}"
