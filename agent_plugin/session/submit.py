"""Submission: a directory becomes a job's inputs, as the Deadline client would store them.

One root, which is the directory itself. Blobs first, then the manifest: who can read a manifest can
read all it names. Keys, names and bytes are those of the client (docs/PROTOCOL.md).
"""

import os
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from agent_plugin.content.digest import Digest
from agent_plugin.content.directory_store import DirectoryStore
from agent_plugin.content.errors import FileChangedError, JobInvalidError, LocalReadError
from agent_plugin.content.manifest import FileEntry, Manifest, encode
from agent_plugin.content.safe_path import Root
from agent_plugin.content.snapshot import hash_files, walk
from agent_plugin.content.store import Store
from agent_plugin.publish.spec import Publisher
from agent_plugin.session.job import (
    Attachments,
    FileSystem,
    JobAttachmentSettings,
    ManifestProperties,
)
from agent_plugin.session.roots import input_manifest_key
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.ledger import TransferSpec
from agent_plugin.transfer.upload import Tally, upload

# How often files that changed while they were uploaded are looked at again.
ROUNDS = 4
# Any blob would do: what matters is that the bucket answers, and lets this user ask.
_ASKED_FOR = Digest.of(b"")


class SubmitResult(msgspec.Struct, rename="camel", omit_defaults=True):
    """The part of a job document that a submission makes; printed by `submit --json`."""

    attachments: Attachments
    job_attachment_settings: JobAttachmentSettings | None = None
    store: str | None = None
    publishers: tuple[Publisher, ...] = ()


class SubmitSummary(msgspec.Struct):
    """What was moved; sizes in bytes of distinct content."""

    files: int
    bytes: int
    bytes_uploaded: int
    bytes_reused: int
    seconds: float


def submit(
    root: Path,
    context: TransferContext,
    *,
    farm_id: str,
    queue_id: str,
    output_directories: Sequence[str] = (),
    file_system: FileSystem = "COPIED",
    new_guid: Callable[[], str] = lambda: uuid.uuid4().hex,
) -> tuple[SubmitResult, SubmitSummary]:
    """Store a directory's files and its input manifest.

    Args:
        root: The directory; its absolute path becomes the job's root path.
        context: The services.
        farm_id: Of the queue's farm.
        queue_id: Of the queue.
        output_directories: Where tasks will write, relative to the root.
        file_system: What the job asks for.
        new_guid: Makes the 32 hex digits that keep two submissions apart.

    Raises:
        JobInvalidError: The directory has no files and no output directories.
        FileChangedError: A file kept changing while it was read.
        PropmasterError: Any other of the tree.
    """
    begun = time.monotonic()
    root = Path(os.path.abspath(root))  # noqa: PTH100 - links stay as the user spelled them
    if not root.is_dir():
        raise LocalReadError(f"{root} is not a directory", hint="give the directory to submit")
    _see_store(context)
    entries, summary = _store_files(root, context)
    properties = ManifestProperties(
        root_path=os.fspath(root),
        root_path_format="posix",
        output_relative_directories=_normal(output_directories),
    )
    if entries:
        data = encode(Manifest.of(entries))
        key = input_manifest_key(farm_id, queue_id, new_guid(), os.fspath(root))
        context.ask(lambda store: store.put_document(key, data, {}))
        properties = msgspec.structs.replace(
            properties, input_manifest_path=key, input_manifest_hash=Digest.of(data).hex
        )
    elif not output_directories:
        raise JobInvalidError(
            f"{root} has no files, and no output directory was given",
            hint="a root needs inputs, or outputs (--output-dir), or both",
        )
    else:
        context.ask(_make)
    summary.seconds = round(time.monotonic() - begun, 3)
    attachments = Attachments(manifests=(properties,), file_system=file_system)
    return _result(attachments, context.store_url), summary


def _see_store(context: TransferContext) -> None:
    """See that the store can be had, before all files are read for it.

    A directory is looked at when it is opened; of a bucket nothing is known until it is asked.
    """
    if context.remembers_store:
        context.ask(lambda store: store.find_missing([_ASKED_FOR]))
    else:
        context.ask(lambda _store: None)


def _make(store: Store) -> None:
    """Make a directory's store, in which nothing was stored: workers may ask it for outputs."""
    if isinstance(store, DirectoryStore):
        store.make()


def _store_files(root: Path, context: TransferContext) -> tuple[list[FileEntry], SubmitSummary]:
    summary = SubmitSummary(0, 0, 0, 0, 0.0)
    spec = TransferSpec(kind="submit", source=os.fspath(root), destination=context.store_url)
    restless: list[str] = []
    tally = Tally()
    with Root(root) as opened:
        for _ in range(ROUNDS):
            entries = []
            files: dict[Digest, list[str]] = {}
            found_files = list(walk(root, cancellation=context.cancellation))
            for found, digest in hash_files(
                opened, found_files, context.index, cancellation=context.cancellation
            ):
                entry = FileEntry(
                    hash=digest.hex, mtime=found.mtime_us, path=found.path, size=digest.size
                )
                entries.append(entry)
                files.setdefault(digest, []).append(found.path)
            if not files:
                return [], summary
            done = upload(opened, files, context, spec)
            restless = done.changed
            excluded = {*done.excluded}
            entries = [entry for entry in entries if entry.path not in excluded]
            tally.add(files, done)
            if not restless:
                summary.files = len(entries)
                summary.bytes = sum(entry.size for entry in entries)
                summary.bytes_uploaded = tally.bytes_uploaded
                summary.bytes_reused = tally.bytes_reused
                return entries, summary
    raise FileChangedError(
        f"{restless[0]} in {root} kept changing while it was uploaded",
        hint="submit when nothing writes to the directory",
    )


def _normal(directories: Sequence[str]) -> tuple[str, ...]:
    """Return the directories as the client gives them: normal, each once, sorted."""
    return tuple(sorted({os.path.normpath(directory) for directory in directories}))


def _result(attachments: Attachments, store_url: str) -> SubmitResult:
    scheme, _, rest = store_url.partition("://")
    if scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        return SubmitResult(attachments, JobAttachmentSettings(bucket, prefix))
    return SubmitResult(attachments, store=store_url)
