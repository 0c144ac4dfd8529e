"""Outputs as one archive at one key, which somebody else has not taken.

The archive's hash is in its metadata, which S3 wants before the first part. So the archive is made
once to be measured and, unless it is small, once more while it is sent; nothing is at its key
before all of it was sent and was what had been measured.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from agent_plugin.content.objects import SHA256, ObjectInfo
from agent_plugin.publish.archive import CONTENT_TYPES, InOrder, Measured, archive, measure
from agent_plugin.publish.destination import Destination, Standing
from agent_plugin.publish.outputs import Output
from agent_plugin.publish.run import Run


@dataclass(slots=True)
class Packed:
    """The publishing of one task's outputs as an archive.

    Attributes:
        destination: Where to.
        run: The transfer.
        key: The archive's.
        encoding: `gzip` or `zstd`.
        zero_mtime: Whether the files in it have the time 0.
    """

    destination: Destination
    run: Run
    key: str
    encoding: str
    zero_mtime: bool
    _placed: int = 0

    def publish(self, outputs: Sequence[Output]) -> tuple[ObjectInfo, Measured] | None:
        """Publish the outputs, in their order; None if people have excluded all of them.

        What is in the archive is decided when it begins to be made: what people change of its
        tasks afterwards changes nothing.

        Raises:
            KeyExistsError: Somebody else has written the key.
            FileChangedError: An output is not what it was when it was stored.
            PropmasterError: Any other of the tree.
        """
        standing = Standing.NOTHING
        if not self.destination.overwrite:
            # Before the work, not instead of the condition: somebody may come first meanwhile.
            standing = self.run.alone(self._standing)
        if not (outputs := self.run.chosen(outputs)):
            return None
        measured = self.run.alone(lambda: measure(self._pieces(outputs)))
        metadata = self.destination.metadata(**{SHA256: measured.sha256})

        def put(replace: bool) -> ObjectInfo:
            return self._put(outputs, measured, metadata, replace=replace)

        def write() -> ObjectInfo:
            if standing is Standing.OWN:
                there, found = self.destination.look(self.key, metadata)
                if there is Standing.SAME and found is not None:
                    return found
            return self.destination.write(self.key, metadata, put)

        info = self.run.alone(write)
        self._count(outputs, measured.size, measured.size)
        for output in outputs:
            self.run.settle(output)
        return info, measured

    def _count(self, outputs: Sequence[Output], sent: int, size: int) -> None:
        """Count what is sent of the archive as the same share of the outputs."""
        placed = sum(output.entry.size for output in outputs) * sent // max(1, size)
        self.run.placed(outputs[0], placed - self._placed)
        self._placed = placed

    def _standing(self) -> Standing:
        """Return what is at the key, which nobody else may have written.

        Raises:
            KeyExistsError: Somebody has.
        """
        standing, _ = self.destination.look(self.key, self.destination.metadata())
        if standing is Standing.FOREIGN:
            raise self.destination.exists([self.key], 1)
        return Standing.OWN if standing is Standing.SAME else standing

    def _put(
        self,
        outputs: Sequence[Output],
        measured: Measured,
        metadata: Mapping[str, str],
        *,
        replace: bool,
    ) -> ObjectInfo:
        """Send the archive, which is made once more if it was too large to be kept."""
        data = measured.data
        sent = 0

        def told(size: int) -> None:
            nonlocal sent
            sent += size
            self.run.sent(size)
            self._count(outputs, sent, measured.size)

        pieces = self._pieces(outputs) if data is None else iter([data])
        return self.destination.objects.put_stream(
            self.destination.bucket,
            self.key,
            measured.size,
            InOrder(pieces, measured.size, measured.sha256).read,
            overwrite=replace,
            content_type=CONTENT_TYPES[self.encoding],
            metadata=metadata,
            cancellation=self.run.halt,
            progress=told,
            # The first of them stands for the archive.
            unfinished=self.run.unfinished(outputs[0]),
        )

    def _pieces(self, outputs: Sequence[Output]) -> Iterator[bytes]:
        return archive(
            outputs, self.encoding, zero_mtime=self.zero_mtime, cancellation=self.run.halt
        )
