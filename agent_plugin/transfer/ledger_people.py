"""What people want of the ledger: to make transfers, steer them and put them away.

May be used from any process, whoever carries a transfer out.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from agent_plugin.content.errors import TransferStateError
from agent_plugin.content.store import Cancellation
from agent_plugin.transfer.ledger_archive import Archive
from agent_plugin.transfer.ledger_control import ByHand, Redirect
from agent_plugin.transfer.ledger_create import Duplicates, New
from agent_plugin.transfer.ledger_file import LedgerFile
from agent_plugin.transfer.ledger_rows import (
    TRANSFER_COLUMNS,
    TaskRow,
    TaskSpec,
    TransferRow,
    TransferSpec,
    to_json,
    transfer_row,
)
from agent_plugin.transfer.states import DEFAULT_PRIORITY, TransferStatus


class PeoplesLedger:
    """The part of the ledger that is for people; Ledger adds what an engine needs.

    Args:
        path: The file; its directory exists and is private to this user.
        clock: Seconds since the epoch.
    """

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self._file = LedgerFile(path, clock)
        self._clock = clock
        self._archive = Archive(self._file, path, clock)
        self._by_hand = ByHand(self._file, clock, self._archive.restore)
        self._new = New(self._file, clock, self._archive.restore)

    @property
    def file(self) -> LedgerFile:
        """The file, for what works on it in transactions of its own."""
        return self._file

    def transfer(self, transfer_id: int) -> TransferRow:
        """Return one transfer.

        Raises:
            TransferStateError: There is none of that id.
        """
        with self._file.read() as connection:
            row = connection.execute(
                f"SELECT {TRANSFER_COLUMNS} FROM transfer WHERE id = ?",  # noqa: S608 - constant
                (transfer_id,),
            ).fetchone()
        if row is None:
            raise TransferStateError(f"there is no transfer {transfer_id}")
        return transfer_row(row)

    def create(
        self,
        spec: TransferSpec,
        tasks: Iterable[TaskSpec],
        *,
        status: TransferStatus = TransferStatus.WAITING,
        priority: int | str = DEFAULT_PRIORITY,
        required: bool = False,
        settings: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        modifier: str = "",
        cancellation: Cancellation | None = None,
    ) -> TransferRow:
        """Make a transfer that nobody carries out yet.

        Args:
            spec: What it is to do; without a destination it is pending.
            tasks: Its tasks; a pair of source and destination counts once.
            status: What it is when it is complete: waiting, pending or paused.
            priority: 0 to 1000, or high, medium, low.
            required: Whether a session action waits for it.
            settings: As in TransferRow; what JSON can hold.
            metadata: Likewise.
            modifier: `uid:name` of who makes it.
            cancellation: Checked while the tasks are written; what is there then stays `init`.

        Raises:
            TransferStateError: It can not be made in that state.
            JobInvalidError: The priority is none.
            CancelledError: Cancellation was wished.
            NoSpaceError, LocalWriteError: The ledger can not be written.
        """
        transfer_id = self._new.create(
            spec,
            tasks,
            status=status,
            priority=priority,
            required=required,
            settings=settings or {},
            metadata=metadata or {},
            modifier=modifier,
            cancellation=cancellation or Cancellation(),
        )
        return self.transfer(transfer_id)

    def add_tasks(
        self,
        transfer_id: int,
        tasks: Iterable[TaskSpec],
        *,
        duplicates: Duplicates = "retry",
        modifier: str = "",
    ) -> list[int]:
        """Add tasks to a transfer, all or none; one that had ended is waiting afterwards.

        Args:
            transfer_id: Not of a session action, whose tasks follow from its job: of these only
                tasks that are there can be given, to try them again.
            tasks: To add.
            duplicates: What becomes of a task whose source and destination are there already:
                `retry` queues it again, `replace` gives it the new size and metadata as well,
                `reject` refuses all. One that is under way is never touched.
            modifier: `uid:name` of who adds them.

        Returns:
            The ids of the tasks, in order.

        Raises:
            TransferStateError: There is no such transfer, it is still being made, or there is a
                duplicate that is to be rejected.
            JobInvalidError: It is a session action's, and a task is new.
            NoSpaceError, LocalWriteError: The ledger can not be written.
        """
        return self._new.add_tasks(transfer_id, tasks, duplicates=duplicates, modifier=modifier)

    def set_transfer(
        self,
        transfer_id: int,
        *,
        status: TransferStatus | None = None,
        priority: int | str | None = None,
        metadata: Mapping[str, Any] | None = None,
        destination: str | None = None,
        redirect: Redirect | None = None,
        tasks: Collection[TaskSpec] = (),
        modifier: str = "",
    ) -> TransferRow:
        """Change a transfer by hand, all or nothing; its engine obeys within a second.

        Args:
            transfer_id: The transfer.
            status: One of SETTABLE_TRANSFER. `waiting` resumes or, after the end, tries again what
                failed; `paused` holds it; `aborted` stops it; `done` excludes what is left;
                `pending` waits for a destination and, after the end, has all of it sent again.
            priority: 0 to 1000, or high, medium, low.
            metadata: In place of what it had.
            destination: Of a copy that is pending, or becomes so by this.
            redirect: Where a task that is not done goes then, by its source and its destination.
            tasks: New ones, with a destination, for a transfer that had none.
            modifier: `uid:name` of who does it.

        Raises:
            TransferStateError: There is none of that id, or its state does not allow it; naming the
                current state, the wanted one and those allowed.
            ReadOnlyAttributeError: The destination, of one that is not pending, or no copy.
            JobInvalidError: The priority is none, or `redirect` refuses.
            NoSpaceError, LocalWriteError: The ledger can not be written.
        """
        self._by_hand.set_transfer(
            transfer_id,
            status=status,
            priority=priority,
            metadata=metadata,
            destination=destination,
            redirect=redirect,
            tasks=tasks,
            modifier=modifier,
        )
        return self.transfer(transfer_id)

    def set_tasks(
        self, transfer_id: int, changes: Mapping[int, Mapping[str, Any]], modifier: str = ""
    ) -> TransferRow:
        """Change tasks of a transfer by hand, all or nothing; its engine obeys within a second.

        Args:
            transfer_id: The transfer.
            changes: For each task's id the attributes to change: `status` (one of SETTABLE_TASK),
                `priority`, `metadata`.
            modifier: `uid:name` of who does it.

        Raises:
            TransferStateError: There is no such transfer or task, or a state does not allow it.
            ReadOnlyAttributeError: Another attribute.
            JobInvalidError: A priority is none.
            NoSpaceError, LocalWriteError: The ledger can not be written.
        """
        self._by_hand.set_tasks(transfer_id, changes, modifier)
        return self.transfer(transfer_id)

    def packed_tasks(self, row: TransferRow) -> list[TaskRow]:
        """Return the tasks of a transfer that have left the ledger."""
        return self._archive.tasks(row)

    def archive(self, transfer_id: int) -> None:
        """Put a transfer that has ended into the archive, with its tasks; they are never deleted.

        Raises:
            TransferStateError: There is none of that id, or it has not ended.
            NoSpaceError, LocalWriteError: Ledger or archive can not be written.
        """
        self._archive.archive(transfer_id)

    def housekeep(self) -> None:
        """Put away what is old, and take back what dead engines had.

        The tasks of transfers that were done a day ago are packed, and transfers that ended two
        weeks ago leave for the archive, so that the file does not grow for ever.

        Raises:
            NoSpaceError, LocalWriteError: Ledger or archive can not be written.
        """
        self._archive.housekeep()

    def add_result(
        self,
        transfer_id: int,
        spec: Mapping[str, Any],
        *,
        job: str = "",
        step: str = "",
        task: str = "",
    ) -> None:
        """Remember where a transfer has published something, once for each place.

        A task that has published the same to the same place before has it there only once.

        Raises:
            NoSpaceError, LocalWriteError: The ledger can not be written.
        """
        what = (job, step, task, to_json(spec))
        with self._file.write() as connection:
            connection.execute(
                "DELETE FROM result WHERE job = ? AND step = ? AND task = ? AND spec = ?", what
            )
            connection.execute(
                "INSERT INTO result (transfer, job, step, task, spec, created)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (transfer_id, *what, self._clock()),
            )
