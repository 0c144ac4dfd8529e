"""The part of a source that one task takes, out of the snapshot of all parts.

Nothing is asked of a server: which object is in which part is told by its key.
"""

from agent_plugin.content.errors import SourceEmptyError, SourceInvalidError
from agent_plugin.content.object_snapshot import ObjectSnapshot
from agent_plugin.sources.mapping import prefix_of
from agent_plugin.sources.partition import Share
from agent_plugin.sources.spec import InputSource


def share_of(source: InputSource, index: int | None = None) -> Share:
    """Return what decides which objects of a source are taken.

    Args:
        source: The source.
        index: Which part, from 0; None for what the source itself says.

    Raises:
        SourceInvalidError: There is no such part.
    """
    prefix = source.key if source.is_single else prefix_of(source.key)
    return Share(source.partition, prefix, index)


def part_of(source: InputSource, snapshot: ObjectSnapshot, index: int) -> ObjectSnapshot:
    """Return the objects of one part, of the snapshot that has those of all.

    Raises:
        SourceEmptyError: The part has none, and the source does not allow that.
        SourceInvalidError: There is no such part, or the partition's pattern takes too long.
    """
    share = share_of(source, index)
    entries = [entry for entry in snapshot.entries if share.has(entry.key)]
    if not entries and source.on_empty == "error":
        raise SourceEmptyError(
            f"{source.name}: part {index} of {share.count} has none of {len(snapshot)} objects",
            hint="take fewer parts, or say OnEmpty: ok if that is fine",
        )
    return ObjectSnapshot(snapshot.access, snapshot.bucket, entries)


def index_of(source: InputSource, value: str) -> int:
    """Return the part that a task parameter says.

    Args:
        source: Has an `index_parameter`.
        value: Of the task parameter, as a runtime writes an INT.

    Raises:
        SourceInvalidError: It is no number, or there is no such part.
    """
    name = source.index_parameter
    try:
        # What a runtime writes is ASCII; int() takes underscores, blanks and other digits as well.
        index = int(value) if value.isascii() and value.removeprefix("-").isdigit() else None
    except ValueError:
        # More digits than Python converts.
        index = None
    if index is None:
        raise SourceInvalidError(
            f"task parameter {name}: {value[:100]!r} is no whole number, and says no part of"
            f" {source.name}",
            hint=f"IndexParameter of a Partition names a task parameter of type INT, and {name} is"
            " not of it",
        )
    try:
        share_of(source, index)
    except SourceInvalidError as error:
        raise SourceInvalidError(
            f"task parameter {name}: {error.message.removeprefix('Partition: ')} of {source.name}",
            hint=error.hint,
        ) from error
    return index
