"""The mounts of this host as its settings have them, for whoever makes and ends some."""

import os
from functools import partial
from pathlib import Path

from agent_plugin.services import scope_of, state_directory, store_limits
from agent_plugin.session.mount_request import CachePlace, SpoolPlace
from agent_plugin.session.mounts import Mounts
from agent_plugin.session_logs import log_place
from agent_plugin.settings import Settings


def open_mounts(
    settings: Settings,
    *,
    queue_id: str = "",
    user_id: int | None = None,
    verify: str | None = None,
    xattrs: bool = False,
    transport: str | None = None,
) -> Mounts:
    """Return the mounts of this host.

    Args:
        settings: The host's.
        queue_id: Whose settings hold for what is mounted; empty for none.
        user_id: For which job user, who has nothing to do with the mounts of others; None for this
            process's user, who has to do with all.
        verify: `stream` or `strict`; None for what the settings say.
        xattrs: Have extended attributes below overlayfs, whatever the settings say.
        transport: `auto`, `fusepy` or `kernel`; None for what the settings say.

    Raises:
        LocalWriteError: The state directory can not be made, or others could write to it.
    """
    settings = settings.for_queue(queue_id)
    directory = settings.paths.cache_dir
    cache = CachePlace(
        directory,
        max_bytes=settings.cache.max_bytes_on(directory),
        min_free_bytes=settings.cache.min_free_bytes_on(directory),
        shared=settings.cache.shared_between_stores,
        scope=scope_of(settings, queue_id, user_id),
    )
    strict = (verify or settings.mounts.verify) == "strict"
    return Mounts(
        state_directory(settings),
        cache,
        strict=strict,
        xattrs=xattrs or settings.mounts.xattrs,
        store_limits=store_limits(settings, queue_id),
        transport=transport or settings.mounts.transport,
        passthrough=settings.mounts.passthrough,
        log_place=partial(log_place, settings),
        user_id=None if user_id == os.geteuid() else user_id,
        spool_on=partial(_spool_on, settings),
    )


def _spool_on(settings: Settings, directory: Path) -> SpoolPlace:
    return SpoolPlace(
        settings.mounts.source_bytes.on(directory), settings.cache.min_free_bytes_on(directory)
    )


def path_of_mount(named: Path) -> Path:
    """Return the path by which the kernel's table knows a mount point.

    Its last component is not looked at, since its server may hang; links above it are followed.
    """
    if named.name in ("", ".."):
        return Path(os.path.realpath(named))
    return Path(os.path.realpath(named.parent), named.name)
