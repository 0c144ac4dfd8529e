"""Every fault of an object store under a listing: survived with the same answer, or told.

What is worst is an answer that looks like an empty listing: a step would then run without the
outputs of the step before, and nobody would learn why.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent_plugin.content import events
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import (
    PropmasterError,
    StoreAccessError,
    StoreProtocolError,
    StoreUnavailableError,
)
from agent_plugin.content.open_store import build_store
from agent_plugin.content.retry import RetryPolicy
from agent_plugin.content.store import Store
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.gate import always
from tests.servers.hooks import Host, action, job_of, step
from tests.servers.s3_server import S3Server
from tests.servers.scripted_answers import ScriptedAnswers
from tests.servers.trees import files_below, write_files

QUICK = RetryPolicy(initial_seconds=0.01, cap_seconds=0.1, read_timeout=2.0, deadline_seconds=10.0)
# A listing asks the bucket, so its key is empty.
LISTING = "^$"

TRANSIENT = [
    Fault.UNAVAILABLE, Fault.SLOW_DOWN, Fault.INTERNAL_ERROR, Fault.EMPTY_OK, Fault.XML_OK,
    Fault.RESET, Fault.NOT_HTTP, Fault.REPLY_LOST, Fault.RESET_MID_BODY, Fault.SHORT_BODY,
    Fault.SHORT_OBJECT, Fault.LONG_OBJECT, Fault.WRONG_BYTES,
]  # fmt: skip


@pytest.fixture
def store(fault_proxy: FaultProxy, s3: S3Server, s3_prefix: str) -> Store:
    """Three documents and a blob, behind the proxy."""
    store = build_store(
        f"s3://{s3.bucket}/{s3_prefix}",
        environment=s3.environment_at(fault_proxy.url),
        policy=QUICK,
        account_id="",
    )
    for key in ("job-1/a", "job-1/b", "job-2/c"):
        store.put_document(key, b"{}", {})
    store.put(Digest.of(b"x"), b"x")
    return store


@pytest.mark.parametrize(
    "fault",
    always(
        *(Fault.SLOW_DOWN, Fault.RESET, Fault.REPLY_LOST, Fault.EMPTY_OK, Fault.SHORT_OBJECT),
        of=TRANSIENT,
    ),
)
def test_a_listing_that_fails_is_asked_for_again(
    store: Store, fault_proxy: FaultProxy, fault: Fault
) -> None:
    rule = fault_proxy.inject(fault, times=2, key=LISTING)
    assert [info.key for info in store.list_documents("job-1/")] == ["job-1/a", "job-1/b"]
    assert rule.hits == 2

    rule = fault_proxy.inject(fault, times=2, key=LISTING)
    assert list(store.list_blobs()) == [Digest.of(b"x")]
    assert rule.hits == 2


@pytest.mark.parametrize(
    ("fault", "expected"),
    always(
        *(Fault.EMPTY_OK, Fault.FORBIDDEN, Fault.XML_OK, Fault.INTERNAL_ERROR, Fault.RESET),
        of=[
            (Fault.EMPTY_OK, StoreProtocolError),
            (Fault.NOT_FOUND, StoreProtocolError),
            (Fault.REDIRECT_301, StoreProtocolError),
            (Fault.FORBIDDEN, StoreAccessError),
            (Fault.EXPIRED_TOKEN, StoreAccessError),
            # boto3 takes for a failure what it can not read.
            (Fault.XML_OK, StoreUnavailableError),
            (Fault.SHORT_OBJECT, StoreUnavailableError),
            (Fault.WRONG_BYTES, StoreUnavailableError),
            (Fault.INTERNAL_ERROR, StoreUnavailableError),
            (Fault.RESET, StoreUnavailableError),
        ],
    ),
)
def test_a_listing_that_keeps_failing_is_the_right_error_and_never_empty(
    store: Store, fault_proxy: FaultProxy, fault: Fault, expected: type[PropmasterError]
) -> None:
    fault_proxy.inject(fault, key=LISTING)

    with pytest.raises(expected, match=r"list s3://.*/Manifests/job-1/"):
        list(store.list_documents("job-1/"))
    with pytest.raises(expected, match=r"list s3://.*/Data/"):
        list(store.list_blobs())


# ------------------------------------------------------------ answers that are no listing of ours


@pytest.fixture
def server() -> Iterator[ScriptedAnswers]:
    with ScriptedAnswers() as answers:
        yield answers


def listing(*entries: str, more: str = "<IsTruncated>false</IsTruncated>") -> bytes:
    return f"<ListBucketResult><Name>b</Name>{more}{''.join(entries)}</ListBucketResult>".encode()


def entry(key: str, *fields: str) -> str:
    usual = ("<Size>1</Size>", "<LastModified>2020-01-01T00:00:00Z</LastModified>")
    return f"<Contents><Key>{key}</Key>{''.join(fields or usual)}</Contents>"


FOREIGN = {
    "nothing": b"",
    "a page": b"<html><body>Please log in.</body></html>",
    "another answer of S3": b"<ListAllMyBucketsResult><Buckets/></ListAllMyBucketsResult>",
    "no name": b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>",
    "no end": listing(more=""),
    "other keys": listing(entry("other/Manifests/job-1/a")),
    "other keys too": listing(entry("pre/Manifests/job-1/a"), entry("pre/Manifests/job-10/a")),
    "no size": listing(entry("pre/Manifests/job-1/a", "<Size>1</Size>")),
    "more without a token": listing(more="<IsTruncated>true</IsTruncated>"),
}


@pytest.mark.parametrize(
    "name",
    always("nothing", "a page", "no end", "other keys", "more without a token", of=FOREIGN),
)
def test_what_is_no_listing_of_what_was_asked_is_never_taken_for_one(
    server: ScriptedAnswers, name: str
) -> None:
    server.body = FOREIGN[name]
    store = build_store(
        "s3://bucket/pre",
        environment={
            "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_ENDPOINT_URL_S3": server.url,
        },
        policy=QUICK,
        account_id="",
    )  # fmt: skip

    with pytest.raises(StoreProtocolError, match="given up after 10 attempts"):
        list(store.list_documents("job-1/"))

    assert len(server.requests) == 10
    server.body = listing(entry("pre/Manifests/job-1/a"))
    assert [info.key for info in store.list_documents("job-1/")] == ["job-1/a"]


def test_a_listing_that_goes_round_in_a_circle_is_not_followed_for_ever(
    server: ScriptedAnswers,
) -> None:
    more = "<IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>"
    server.body = listing(entry("pre/Manifests/a"), more=more)
    store = build_store(
        "s3://bucket/pre",
        environment={
            "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_ENDPOINT_URL_S3": server.url,
        },
        policy=QUICK,
        account_id="",
    )  # fmt: skip

    with pytest.raises(StoreProtocolError, match="does not go on"):
        list(store.list_documents(""))


# ------------------------------------------------------------ under a step's dependencies


@dataclass
class Farm:
    """A job whose first step has left something, and a host behind a proxy with a session of it."""

    host: Host
    proxy: FaultProxy
    session_dir: Path
    root: Path
    to: Path

    def brought(self) -> bytes | None:
        path = self.root / "renders/simulated.abc"
        return path.read_bytes() if path.exists() else None


@pytest.fixture
def make_farm(
    fault_proxy: FaultProxy, s3: S3Server, s3_prefix: str, tmp_path: Path
) -> Callable[..., Farm]:
    """Return a farm whose second host is given these settings of its store."""

    def make(**settings: float) -> Farm:
        url = f"s3://{s3.bucket}/{s3_prefix}"
        source = tmp_path / "source"
        write_files(source, {"scene.usd": b"a scene"}, mtime_ns=1_600_000_000 * 10**9)
        first = Host(tmp_path / "first", url, environment=s3.environment)
        submitted, _ = first.submit(source, output_directories=["renders"])
        job = job_of(submitted, stepDependencies={step(2): [step(1)]})
        left = Path(first.start(job, tmp_path / "one").roots[0].local_root) / "renders"
        left.mkdir()
        (left / "simulated.abc").write_bytes(b"simulated")
        first.finish_task(tmp_path / "one", action(1, 0))
        second = Host(
            tmp_path / "second",
            url,
            environment=s3.environment_at(fault_proxy.url),
            store=settings,
        )
        root = Path(second.start(job, tmp_path / "two").roots[0].local_root)
        return Farm(second, fault_proxy, tmp_path / "two", root, tmp_path / "to")

    return make


@pytest.mark.parametrize(
    "fault",
    always(
        *(Fault.EMPTY_OK, Fault.REPLY_LOST),
        of=[
            *(Fault.EMPTY_OK, Fault.XML_OK, Fault.SHORT_OBJECT, Fault.REPLY_LOST),
            Fault.SLOW_DOWN,
        ],
    ),
)
def test_outputs_of_a_step_come_though_their_listing_fails(
    make_farm: Callable[..., Farm], fault: Fault
) -> None:
    farm = make_farm()

    rule = farm.proxy.inject(fault, times=2, key=LISTING)
    farm.host.sync_step(farm.session_dir, step(2))
    assert (farm.brought(), rule.hits) == (b"simulated", 2)

    rule = farm.proxy.inject(fault, times=2, key=LISTING)
    farm.host.get_outputs(farm.to)
    assert (list(files_below(farm.to)), rule.hits) == (["renders/simulated.abc"], 2)


@pytest.mark.parametrize(
    ("fault", "exit_code"),
    always(
        *(Fault.EMPTY_OK, Fault.FORBIDDEN),
        of=[
            *((Fault.EMPTY_OK, 82), (Fault.XML_OK, 68), (Fault.FORBIDDEN, 70)),
            (Fault.NOT_FOUND, 82),
        ],
    ),
)
def test_a_step_whose_dependencies_can_not_be_listed_fails_and_then_succeeds(
    make_farm: Callable[..., Farm], fault: Fault, exit_code: int, expected_events: set[str]
) -> None:
    expected_events.add(events.SESSION_START_FAILED)
    farm = make_farm(attempts=3, deadline_seconds=4.0)
    farm.proxy.inject(fault, key=LISTING)

    with pytest.raises(PropmasterError) as of_step:
        farm.host.sync_step(farm.session_dir, step(2))
    with pytest.raises(PropmasterError) as of_reader:
        farm.host.get_outputs(farm.to)

    assert (of_step.value.exit_code, of_reader.value.exit_code) == (exit_code, exit_code)
    assert farm.brought() is None
    farm.proxy.clear()
    farm.host.sync_step(farm.session_dir, step(2))
    assert farm.brought() == b"simulated"
