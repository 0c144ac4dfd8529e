"""Outputs as plain objects: each is copied from the store's blob to its key, or sent there.

Where the store is at the publisher's endpoint, S3 copies: no byte of an output passes this host.
Otherwise what the task left is sent, and refused if it is not what was stored.

All keys are asked for before the first is written, and the first is written before all others: of
two executions with the same keys one has it, and the other writes nothing. What was written when a
later key turns out to be taken stays; it is whole, and tells whose it is.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from mimetypes import MimeTypes
from typing import Final

from agent_plugin.content.errors import StoreAccessError, UnsafePathError
from agent_plugin.content.objects import ObjectInfo, checked_key
from agent_plugin.content.s3_store import S3Store
from agent_plugin.content.store import Cancellation
from agent_plugin.publish.archive import InOrder, read_verified
from agent_plugin.publish.destination import HASH, Destination, Standing
from agent_plugin.publish.outputs import Output
from agent_plugin.publish.run import Run

# Of the names that outputs may have, those that keys can not hold or listings not tell.
_CONTROL: Final = frozenset(map(chr, (*range(0x20), 0x7F)))
_RENAME: Final = "Rename the file, or publish an archive (Encoding), which keeps any name."
_TYPES: Final = MimeTypes()


def keys_of(prefix: str, outputs: Sequence[Output]) -> list[tuple[Output, str]]:
    """Return each output with its key.

    Args:
        prefix: With its slash at the end.
        outputs: Of one task.

    Raises:
        UnsafePathError: A name can not be part of a key.
    """
    planned = []
    for output in outputs:
        key = prefix + output.path
        try:
            checked_key(key)
        except UnsafePathError as error:
            raise UnsafePathError(
                f"{output.shown} can not be published: {error.message}", hint=_RENAME
            ) from error
        if _CONTROL & set(output.path):
            raise UnsafePathError(
                f"{output.shown!r} can not be published: its name has a control character",
                hint=_RENAME,
            )
        planned.append((output, key))
    return planned


@dataclass(slots=True)
class Plain:
    """The publishing of one task's outputs as plain objects.

    Attributes:
        destination: Where to.
        store: Where S3 copies from; None where it can not.
        run: The transfer.
        keys: Of each output by its path.
    """

    destination: Destination
    store: S3Store | None
    run: Run
    keys: Mapping[str, str]
    _taken: list[str] = field(default_factory=list)
    _done: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def publish(self, outputs: Sequence[Output]) -> None:
        """Publish the outputs, in the order of their paths.

        Raises:
            KeyExistsError: Somebody else has written one of the keys.
            FileChangedError: An output is not what it was when it was stored.
            PropmasterError: Any other of the tree.
        """
        self.run.tick()
        if not self.destination.overwrite:
            wanted = self.run.wanted(outputs)
            self.run.each(self._look, wanted, settle=False)
            if self._taken:
                raise self.destination.exists(sorted(self._taken), len(wanted))
        for output in self.run.open(outputs):
            if output.path in self._done:
                self.run.placed(output, output.entry.size)
                self.run.settle(output)
        self.run.all(self._publish, outputs)

    def _look(self, output: Output) -> None:
        """See what is at an output's key; for crew threads."""
        key = self.keys[output.path]
        standing, _ = self.destination.look(key, self._metadata(output))
        with self._lock:
            if standing is Standing.FOREIGN:
                self._taken.append(key)
            elif standing is Standing.SAME:
                self._done.add(output.path)

    def _publish(self, output: Output) -> None:
        """Publish one output; for crew threads."""
        key, metadata = self.keys[output.path], self._metadata(output)
        with self.run.attempt(output) as halt:
            self.destination.write(
                key,
                metadata,
                lambda replace: self._put(output, key, metadata, halt, replace=replace),
            )
        self.run.placed(output, output.entry.size)

    def _put(
        self,
        output: Output,
        key: str,
        metadata: Mapping[str, str],
        halt: Cancellation,
        *,
        replace: bool,
    ) -> ObjectInfo:
        if self.store is not None:
            try:
                return self.destination.objects.copy(
                    self.store.object_of(output.entry.digest),
                    self.destination.bucket,
                    key,
                    overwrite=replace,
                    metadata=metadata,
                    content_type=_type_of(key),
                    cancellation=halt,
                    unfinished=self.run.unfinished(output),
                )
            except StoreAccessError:
                # Who may write there need not be allowed to read the store.
                self.store = None
        return self._send(output, key, metadata, halt, replace=replace)

    def _send(
        self,
        output: Output,
        key: str,
        metadata: Mapping[str, str],
        halt: Cancellation,
        *,
        replace: bool,
    ) -> ObjectInfo:
        return self.destination.objects.put_stream(
            self.destination.bucket,
            key,
            output.entry.size,
            InOrder(read_verified(output), output.entry.size).read,
            overwrite=replace,
            content_type=_type_of(key),
            metadata=metadata,
            cancellation=halt,
            progress=self.run.sent,
            unfinished=self.run.unfinished(output),
        )

    def _metadata(self, output: Output) -> dict[str, str]:
        return self.destination.metadata(**{HASH: output.entry.hash})


def _type_of(key: str) -> str:
    """Return the type that a name says, by the table that Python has and no host changes."""
    kind, coding = _TYPES.guess_type(key.rpartition("/")[2], strict=False)
    # Of what is compressed that would be the type of what is in it.
    return kind if kind and not coding else ""
