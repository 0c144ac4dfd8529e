"""The mounts of this host, for the commands that make and end some."""

from agent_plugin.services import state_directory
from agent_plugin.session.mounts import CachePlace, Mounts
from agent_plugin.settings import Settings


def open_mounts(settings: Settings) -> Mounts:
    """Return the mounts of this host.

    Raises:
        LocalWriteError: The state directory can not be made, or others could write to it.
    """
    directory = settings.paths.cache_dir
    cache = CachePlace(
        directory,
        max_bytes=settings.cache.max_bytes_on(directory),
        min_free_bytes=settings.cache.min_free_bytes_on(directory),
        shared=settings.cache.shared_between_stores,
    )
    return Mounts(state_directory(settings), cache)
