"""Objects in archive classes, which nobody can read before they are restored.

A listing tells the class and not whether an object of it was restored, so each of these is looked
at by a request of its own. The first batch of which some can not be read ends it: a bucket may have
a million of them.
"""

from collections.abc import Sequence
from typing import Final

from agent_plugin.content.errors import ObjectArchivedError, ObjectRestoringError, StoreError
from agent_plugin.content.objects import ARCHIVED, ObjectInfo
from agent_plugin.content.s3_errors import RESTORE_HINT
from agent_plugin.content.s3_objects import S3Objects
from agent_plugin.content.store import Cancellation

_BATCH: Final = 512
_SHOWN: Final = 3


def refuse_archived(
    name: str,
    infos: Sequence[ObjectInfo],
    objects: S3Objects,
    cancellation: Cancellation | None = None,
) -> None:
    """See that every object can be read as it is.

    Args:
        name: What to call the source in messages.
        infos: As they were listed, or looked at.
        objects: How they are reached.
        cancellation: Checked while they are looked at.

    Raises:
        ObjectArchivedError: Some are in an archive class and were not restored; names them.
        ObjectRestoringError: All of those are being restored.
        ObjectNotFoundError: One is not there any more.
        StoreError: Any other that a request ended with.
        CancelledError: Cancellation was wished.
    """
    # What is empty is never asked for.
    doubtful = [info for info in infos if info.archive and info.size]
    for start in range(0, len(doubtful), _BATCH):
        batch = doubtful[start : start + _BATCH]
        looked_at = objects.look_again(batch, cancellation=cancellation)
        if unreadable := [info for info in looked_at if info.archive]:
            raise _refusal(name, unreadable, len(doubtful))


def _refusal(name: str, unreadable: Sequence[ObjectInfo], doubtful: int) -> StoreError:
    archived = [info for info in unreadable if info.archive == ARCHIVED]
    told = archived or unreadable
    more = doubtful - min(len(told), _SHOWN)
    shown = ", ".join(info.url for info in told[:_SHOWN])
    others = f", and {more} more may be so" if more else ""
    if archived:
        return ObjectArchivedError(
            f"{name}: in an archive class, so that nobody can read it:"
            f" {shown} ({told[0].storage_class}){others}",
            hint=RESTORE_HINT,
        )
    return ObjectRestoringError(
        f"{name}: still being restored from its archive class: {shown}{others}",
        hint="wait until that has ended (`aws s3api head-object` shows `Restore`), which takes"
        " minutes to two days, and start again",
    )
