"""Uploads in parts that the ledger remembers, so that one that was killed goes on."""

from collections.abc import Sequence

from agent_plugin.content.store import SentPart
from agent_plugin.transfer.ledger import Ledger


class TaskUpload:
    """What the ledger remembers of one task's upload; see UploadMemory of content/store.py."""

    def __init__(self, ledger: Ledger, task_id: int) -> None:
        self._ledger = ledger
        self._task_id = task_id

    def recall(self) -> tuple[str, Sequence[SentPart]]:
        """Return the upload's id and its parts, as they were written last."""
        return self._ledger.upload_of(self._task_id)

    def remember(self, upload_id: str, parts: Sequence[SentPart]) -> None:
        """Have them written at the next beat; that an upload has begun is written at once.

        A process that is killed before would leave an upload that nobody knows of.
        """
        self._ledger.note_upload(self._task_id, upload_id, parts)
        if upload_id and not parts:
            self._ledger.write_upload(self._task_id, upload_id)
