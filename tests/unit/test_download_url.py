"""The URLs that a web page may hand over: what is not exactly of their form is refused."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent_plugin.content.errors import JobInvalidError
from agent_plugin.session.download_url import DownloadUrl, parse_url

FARM, QUEUE, JOB = (f"{kind}-{'0123456789abcdef' * 2}" for kind in ("farm", "queue", "job"))
STEP = f"step-{'a' * 32}"
TASK = f"task-{'a' * 32}-17"
IDS = f"farm-id={FARM}&queue-id={QUEUE}&job-id={JOB}"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (f"deadline://download-output?{IDS}", DownloadUrl("deadline", FARM, QUEUE, JOB)),
        (f"deadline://download-output/?{IDS}", DownloadUrl("deadline", FARM, QUEUE, JOB)),
        (
            f"deadline://download-output?step-id={STEP}&{IDS}&task-id={TASK}&profile=my-studio",
            DownloadUrl("deadline", FARM, QUEUE, JOB, STEP, TASK, "my-studio"),
        ),
        (
            f"deadline://download-output?{IDS}&profile=a%20b+c",
            DownloadUrl("deadline", FARM, QUEUE, JOB, profile="a b c"),
        ),
        (
            f"propmaster://download-output?{IDS}&store=s3%3A%2F%2Fstudio-jobs%2Fshow",
            DownloadUrl("propmaster", FARM, QUEUE, JOB, store="s3://studio-jobs/show"),
        ),
    ],
)
def test_urls_of_the_form_are_read(url: str, expected: DownloadUrl) -> None:
    assert parse_url(url) == expected


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("", "form"),
        ("deadline:", "form"),
        ("--help", "form"),
        (f"DEADLINE://download-output?{IDS}", "form"),
        (f"https://download-output?{IDS}", "scheme"),
        (f"deadline://run?{IDS}", "command"),
        (f"deadline://download-output:80?{IDS}", "form"),
        (f"deadline://me@download-output?{IDS}", "form"),
        (f"deadline://download-output/../x?{IDS}", "form"),
        (f"deadline://download-output?{IDS}#x", "form"),
        (f"deadline://download-output?{IDS}\n", "form"),
        (f"deadline://download-output?{IDS}&profile=a b", "form"),
        ("deadline://download-output", "farm-id is missing"),
        (f"deadline://download-output?farm-id={FARM}&job-id={JOB}", "queue-id is missing"),
        (f"deadline://download-output?{IDS}&job-id={JOB}", "twice"),
        (f"deadline://download-output?{IDS}&conflict=overwrite", "'conflict' is not a key"),
        (f"deadline://download-output?{IDS}&store=s3://b/p", "'store' is not a key"),
        (f"deadline://download-output?{IDS}&task-id={TASK}", "no step-id"),
        (f"deadline://download-output?{IDS}&step-id={STEP}&task-id={STEP}", "not a task id"),
        (f"deadline://download-output?{IDS}&step-id=step-{'A' * 32}", "not a step id"),
        (f"deadline://download-output?{IDS}&step-id={STEP}&task-id=task-{'a' * 32}-01", "task id"),
        (f"deadline://download-output?{IDS}&step-id={STEP}%0a", "not a step id"),
        (f"deadline://download-output?{IDS}&step-id=", "not a step id"),
        (f"deadline://download-output?{IDS}&profile", "can not be read"),
        (f"deadline://download-output?{IDS}&profile=", "profile is ''"),
        (f"deadline://download-output?{IDS}&profile=--debug", "profile"),
        (f"deadline://download-output?{IDS}&profile=a%00b", "profile"),
        (f"deadline://download-output?{IDS}&profile=%24(id)", "profile"),
        (f"deadline://download-output?{IDS}&profile=%ff", "can not be read"),
        (f"deadline://download-output?{IDS}&profile=" + "a" * 5000, "form"),
        (f"propmaster://download-output?{IDS}&store=file:///etc", "store"),
        (f"propmaster://download-output?{IDS}&store=s3://b/../p", "store"),
        (f"propmaster://download-output?{IDS}&store=s3://bucket/p/../q", "store"),
        (f"propmaster://download-output?{IDS}&store=s3://bucket", "store"),
        (f"propmaster://download-output?{'&'.join([IDS] * 4)}", "too many keys"),
    ],
)
def test_whatever_else_is_refused_and_the_reason_told(url: str, told: str) -> None:
    with pytest.raises(JobInvalidError) as refused:
        parse_url(url)

    assert told in refused.value.message
    assert len(refused.value.message) < 300


@given(st.text(max_size=60), st.integers(0, len(IDS) + 30))
@example("&", 30)
def test_a_url_with_anything_put_into_it_is_refused_or_names_good_ids(text: str, at: int) -> None:
    """Seen to fail when `fullmatch` is `match`, and when unknown keys are passed over."""
    url = f"deadline://download-output?{IDS}"
    try:
        found = parse_url(url[:at] + text + url[at:])
    except JobInvalidError:
        return

    assert (found.farm_id, found.queue_id, found.store) == (FARM, QUEUE, "")
    assert found.profile.isprintable()
    assert not found.profile.startswith("-")
