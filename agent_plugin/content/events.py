"""The names of all log events, and how they are written: one JSON object a line, on stderr.

An event's name is `noun.past_participle`. Which names and fields are stable is in
docs/LOG_EVENTS.md; a test compares. Why the standard library and not structlog: importing it cost
140 of the 300 ms a finish-task may take (docs/decisions/0003-logging.md).
"""

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final, TextIO

SESSION_STARTED: Final = "session.started"
SESSION_START_FAILED: Final = "session.start_failed"
SESSION_ENDED: Final = "session.ended"
ROOT_NESTED: Final = "root.nested"
SOURCE_RESOLVED: Final = "source.resolved"
SOURCE_SKIPPED: Final = "source.skipped"
STEP_SYNCED: Final = "step.synced"
TASK_BEGUN: Final = "task.begun"
TASK_FINISHED: Final = "task.finished"
OUTPUTS_SYNCED: Final = "outputs.synced"
TRANSFER_COMPLETED: Final = "transfer.completed"
TRANSFER_HELD: Final = "transfer.held"
TRANSFER_CONTINUED: Final = "transfer.continued"
COPIES_COMPLETED: Final = "copies.completed"
TRANSFER_RESUMED: Final = "transfer.resumed"
REQUEST_RETRIED: Final = "request.retried"
STORE_THROTTLED: Final = "store.throttled"
LIMIT_NOT_SHARED: Final = "store.limit_not_shared"
CACHE_QUARANTINED: Final = "cache.blob_quarantined"
CACHE_BYPASSED: Final = "cache.bypassed"
CACHE_COLLECTED: Final = "cache.collected"
INDEX_QUARANTINED: Final = "index.quarantined"
INDEX_DISABLED: Final = "index.disabled"
LEDGER_BUSY: Final = "ledger.busy"
LEDGER_MIGRATED: Final = "ledger.migrated"
LEDGER_QUARANTINED: Final = "ledger.quarantined"
LEDGER_UNAVAILABLE: Final = "ledger.unavailable"
UPLOAD_RESUMED: Final = "upload.resumed"
UPLOAD_LEFT: Final = "upload.left_behind"
PUBLISH_COMPLETED: Final = "publish.completed"
PUBLISH_FAILED: Final = "publish.failed"
PUBLICATIONS_LEFT: Final = "publications.left"
RESULTS_NOT_KEPT: Final = "results.not_kept"
RESULTS_SKIPPED: Final = "results.skipped"
FILE_SKIPPED: Final = "file.skipped"
FILE_REREAD: Final = "file.reread"
LOG_UNAVAILABLE: Final = "log.unavailable"
LOG_COLLECTED: Final = "log.collected"
OWNER_UNKNOWN: Final = "store.owner_unknown"
MOUNT_READ_FAILED: Final = "mount.read_failed"
MOUNT_CHANGE_DROPPED: Final = "mount.change_dropped"
MOUNT_REQUEST_CRASHED: Final = "mount.request_crashed"
MOUNT_READ_AHEAD_KEPT: Final = "mount.read_ahead_kept"
MOUNT_PASSTHROUGH: Final = "mount.passthrough"
MOUNT_PASSTHROUGH_REFUSED: Final = "mount.passthrough_refused"
MOUNT_BUSY: Final = "mount.busy"
MOUNT_STALE_LEFT: Final = "mount.stale_left"
MOUNT_STARTED: Final = "mount.started"
MOUNT_ENDED: Final = "mount.ended"
MOUNT_FELL_BACK: Final = "mount.fell_back"
MOUNT_SERVER_DIED: Final = "mount.server_died"
MOUNT_REMADE: Final = "mount.remade"
SERVICE_STARTED: Final = "service.started"
SERVICE_ENDED: Final = "service.ended"
CALL_FINISHED: Final = "call.finished"
CALL_REFUSED: Final = "call.refused"
SWEEP_FAILED: Final = "sweep.failed"

COMMAND_CRASHED: Final = "command.crashed"

LOGGER_NAME: Final = "propmaster"

_RESERVED = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return an event as docs/LOG_EVENTS.md has it."""
        document: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        document.update(fields_of(record))
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        # Names from the operating system may hold lone surrogates; ASCII escapes them all.
        return json.dumps(document, default=str, ensure_ascii=True)


def fields_of(record: logging.LogRecord) -> Mapping[str, object]:
    """Return the fields that the event was logged with."""
    return {key: value for key, value in record.__dict__.items() if key not in _RESERVED}


def get_logger() -> logging.Logger:
    """Return the one logger: `log.info(EVENT, extra={"field": value})`."""
    return logging.getLogger(LOGGER_NAME)


def configure(*, level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Write events of at least `level` to `stream` (stderr), one JSON object a line."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    logger = get_logger()
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
