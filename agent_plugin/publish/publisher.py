"""Publishing: what each of a job's publishers makes of a task's outputs.

The outputs are in the store, and their manifest is, before any of this begins: whatever happens
here, none is lost. Publishers are carried out one after the other, and one that fails keeps no
other from its turn. A publisher that had its turn before is not asked again.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from agent_plugin.content import events
from agent_plugin.content.errors import CancelledError, PropmasterError
from agent_plugin.content.objects import ObjectAccess, checked_key, object_url
from agent_plugin.content.s3_errors import BucketAbsentError
from agent_plugin.content.s3_store import S3Store
from agent_plugin.publish.destination import Destination
from agent_plugin.publish.leftovers import abort_left, access_document
from agent_plugin.publish.outputs import Output, RootOutputs, opened, shown_path
from agent_plugin.publish.packed import Packed
from agent_plugin.publish.placeholders import Execution, fill
from agent_plugin.publish.plain import Plain, keys_of
from agent_plugin.publish.result_documents import (
    ExcludedOutputs,
    Published,
    PublishFailure,
    Result,
    ResultParams,
)
from agent_plugin.publish.run import running
from agent_plugin.publish.spec import Publisher
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.ledger import TransferSpec

log = events.get_logger()


def publish(
    publishers: Sequence[Publisher],
    roots: Sequence[RootOutputs],
    execution: Execution,
    context: TransferContext,
    before: Sequence[Published] = (),
    *,
    leaves: bool = False,
) -> tuple[list[Published], PropmasterError | None]:
    """Give each publisher its turn.

    Args:
        publishers: The job's, and then the host's.
        roots: What the task left; with files.
        execution: The task's run.
        context: The services.
        before: What became of turns of the same execution that are not taken again.
        leaves: Whether those that are not required, and fail for a reason that may pass, are tried
            again later.

    Returns:
        What became of each, in order, and the first failure of one that is required.

    Raises:
        CancelledError: On request; the same publication goes on where it stopped.
    """
    had = {published.publisher: published for published in before}
    all_published = []
    refused: PropmasterError | None = None
    abort_left(context, source=context.store_url)
    for index, publisher in enumerate(publishers):
        if (published := had.get(index)) is None:
            try:
                published = _Turn(index, publisher, execution, context).take(roots)
            except CancelledError:
                raise
            except PropmasterError as error:
                # Of the store that hint is about the queue's bucket.
                absent = isinstance(error, BucketAbsentError)
                hint = "check the publisher's Bucket" if absent else error.hint
                failure = type(error)(f"publishers[{index}]: {error.message}", hint=hint)
                failure.__cause__ = error
                later = leaves and error.retryable and not publisher.params.required
                published = _failed(index, publisher, execution, failure, later=later)
                if refused is None and publisher.params.required:
                    refused = failure
        all_published.append(published)
    return all_published, refused


def _failed(
    index: int,
    publisher: Publisher,
    execution: Execution,
    error: PropmasterError,
    *,
    later: bool,
) -> Published:
    log.warning(
        events.PUBLISH_FAILED,
        extra={
            "publisher": index,
            "code": error.code,
            "reason": error.message,
            "required": publisher.params.required,
            "later": later,
        },
    )
    failure = PublishFailure(
        publisher=index,
        bucket=publisher.params.bucket,
        key=fill(publisher.key_template, execution.values),
        error=error.code,
        message=shown_path(error.message),
        required=publisher.params.required,
        hint=shown_path(error.hint),
        later=later,
    )
    return Published(index, failure=failure)


@dataclass(frozen=True, slots=True)
class _Turn:
    index: int
    publisher: Publisher
    execution: Execution
    context: TransferContext

    def take(self, roots: Sequence[RootOutputs]) -> Published:
        """Publish, and return what came of it."""
        begun = time.monotonic()
        params = self.publisher.params
        key = checked_key(fill(self.publisher.key_template, self.execution.values))
        is_plain = self.publisher.encoding == "plain"
        with opened(roots, by_root=params.by_root, owner=self.context.owner) as outputs:
            planned = keys_of(key, outputs) if is_plain else [(output, key) for output in outputs]
            metadata = access_document(self._access)
            with running(self.context, self._spec(key), planned, metadata) as run:
                store, destination = run.alone(self._open)
                result: Result | None = None
                if is_plain:
                    keys = {output.path: at for output, at in planned}
                    Plain(destination, store, run, keys).publish(outputs)
                    if len(run.excluded(outputs)) < len(outputs):
                        result = self._result(key)
                elif packed := Packed(
                    destination, run, key, self.publisher.encoding, params.mtime == "zero"
                ).publish(outputs):
                    info, measured = packed
                    result = self._result(key, version=info.version, checksum=measured.checksum)
                excluded = run.excluded(outputs)
                if result is not None:
                    self._remember(run.row.id, result)
        log.info(
            events.PUBLISH_COMPLETED,
            extra={
                "transfer": run.row.id,
                "publisher": self.index,
                "place": object_url(params.bucket, key),
                "files": len(outputs) - len(excluded),
                "excluded": len(excluded),
                "bytes": sum(output.entry.size for output in {*outputs} - {*excluded}),
                "bytes_sent": run.moved,
                "seconds": round(time.monotonic() - begun, 3),
            },
        )
        return Published(self.index, result=result, excluded=self._excluded(key, excluded))

    def _remember(self, transfer: int, result: Result) -> None:
        self.context.ledger.add_result(
            transfer,
            msgspec.to_builtins(result),
            job=self.execution.job_id,
            step=self.execution.step_id,
            task=self.execution.task_id or "",
        )

    def _excluded(self, key: str, outputs: Sequence[Output]) -> ExcludedOutputs | None:
        if not outputs:
            return None
        paths = [shown_path(output.path) for output in outputs]
        return ExcludedOutputs(self.index, self.publisher.params.bucket, key, paths)

    @property
    def _access(self) -> ObjectAccess:
        params = self.publisher.params
        return ObjectAccess(params.endpoint, params.region, params.profile)

    def _spec(self, key: str) -> TransferSpec:
        return TransferSpec(
            kind="publish",
            source=self.context.store_url,
            destination=object_url(self.publisher.params.bucket, key),
            session=self.execution.session_id,
            job=self.execution.job_id,
            step=self.execution.step_id,
            task=self.execution.task_id or "",
            required=self.publisher.params.required,
        )

    def _open(self) -> tuple[S3Store | None, Destination]:
        """Return the store, if S3 can copy from it to the destination, and the destination."""
        params = self.publisher.params
        store = self.context.open_store()
        access = self._access
        home = store.objects if isinstance(store, S3Store) else None
        if home is not None and access == ObjectAccess():
            objects = home
        else:
            objects = self.context.open_objects(access)
        destination = Destination(
            objects, params.bucket, params.overwrite, self.execution.execution_id
        )
        if isinstance(store, S3Store) and objects.endpoint == store.objects.endpoint:
            return store, destination
        return None, destination

    def _result(self, key: str, *, version: str = "", checksum: str = "") -> Result:
        params = self.publisher.params
        return Result(
            "s3",
            ResultParams(
                bucket=params.bucket,
                key=key,
                endpoint=params.endpoint,
                region=params.region,
                version_id=version,
                checksum_sha256=checksum,
            ),
        )
