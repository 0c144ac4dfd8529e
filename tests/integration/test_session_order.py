"""Hooks in the wrong order, twice, at once, over a damaged state; and as commands."""

import fcntl
import json
import os
import pkgutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from agent_plugin.content import events
from agent_plugin.content.errors import (
    PropmasterError,
    SessionStateError,
    UnsafePathError,
)
from agent_plugin.session.inputs import hidden_root
from agent_plugin.session.roots import session_directory_name
from agent_plugin.session.state import locked_state
from tests.servers.hooks import action, step, task
from tests.servers.sessions import Sessions
from tests.servers.trees import files_below


def test_a_session_that_is_started_twice_is_as_if_it_was_started_once(
    any_sessions: Sessions,
) -> None:
    s = any_sessions
    job = s.submitted()
    root = s.started(job)
    (root / "tex/wood.tx").write_bytes(b"broken by a task")
    os.utime(root / "scene.usd", (5, 5))

    again = s.host.start(job, s.session_dir)

    assert files_below(root) == files_below(s.source)
    assert again.roots[0].bytes_fetched == 0


def test_a_session_that_is_ended_twice_has_ended(sessions: Sessions) -> None:
    sessions.started(sessions.submitted())

    assert len(sessions.host.end(sessions.session_dir).removed) == 1
    assert sessions.host.end(sessions.session_dir).removed == []


def test_a_session_that_never_started_can_be_ended(sessions: Sessions) -> None:
    assert sessions.host.end(sessions.tmp_path / "never").removed == []


def test_files_can_be_kept_at_the_end(sessions: Sessions) -> None:
    root = sessions.started(sessions.submitted())

    assert sessions.host.end(sessions.session_dir, keep_files=True).removed == []
    assert files_below(root) == files_below(sessions.source)
    assert sessions.host.read_state(sessions.session_dir) is None


def test_a_damaged_state_is_told_and_ending_the_session_clears_it(sessions: Sessions) -> None:
    job = sessions.submitted()
    sessions.started(job)
    [state] = (sessions.host.state_dir / "sessions").glob("*.json")
    for garbage in (b"", b"not JSON", b'{"version":1}', b"\xff\xfe", b"[" * 100_000):
        state.write_bytes(garbage)
        with pytest.raises(SessionStateError, match="can not be read"):
            sessions.finish()
    with pytest.raises(SessionStateError, match="can not be read"):
        sessions.host.end(sessions.session_dir)
    assert not state.exists()
    assert sessions.host.end(sessions.session_dir).removed == []
    sessions.started(job)
    assert sessions.finish().files == 0


def test_a_state_of_another_version_is_refused(sessions: Sessions) -> None:
    sessions.started(sessions.submitted())
    [state] = (sessions.host.state_dir / "sessions").glob("*.json")
    document = json.loads(state.read_bytes()) | {"version": 99}
    state.write_text(json.dumps(document))

    with pytest.raises(SessionStateError, match="is of version 99, this program writes 1"):
        sessions.finish()


def test_the_state_is_private_and_outside_of_the_session(sessions: Sessions) -> None:
    sessions.started(sessions.submitted())

    modes = {
        path.suffix: path.stat().st_mode & 0o777
        for path in (sessions.host.state_dir / "sessions").iterdir()
    }
    assert modes == {".json": 0o600, ".lock": 0o600}
    assert sessions.host.state_dir.stat().st_mode & 0o777 == 0o700


# ------------------------------------------------------------ planted by a job


def test_a_root_that_a_job_replaced_by_a_link_is_not_written_through(
    sessions: Sessions, expected_events: set[str]
) -> None:
    """A job may write in the session directory; hooks may run with more rights than it has."""
    expected_events.add(events.SESSION_START_FAILED)
    job = sessions.submitted(stepDependencies={step(2): [step(1)]})
    root = sessions.started(job)
    (root / "renders/x").write_bytes(b"1")
    sessions.finish()
    outside = sessions.tmp_path / "outside"
    outside.mkdir()
    root.rename(root.with_name("moved"))
    root.symlink_to(outside)

    for hook in (
        lambda: sessions.host.sync_step(sessions.session_dir, step(2)),
        lambda: sessions.finish(1),
        lambda: sessions.host.start(job, sessions.session_dir),
    ):
        with pytest.raises(PropmasterError) as caught:
            hook()
        assert caught.value.exit_code in (73, 76), caught.value.message
    assert list(outside.iterdir()) == []
    sessions.host.end(sessions.session_dir)
    assert outside.is_dir()


class Swapped:
    """A root that a job's process swaps for a link while a hook works, at a moment of its choice.

    Attributes:
        outside: Where the link leads: what hooks may read and write, and the job may not.
    """

    def __init__(self, sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
        self.outside = sessions.tmp_path / "outside"
        (self.outside / "renders").mkdir(parents=True)
        (self.outside / "renders/secret").write_bytes(b"of the host")
        self._monkeypatch = monkeypatch
        self._before = self._seen()

    def _seen(self) -> dict[str, int]:
        found = [self.outside, *self.outside.rglob("*")]
        return {os.fspath(path): path.stat().st_mtime_ns for path in found}

    @contextmanager
    def when(self, function: str, root: Path) -> Iterator[None]:
        """Swap when a function of the hook has been called, and see that the hook refuses that."""
        original = pkgutil.resolve_name(function)

        def swap(*args: Any, **options: Any) -> Any:
            result = original(*args, **options)
            # All that a generator yields, since it works while it is asked.
            result = list(result) if isinstance(result, Iterator) else result
            root.rename(root.with_name("moved"))
            root.symlink_to(self.outside)
            return result

        with self._monkeypatch.context() as patch:
            patch.setattr(function, swap)
            with pytest.raises(UnsafePathError, match=f"{root.name} is a symbolic link"):
                yield
        assert self._seen() == self._before


@pytest.fixture
def swapped(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> Swapped:
    return Swapped(sessions, monkeypatch)


@pytest.mark.parametrize("function", ["_holds_anything", "plan_download", "survey"])
def test_a_root_that_is_swapped_for_a_link_during_a_sync_is_not_written_through(
    sessions: Sessions, swapped: Swapped, function: str
) -> None:
    root = sessions.started(sessions.submitted())
    (root / "renders/secret").write_bytes(b"planted")
    sessions.finish(0)
    (root / "renders/secret").unlink()

    with swapped.when(f"agent_plugin.session.inputs.{function}", root):
        sessions.host.sync_step(sessions.session_dir, step(2), [step(1)])


@pytest.mark.parametrize("function", ["_clear", "plan_download", "survey"])
def test_a_hidden_root_that_is_swapped_for_a_link_is_not_written_through(
    sessions: Sessions, swapped: Swapped, expected_events: set[str], function: str
) -> None:
    expected_events.add(events.SESSION_START_FAILED)
    job = sessions.submitted()
    hidden = hidden_root(sessions.session_dir / session_directory_name(str(sessions.source)))
    hidden.mkdir(parents=True)
    (hidden / "scene.usd").write_bytes(b"of a killed start")

    with swapped.when(f"agent_plugin.session.inputs.{function}", hidden):
        sessions.host.start(job, sessions.session_dir)


@pytest.mark.parametrize("function", ["walk", "hash_files"])
def test_a_root_that_is_swapped_for_a_link_at_the_end_of_a_task_is_not_read_through(
    sessions: Sessions, swapped: Swapped, function: str
) -> None:
    root = sessions.started(sessions.submitted())
    (root / "renders/secret").write_bytes(b"by the job")

    with swapped.when(f"agent_plugin.session.finish_task.{function}", root):
        sessions.finish(0)

    assert sessions.outputs() == {}


def test_a_root_that_is_swapped_for_a_link_after_it_was_filled_is_not_read_through(
    sessions: Sessions, swapped: Swapped, expected_events: set[str]
) -> None:
    expected_events.add(events.SESSION_START_FAILED)
    job = sessions.submitted()
    root = sessions.session_dir / session_directory_name(str(sessions.source))

    with swapped.when("agent_plugin.session.bring.materialise", root):
        sessions.host.start(job, sessions.session_dir)


# ------------------------------------------------------------ as a command


def finish_arguments(session_dir: Path, number: int = 0) -> list[str]:
    return [
        "session", "finish-task", "--session-dir", str(session_dir), "--step-id", step(1),
        "--task-id", task(number), "--session-action-id", f"sessionaction-{'0' * 32}-{number}",
        "--json",
    ]  # fmt: skip


def test_the_commands_go_the_whole_way(any_sessions: Sessions) -> None:
    s = any_sessions
    job = s.submitted(stepDependencies={step(2): [step(1)]})
    at = ["--session-dir", str(s.session_dir)]

    started = s.host.run(*s.host.start_arguments(job, s.session_dir))
    assert started.returncode == 0, started.stderr
    printed = json.loads(started.stdout)
    assert set(printed) == {"roots", "pathMappingRules", "seconds", "sources"}
    root = Path(printed["roots"][0]["localRoot"])
    assert files_below(root) == files_below(s.source)
    (root / "renders/x").write_bytes(b"1")
    finished = s.host.run(*finish_arguments(s.session_dir))
    assert finished.returncode == 0, finished.stderr
    printed = json.loads(finished.stdout)
    assert set(printed) == {
        "manifests", "files", "bytesUploaded", "bytesReused", "deleted", "seconds",
        "results", "publishFailures", "publishExcluded",
    }  # fmt: skip
    assert (printed["files"], printed["bytesUploaded"]) == (1, 1)
    (root / "renders/x").unlink()
    synced = s.host.run("session", "sync-step", *at, "--step-id", step(2), "--json")
    assert synced.returncode == 0, synced.stderr
    assert (root / "renders/x").read_bytes() == b"1"
    ended = s.host.run("session", "end", *at, "--json")
    assert (ended.returncode, json.loads(ended.stdout)) == (0, {"removed": [str(root)]})


def test_a_task_that_finishes_before_the_start_is_refused_with_76(sessions: Sessions) -> None:
    sessions.session_dir.mkdir(parents=True)

    for arguments in (
        finish_arguments(sessions.session_dir),
        ["session", "sync-step", "--session-dir", str(sessions.session_dir), "--step-id", step(1)],
    ):
        done = sessions.host.run(*arguments)
        assert done.returncode == 76, done.stderr
        assert "error[session-state]: no session was started in" in done.stderr


def test_a_task_that_finishes_after_a_start_that_failed_is_refused_with_76(
    sessions: Sessions, expected_events: set[str]
) -> None:
    expected_events.add(events.SESSION_START_FAILED)
    job = sessions.submitted()
    for blob in (sessions.tmp_path / "store/Data").iterdir():
        blob.unlink()
    with pytest.raises(PropmasterError):
        sessions.host.start(job, sessions.session_dir)

    done = sessions.host.run(*finish_arguments(sessions.session_dir))

    assert done.returncode == 76
    assert "the start of the session" in done.stderr


def test_two_hooks_at_once_are_refused_with_76(sessions: Sessions) -> None:
    job = sessions.submitted()
    sessions.started(job)
    [lock] = (sessions.host.state_dir / "sessions").glob("*.lock")
    with lock.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for arguments in (
            finish_arguments(sessions.session_dir),
            sessions.host.start_arguments(job, sessions.session_dir),
            ["session", "end", "--session-dir", str(sessions.session_dir)],
        ):
            done = sessions.host.run(*arguments)
            assert done.returncode == 76, done.stderr
            assert "another command works on the session" in done.stderr

    assert sessions.host.run(*finish_arguments(sessions.session_dir)).returncode == 0


@pytest.mark.parametrize("removed", [False, True], ids=["lock stays", "lock removed by hand"])
def test_of_two_hooks_after_an_end_one_is_refused(tmp_path: Path, removed: bool) -> None:
    """The second has its lock, and nothing written yet, when the ending one lets go."""
    session_dir = tmp_path / "session"
    with ExitStack() as second:
        at_work = False
        with locked_state(tmp_path, session_dir) as ending:
            ending.remove()
            for lock in (tmp_path / "sessions").glob("*.lock") if removed else ():
                lock.unlink()
            with suppress(SessionStateError):
                second.enter_context(locked_state(tmp_path, session_dir))
                at_work = True
        if not at_work:
            second.enter_context(locked_state(tmp_path, session_dir))

        with (
            pytest.raises(SessionStateError, match="another command works on the session"),
            locked_state(tmp_path, session_dir),
        ):
            pass

    assert list((tmp_path / "sessions").iterdir()) == []


def test_a_job_document_that_is_not_there_is_told(sessions: Sessions) -> None:
    done = sessions.host.run(
        "session", "start", "--session-dir", str(sessions.session_dir), "--job", "/nowhere.json"
    )

    assert done.returncode == 66
    assert "/nowhere.json: there is no such file" in done.stderr


def test_a_command_for_a_session_that_never_was_leaves_nothing(sessions: Sessions) -> None:
    with pytest.raises(SessionStateError):
        sessions.host.finish_task(sessions.session_dir, action(1, 0))
    with pytest.raises(SessionStateError):
        sessions.host.sync_step(sessions.session_dir, step(1))

    assert list((sessions.host.state_dir / "sessions").iterdir()) == []


def test_only_roots_that_stood_are_said_to_be_removed(
    sessions: Sessions, expected_events: set[str]
) -> None:
    expected_events.add(events.SESSION_START_FAILED)
    job = sessions.submitted()
    manifests = sessions.tmp_path / "store/Manifests"
    manifests.rename(manifests.with_name("away"))
    with pytest.raises(PropmasterError):
        sessions.started(job)
    assert sessions.host.end(sessions.session_dir).removed == []

    manifests.with_name("away").rename(manifests)
    root = sessions.started(job)
    assert sessions.host.end(sessions.session_dir).removed == [str(root)]
    assert sessions.host.end(sessions.session_dir).removed == []
    assert list(sessions.session_dir.iterdir()) == [], "the directory itself is the agent's"
