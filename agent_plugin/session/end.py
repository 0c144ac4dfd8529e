"""Session end: nothing of the session stays on the host but what it put into the cache.

The local roots go first, and the state alone says where they are: a full disk, a damaged ledger and
an unsafe cache are when a session most needs to be ended. Then the host's records are told, each as
far as it can be; what they keep of the session expires by itself. The state goes last, so that an
end that failed can be tried again.
"""

import os
from collections.abc import Callable, Container, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import msgspec

from agent_plugin.content import events
from agent_plugin.content.errors import PropmasterError, SessionStateError, local_write_error
from agent_plugin.content.leftovers import remove_tree
from agent_plugin.session.inputs import hidden_root
from agent_plugin.session.mounts import Mounts
from agent_plugin.session.source_place import names_above, way_to
from agent_plugin.session.state import VIRTUAL, SessionState, StateFile, session_id
from agent_plugin.session.virtual import work_dir_name
from agent_plugin.transfer.context import Records

log = events.get_logger()


class EndResult(msgspec.Struct, rename="camel"):
    """What end did: the local roots that were removed."""

    removed: list[str]


def end(
    session_dir: Path,
    records: Records,
    state_file: StateFile,
    *,
    mounts: Mounts,
    publications: Callable[[SessionState], object] = lambda _state: None,
    keep_files: bool = False,
) -> EndResult:
    """End a session; ending one that has ended, or never started, does nothing.

    Local roots inside the session directory are removed; a root that the queue's rules mapped
    elsewhere is the host's own directory and stays as it is. A link in a root's place is removed,
    and what it leads to is not touched. Mounted roots are unmounted, whoever is still in them; with
    `keep_files` what was written to them stays beside them.

    Args:
        session_dir: The session's.
        records: The host's.
        state_file: Of the session.
        mounts: The host's.
        publications: Ends those of the session, before its files go; a failure holds up nothing.
        keep_files: Whether the local roots stay.

    Raises:
        PropmasterError: A root could not be unmounted or removed; the others are, and end can be
            tried again.
        SessionStateError: The state file is damaged; files stay, the state is forgotten.
    """
    key = session_id(session_dir)
    try:
        state = state_file.read()
    except SessionStateError:
        _forget(key, "", records, state_file)
        raise
    removed = []
    if state is not None:
        try:
            publications(state)
        except PropmasterError as error:
            extra = {"session": key, "code": error.code, "reason": error.message}
            log.warning(events.PUBLICATIONS_LEFT, extra=extra)
        stuck = _unmount_roots(state, mounts)
        if not keep_files:
            removed = _remove_roots(session_dir, state, but=stuck)
        if stuck:
            raise next(iter(stuck.values()))
    _forget(key, state.job.store_url if state else "", records, state_file)
    log.info(events.SESSION_ENDED, extra={"session": key, "removed": len(removed)})
    return EndResult(removed)


def _unmount_roots(state: SessionState, mounts: Mounts) -> dict[str, PropmasterError]:
    """End the mounts of a session; return why, by their local roots, those that stay do so."""
    stuck: dict[str, PropmasterError] = {}
    for root in state.roots:
        local = Path(root.local_root)
        # A start that failed or was killed has mounted roots that the state calls copied.
        if root.file_system != VIRTUAL and not mounts.knows(local):
            continue
        try:
            ended = mounts.end(local)
        except PropmasterError as error:
            stuck[root.local_root] = error
            continue
        if ended is not None and ended.holders:
            extra = {"mountpoint": root.local_root, "holders": ended.holders}
            log.warning(events.MOUNT_BUSY, extra=extra)
    return stuck


def _remove_roots(session_dir: Path, state: SessionState, *, but: Container[str]) -> list[str]:
    inside = os.path.realpath(session_dir)
    removed = []
    failures: list[tuple[OSError, str]] = []
    for root in state.roots:
        local = Path(root.local_root)
        if root.local_root in but or not state.owns(root):
            continue
        if root.source is not None and not root.snapshot:
            # Nothing of it was ever brought: what is there is the job's.
            continue
        stood = os.path.lexists(local) or os.path.lexists(hidden_root(local))
        try:
            above = names_above(root, state)
            _remove(inside, above, local.name, hidden_root(local).name, work_dir_name(local))
            if stood:
                removed.append(root.local_root)
        except OSError as error:
            failures.append((error, os.fspath(Path(inside, error.filename or ""))))
    if failures:
        # Of the files of a large root the first that stays tells as much as all of them.
        failure, path = failures[0]
        raise local_write_error(failure, path) from failure
    return removed


def _remove(directory: str, above: Sequence[str], *names: str) -> None:
    """Remove what has these names in a directory, and directories on the way if they are empty.

    Args:
        directory: The session's.
        above: The names of the directories below it, on the way to what is removed.
        names: What to remove.

    Raises:
        OSError: Something can not be removed.
    """
    with ExitStack() as opened:
        try:
            fds = opened.enter_context(way_to(directory, above))
        except (FileNotFoundError, NotADirectoryError):
            # What a job has put there instead of a directory is the job's.
            return
        for name in names:
            remove_tree(fds[-1], name)
        for name, fd in zip(reversed(above), reversed(fds[:-1]), strict=True):
            # What else is there is the job's.
            with suppress(OSError):
                os.rmdir(name, dir_fd=fd)


def _forget(key: str, store_url: str, records: Records, state_file: StateFile) -> None:
    try:
        cache = records.open_cache(store_url)
        if cache is not None:
            with closing(cache):
                cache.release_lease(key)
    except PropmasterError as error:
        log.warning(events.CACHE_BYPASSED, extra={"reason": error.message})
    try:
        with records.open_ledger() as ledger:
            ledger.forget_session(key)
    except PropmasterError as error:
        log.warning(events.LEDGER_UNAVAILABLE, extra={"reason": error.message})
    with closing(records.open_index()) as index:
        index.expire()
    try:
        state_file.remove()
    except OSError as error:
        raise local_write_error(error, f"the state of session {key}") from error
