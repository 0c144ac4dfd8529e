"""The transfers of this host, for whoever looks at them, steers them or has something copied."""

import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from agent_plugin.content import events
from agent_plugin.content.errors import PropmasterError
from agent_plugin.content.store import Cancellation
from agent_plugin.services import OpenObjects, open_copying, state_directory, store_limits
from agent_plugin.settings import Settings
from agent_plugin.transfer.api import Session
from agent_plugin.transfer.copy_queue import CopyQueue
from agent_plugin.transfer.ledger import Ledger, TaskSpec

if TYPE_CHECKING:
    from agent_plugin.transfer.copying import CopyResult, Left

# Whoever aborts something is not to wait for long for a server that does not answer.
CLEAR_SECONDS: Final = 5.0

log = events.get_logger()


def ledger_path(settings: Settings) -> Path:
    """Return where the ledger of this host is, whether it is there or not."""
    return settings.paths.state_dir / "ledger.db"


def open_session(
    settings: Settings,
    *,
    cancellation: Cancellation | None = None,
    environment: Mapping[str, str] = os.environ,
    clears: bool = True,
) -> Session:
    """Return the transfers of this host, to be found, made and changed.

    Args:
        settings: The host's.
        cancellation: Ends the look at what is to be copied.
        environment: Where credentials and endpoints come from.
        clears: Whether what is half-written is removed as soon as somebody says that nobody is to
            go on with it; takes CLEAR_SECONDS at most, and what stays is told in the log.

    Raises:
        LocalWriteError: The state directory can not be made, or others could write to it.
    """
    state_directory(settings)
    wish = cancellation or Cancellation()

    def expand(wanted: Iterable[TaskSpec], told: Mapping[str, Any]) -> Iterable[TaskSpec]:
        # Loaded here: most commands copy nothing, and need no S3 client.
        from agent_plugin.transfer.copy_places import plan_copies  # noqa: PLC0415
        from agent_plugin.transfer.copy_settings import CopySettings  # noqa: PLC0415

        objects = OpenObjects(store_limits(settings), environment)
        return plan_copies(wanted, CopySettings.read(told), objects, wish)

    def clear(transfer: int) -> None:
        try:
            clear_copies(settings, [transfer], environment=environment)
        except PropmasterError as error:
            # The change holds nevertheless.
            extra = {"object": f"transfer {transfer}", "reason": error.message}
            log.warning(events.UPLOAD_LEFT, extra=extra)

    if not clears:
        return Session(ledger_path(settings), expand=expand)
    return Session(ledger_path(settings), expand=expand, clear=clear)


def run_copies(
    settings: Settings,
    *,
    cancellation: Cancellation,
    only: Collection[int] | None = None,
    told: Callable[[int], None] = lambda _bytes: None,
) -> "CopyResult":
    """Carry out the copies that wait, or some of them; see Copying.run."""
    state_directory(settings)
    with Ledger.open(ledger_path(settings)) as ledger:
        # On a host that runs no sessions nobody else does.
        ledger.housekeep()
        return open_copying(settings, ledger, cancellation=cancellation, only=only, told=told).run()


def clear_copies(
    settings: Settings, transfers: Collection[int], *, environment: Mapping[str, str] = os.environ
) -> "list[Left]":
    """Remove what copies have left that nobody goes on with: aborted ones, excluded tasks.

    Of a transfer that a process carries out that process removes it. Takes CLEAR_SECONDS at most.

    Args:
        settings: The host's.
        transfers: The transfers that are meant.
        environment: Where credentials and endpoints come from.

    Returns:
        What could not be removed, and is by the next run.
    """
    with Ledger.open(ledger_path(settings)) as ledger:
        # Loaded only for those few: it takes longer than most commands.
        if not CopyQueue(ledger.file, time.time, transfers).leftovers():
            return []
        copying = open_copying(
            settings, ledger, cancellation=Cancellation(), only=transfers, environment=environment
        )
        return copying.clear(CLEAR_SECONDS)
