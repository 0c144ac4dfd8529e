"""What is noted of mounts, where processes of others keep it or are at it."""

import threading
from pathlib import Path

import pytest

from agent_plugin.content import events
from agent_plugin.content.errors import CancelledError, LocalWriteError, SessionStateError
from agent_plugin.content.manifest import FileEntry, Manifest
from agent_plugin.content.store import Cancellation
from agent_plugin.session import mounts as mounts_module
from agent_plugin.session.mount_request import CachePlace, MountRequest
from agent_plugin.session.mounts import Mounts
from agent_plugin.transfer.ledger import lease_owner
from tests.servers.lock_keeper import kept_locked
from tests.servers.promptness import STOP_SECONDS

# It lives as long as any.
INIT = 1


@pytest.fixture
def state(tmp_path: Path) -> Path:
    state = tmp_path / "state"
    (state / "mounts").mkdir(parents=True)
    return state


@pytest.fixture
def mounts(state: Path, tmp_path: Path) -> Mounts:
    cache = CachePlace(tmp_path / "cache", max_bytes=1 << 30, min_free_bytes=0, shared=False)
    return Mounts(state, cache)


def request(mountpoint: Path) -> MountRequest:
    return MountRequest(
        manifest=Manifest.of([FileEntry("0" * 32, 0, "a", 1)]),
        mountpoint=mountpoint,
        work_dir=mountpoint.with_name("work"),
        store_url="file:///nowhere",
        account_id="",
        writes="none",
        uid=0,
        gid=0,
    )


def test_who_mounts_is_told_who_keeps_others_from_it(
    state: Path, mounts: Mounts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to wait for ever."""
    monkeypatch.setattr(mounts_module, "LOCK_SECONDS", 0.1)
    with kept_locked(state / "mounts") as pid, pytest.raises(LocalWriteError) as told:
        mounts.start(request(tmp_path / "at"), cancellation=Cancellation())
    assert f"{state}/mounts locked for 0 s: process {pid} (python" in told.value.message
    assert told.value.message.endswith(", stopped)")
    assert told.value.hint == f"let it go on: kill -CONT {pid}"


def test_who_waits_to_mount_can_be_stopped(state: Path, mounts: Mounts, tmp_path: Path) -> None:
    cancellation = Cancellation()
    outcome: list[BaseException] = []

    def start() -> None:
        try:
            mounts.start(request(tmp_path / "at"), cancellation=cancellation)
        except CancelledError as error:
            outcome.append(error)

    with kept_locked(state / "mounts"):
        waiting = threading.Thread(target=start, daemon=True)
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
        cancellation.cancel()
        waiting.join(STOP_SECONDS)
    assert outcome


def test_what_killed_processes_left_is_cleared_when_nobody_keeps_it(
    state: Path,
    mounts: Mounts,
    monkeypatch: pytest.MonkeyPatch,
    expected_events: set[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Seen to wait for ever."""
    expected_events.add(events.MOUNT_STALE_LEFT)
    monkeypatch.setattr(mounts_module, "STALE_LOCK_SECONDS", 0.1)
    left = state / "mounts/left"
    left.mkdir()
    with kept_locked(state / "mounts") as pid:
        assert mounts.clear_stale() == []
    assert left.exists()
    assert [f"process {pid} " in record.__dict__["reason"] for record in caplog.records] == [True]

    assert mounts.clear_stale() == []
    assert not left.exists()


def test_what_another_command_is_about_to_mount_is_left_as_it_is(
    mounts: Mounts, tmp_path: Path
) -> None:
    """Seen to be removed by who was refused."""
    at = tmp_path / "at"
    place = Path(mounts.control_of(at)).parent
    place.mkdir()
    (place / "starter").write_text(lease_owner(INIT) or "")
    (place / "spec.json").write_text("theirs")

    with pytest.raises(SessionStateError, match="another command is mounting"):
        mounts.start(request(at), cancellation=Cancellation())
    assert (place / "spec.json").read_text() == "theirs"


def test_a_stale_mount_that_the_kernel_keeps_is_told_and_others_are_cleared(
    state: Path,
    mounts: Mounts,
    monkeypatch: pytest.MonkeyPatch,
    expected_events: set[str],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """Whoever starts a session has no part in it; seen to fail the start."""
    expected_events.add(events.MOUNT_STALE_LEFT)
    for name in ("0-kept", "1-goes"):
        (state / "mounts" / name).mkdir()
    ending = Mounts._end

    def end(self: Mounts, place: Path) -> list[str]:
        if place.name == "0-kept":
            raise LocalWriteError(f"{tmp_path}/at can not be unmounted: Device or resource busy")
        return ending(self, place)

    monkeypatch.setattr(Mounts, "_end", end)

    assert mounts.clear_stale() == []

    assert [place.name for place in (state / "mounts").iterdir()] == ["0-kept"]
    assert [record.__dict__["reason"] for record in caplog.records] == [
        f"{tmp_path}/at can not be unmounted: Device or resource busy"
    ]
