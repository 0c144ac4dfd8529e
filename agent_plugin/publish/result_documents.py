"""What publishing came to: result documents in the form of Bacalhau's, and where they are kept.

A result is itself an input source. Those of one run of a task are kept in one document of the
store, below `Manifests/<farm>/<queue>/Results/<job>/`, where the service's own readers never list
(docs/decisions/0018-where-results-are-kept.md); any machine finds all runs of a job there.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import msgspec

from agent_plugin.content import events
from agent_plugin.content.errors import DocumentNotFoundError, InputError, StoreProtocolError
from agent_plugin.content.store import Store
from agent_plugin.publish.placeholders import Execution
from agent_plugin.transfer.asking import Asking

VERSION: Final = 1
RESULTS: Final = "Results"
MAX_RESULTS_BYTES: Final = 1024 * 1024
# Of the paths that one publisher's part of a document has: all parts fit into it together.
EXCLUDED_BYTES: Final = 16 * 1024

log = events.get_logger()


class ResultParams(msgspec.Struct, frozen=True, rename="pascal"):
    """Where a result is.

    Attributes:
        key: Of plain objects their prefix, with its slash; of an archive its name.
        endpoint, region: As the publisher has them; empty is what the reader's environment says.
        filter: Empty: all that is below the key.
        version_id: Of an archive in a bucket with versions.
        checksum_sha256: Of a whole archive, in base64; empty for plain objects.
        partition: None: all of it.
    """

    bucket: str
    key: str
    endpoint: str = ""
    region: str = ""
    filter: str = ""
    version_id: str = msgspec.field(default="", name="VersionID")
    checksum_sha256: str = msgspec.field(default="", name="ChecksumSHA256")
    partition: dict[str, Any] | None = None


class Result(msgspec.Struct, frozen=True, rename="pascal"):
    """What a publisher has published; an input source as it is."""

    type: Literal["s3"]
    params: ResultParams

    @property
    def url(self) -> str:
        """`s3://bucket/key`, for people."""
        return f"s3://{self.params.bucket}/{self.params.key}"


class PublishFailure(msgspec.Struct, frozen=True, rename="camel"):
    """Why a publisher has published nothing, or not all.

    Attributes:
        publisher: Its index among the job's and then the host's.
        key: Its key, with the placeholders filled.
        error: Ledger code, `E_KEY_EXISTS` for example.
        message: For people.
        required: Whether the task has failed for it.
        hint: What to do about it, for people; may be empty.
        later: Whether it is tried again at the session's end; the reason may pass.
    """

    publisher: int
    bucket: str
    key: str
    error: str
    message: str
    required: bool
    hint: str = ""
    later: bool = False


class ExcludedOutputs(msgspec.Struct, frozen=True, rename="camel"):
    """The outputs that people have taken out of a publication while it ran.

    Attributes:
        publisher: Its index among the job's and then the host's.
        key: Its key, with the placeholders filled.
        paths: As they would be below the key, or in the archive; what is not UTF-8 is escaped.
        more: How many further paths there are, which are not named.
    """

    publisher: int
    bucket: str
    key: str
    paths: list[str]
    more: int = 0

    @property
    def files(self) -> int:
        """How many outputs."""
        return len(self.paths) + self.more

    @property
    def shortened(self) -> "ExcludedOutputs":
        """The same with so many paths as a document has room for."""
        kept, size = 0, 0
        for path in self.paths:
            size += len(msgspec.json.encode(path))
            if size > EXCLUDED_BYTES:
                break
            kept += 1
        return msgspec.structs.replace(self, paths=self.paths[:kept], more=self.files - kept)

    @property
    def url(self) -> str:
        """`s3://bucket/key`, for people."""
        return f"s3://{self.bucket}/{self.key}"


class Published(msgspec.Struct, frozen=True, rename="camel"):
    """What became of one publisher's turn.

    Attributes:
        publisher: Its index among the job's and then the host's.
        result: None if it failed, and if all outputs were excluded.
        failure: Why it failed.
        excluded: What was left out by hand.
    """

    publisher: int
    result: Result | None = None
    failure: PublishFailure | None = None
    excluded: ExcludedOutputs | None = None


class Contents(msgspec.Struct, frozen=True, rename="camel"):
    """Which files a result has; they are listed in a manifest beside the document.

    Attributes:
        files, bytes: How many, and how large together.
        hash: The xxh128 of the manifest's bytes.
    """

    files: Annotated[int, msgspec.Meta(ge=0)]
    bytes: Annotated[int, msgspec.Meta(ge=0)]
    hash: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]


class ResultsDocument(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """The results of one run of a task, as the store keeps them.

    Attributes:
        execution_id: The session action.
        task_id: None for a chunk of tasks.
        node_id: The worker.
        published_at: The instant of the placeholders, seconds since the epoch.
        results: In the order of the publishers, those that published something.
        failures: Of those that failed.
        excluded: What of the outputs people have left out.
        contents: Of each result, in their order; none in a document of an earlier version.
    """

    version: int = VERSION
    farm_id: str
    queue_id: str
    job_id: str
    step_id: str
    task_id: str | None
    execution_id: str
    session_id: str
    node_id: str
    published_at: float
    results: list[Result]
    failures: list[PublishFailure]
    excluded: list[ExcludedOutputs] = []
    contents: list[Contents] = []

    @classmethod
    def of(cls, execution: Execution, turns: Sequence[Published]) -> "ResultsDocument":
        """Return the document of an execution, whose publishers had these turns."""
        return cls(
            farm_id=execution.farm_id,
            queue_id=execution.queue_id,
            job_id=execution.job_id,
            step_id=execution.step_id,
            task_id=execution.task_id,
            execution_id=execution.execution_id,
            session_id=execution.session_id,
            node_id=execution.node_id,
            published_at=execution.instant,
            results=[turn.result for turn in turns if turn.result is not None],
            failures=[turn.failure for turn in turns if turn.failure is not None],
            excluded=[turn.excluded.shortened for turn in turns if turn.excluded is not None],
        )

    @property
    def key(self) -> str:
        """Where it is kept, below `Manifests/`."""
        return f"{self._stem}.json"

    def contents_key(self, contents: Contents) -> str:
        """Return where the list of a result's files is kept, below `Manifests/`."""
        return f"{self._stem}.{contents.hash}.files"

    @property
    def _stem(self) -> str:
        prefix = results_prefix(
            (self.farm_id, self.queue_id, self.job_id), self.step_id, self.task_id
        )
        moment = datetime.fromtimestamp(self.published_at, UTC).isoformat(timespec="microseconds")
        return f"{prefix}{moment.replace('+00:00', 'Z')}_{self.execution_id}"


def results_prefix(
    job: tuple[str, str, str], step_id: str | None = None, task_id: str | None = None
) -> str:
    """Return what the keys of all result documents begin with, below `Manifests/`.

    Args:
        job: Its farm id, queue id and job id.
        step_id: Only of this step.
        task_id: Only of this task; needs the step.
    """
    farm, queue, job_id = job
    parts = [farm, queue, RESULTS, job_id, *filter(None, (step_id, task_id))]
    return "/".join(parts) + "/"


def keep_results(store: Store, document: ResultsDocument, lists: Mapping[str, bytes]) -> None:
    """Put a document where readers find it, in place of an earlier one of the same execution.

    Args:
        store: The job's.
        document: The results.
        lists: The manifests of their files by key; they are there before the document is.
    """
    for key, data in lists.items():
        store.put_document(key, data, {})
    store.put_document(document.key, msgspec.json.encode(document), {})


def find_results(
    asking: Asking,
    job: tuple[str, str, str],
    *,
    step_id: str | None = None,
    task_id: str | None = None,
) -> list[ResultsDocument]:
    """Return the results of all runs of a job's tasks, by the instant of their publishing.

    A document that is none is left out and logged: anybody who may write to the bucket may have
    put it there, and it must not hide the others.

    Args:
        asking: Of the job's store.
        job: Its farm id, queue id and job id.
        step_id: Only of this step.
        task_id: Only of this task; needs the step.

    Raises:
        StoreAccessError, StoreUnavailableError: They can not be had.
    """
    prefix = results_prefix(job, step_id, task_id)
    infos = asking.ask(lambda store: list(store.list_documents(prefix)))
    keys = [info.key for info in infos if info.key.endswith(".json")]
    found = [document for document in asking.ask_each(_read, keys) if document is not None]
    return sorted(found, key=lambda document: (document.published_at, document.execution_id))


def _read(store: Store, key: str) -> ResultsDocument | None:
    try:
        data = store.get_document(key, max_bytes=MAX_RESULTS_BYTES).data
        document = msgspec.json.decode(data, type=ResultsDocument)
    except (DocumentNotFoundError, InputError, StoreProtocolError) as error:
        # Gone meanwhile, too large, or coded.
        reason = error.message
    except msgspec.DecodeError as error:
        reason = str(error)
    else:
        if document.version != VERSION or not _is_at(document, key):
            reason = "its name is not that of the execution which it tells of"
        elif document.contents and len(document.contents) != len(document.results):
            reason = "it has not as many contents as results"
        else:
            return document
    log.warning(events.RESULTS_SKIPPED, extra={"key": key, "reason": reason})
    return None


def _is_at(document: ResultsDocument, key: str) -> bool:
    try:
        return document.key == key
    except (OverflowError, ValueError, OSError):
        # An instant that no calendar has.
        return False
