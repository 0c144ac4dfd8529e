"""The transfers of this host, for whoever looks at them, steers them or has something copied."""

from pathlib import Path

from agent_plugin.services import state_directory
from agent_plugin.settings import Settings
from agent_plugin.transfer.api import Session


def ledger_path(settings: Settings) -> Path:
    """Return where the ledger of this host is, whether it is there or not."""
    return settings.paths.state_dir / "ledger.db"


def open_session(settings: Settings) -> Session:
    """Return the transfers of this host, to be found and changed.

    Raises:
        LocalWriteError: The state directory can not be made, or others could write to it.
    """
    state_directory(settings)
    return Session(ledger_path(settings))
