"""Which errno a reader of a mount sees for which failure."""

import errno

from agent_plugin.content import events
from agent_plugin.content.errors import CancelledError, PropmasterError

log = events.get_logger()


def errno_of(error: BaseException) -> int:
    """Return a positive errno of the operating system for whatever was raised."""
    if isinstance(error, CancelledError):
        return errno.EINTR
    if isinstance(error, PropmasterError):
        # A byte that can not be had is an error of input and output, whatever the reason.
        return errno.EIO
    if isinstance(error, OSError) and error.errno and error.errno > 0:
        return error.errno
    log.error(events.MOUNT_REQUEST_CRASHED, exc_info=error)
    return errno.EIO
