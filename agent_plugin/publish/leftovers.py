"""Uploads in parts that killed publications have left in their buckets.

Nobody goes on with one: a publication that is run again makes its upload anew. So whoever publishes
next on this host from the same store aborts what is left, and so does the end of the session.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import msgspec

from agent_plugin.content import events
from agent_plugin.content.errors import CancelledError, PropmasterError
from agent_plugin.content.objects import ObjectAccess, split_url
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.ledger_rows import DeadUpload

KIND: Final = "publish"

log = events.get_logger()


def access_document(access: ObjectAccess) -> Mapping[str, Any]:
    """Return what the ledger is to know of how a destination is reached; no secret."""
    document: dict[str, Any] = msgspec.to_builtins(access)
    return {name: value for name, value in document.items() if value}


def abort_left(context: TransferContext, *, source: str = "", session: str = "") -> int:
    """Abort the uploads of publications that no living process carries out; return how many.

    What can not be aborted is logged, and left to a lifecycle rule: nothing that publishes depends
    on it.

    Args:
        context: The services.
        source: Of publications from this store,
        session: or of those of this session.

    Raises:
        CancelledError: On request.
    """
    try:
        left = context.ledger.dead_uploads(KIND, source=source, session=session)
    except CancelledError:
        raise
    except PropmasterError as error:
        log.warning(events.LEDGER_UNAVAILABLE, extra={"reason": error.message})
        return 0
    # A server that does not answer takes a while for each, which nobody has to wait for.
    asked = [context.lanes.submit(partial(_abort, context, upload)) for upload in left]
    for upload, future in zip(left, asked, strict=True):
        try:
            context.lanes.result(future, context.cancellation)
        except CancelledError:
            raise
        except (PropmasterError, msgspec.ValidationError) as error:
            # People may have given the task other metadata, which make no sense here.
            extra = {"object": upload.destination, "reason": str(error)}
            log.warning(events.UPLOAD_LEFT, extra=extra)
        context.ledger.note_upload(upload.task, "", ())
    return len(left)


def _abort(context: TransferContext, upload: DeadUpload) -> None:
    bucket, _ = split_url(upload.transfer_destination)
    objects = context.open_objects(msgspec.convert(upload.metadata, ObjectAccess))
    objects.abort(bucket, upload.destination, upload.upload_id)
