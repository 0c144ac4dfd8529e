"""Files that change, or vanish, after they were hashed and before they are uploaded.

The worker agent's own scripts and the client store such a file under the hash that it had, and
leave out what has vanished without a word, but not in the manifest.
"""

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from agent_plugin.content import events
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import FileChangedError
from agent_plugin.session import finish_task, submit
from agent_plugin.transfer.upload import UploadResult
from tests.servers.sessions import Sessions, hash_of, manifest_at, paths_of
from tests.servers.trees import write_files

Restless = Callable[[Path, int], object]


def restless(
    monkeypatch: pytest.MonkeyPatch,
    path: Path,
    change: Restless,
    *,
    of: ModuleType = finish_task,
) -> list[int]:
    """Have a file change whenever it was hashed and not yet uploaded; return a list of the times.

    Args:
        monkeypatch: Ends it.
        path: The file.
        change: Changes it; told how often it was before.
        of: Who uploads.
    """
    uploading: Callable[..., UploadResult] = of.upload
    times: list[int] = []

    def upload(*arguments: Any) -> UploadResult:
        change(path, len(times))
        times.append(len(times))
        return uploading(*arguments)

    monkeypatch.setattr(of, "upload", upload)
    return times


def rewrite_once(path: Path, before: int) -> None:
    if not before:
        status = path.stat()
        path.write_bytes(b"rewritten")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def write_again(path: Path, before: int) -> None:
    path.write_bytes(b"again %d" % before)


def is_missing(sessions: Sessions, data: bytes) -> bool:
    with sessions.host.services() as context:
        return bool(context.ask(lambda store: store.find_missing([Digest.of(data)])))


def test_what_changes_between_its_hash_and_its_upload_is_stored_as_what_it_is(
    any_sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored under the hash that it had, it would be wrong in each job that ever has that hash."""
    s = any_sessions
    root = s.started(s.submitted())
    (root / "renders/0.exr").write_bytes(b"first one")
    (root / "renders/1.exr").write_bytes(b"quiet")
    times = restless(monkeypatch, root / "renders/0.exr", rewrite_once)

    result = s.finish()

    assert len(times) == 2
    assert s.outputs() == {
        "renders/0.exr": hash_of(b"rewritten"),
        "renders/1.exr": hash_of(b"quiet"),
    }
    assert (result.files, result.bytes_uploaded, result.bytes_reused) == (2, 14, 0)
    assert is_missing(s, b"first one")
    s.host.get_outputs(s.tmp_path / "got")
    assert (s.tmp_path / "got/renders/0.exr").read_bytes() == b"rewritten"


def test_what_vanishes_between_its_hash_and_its_upload_is_in_no_manifest(
    any_sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = any_sessions
    root = s.started(s.submitted())
    (root / "renders/0.exr").write_bytes(b"gone soon")
    (root / "renders/1.exr").write_bytes(b"quiet")
    restless(monkeypatch, root / "renders/0.exr", lambda path, _: path.unlink(missing_ok=True))

    result = s.finish()

    assert paths_of(s.host, result) == [["renders/1.exr"]]
    assert (result.bytes_uploaded, result.bytes_reused) == (5, 0)


@pytest.mark.parametrize("what", ["directory", "fifo", "link out of the root"])
def test_what_is_no_file_any_more_when_it_is_uploaded_is_looked_at_again(
    any_sessions: Sessions,
    monkeypatch: pytest.MonkeyPatch,
    expected_events: set[str],
    what: str,
) -> None:
    """Seen to fail the task: it was no regular file, or led out of the root."""
    s = any_sessions
    if what != "directory":
        expected_events.add(events.FILE_SKIPPED)
    root = s.started(s.submitted())
    (root / "renders/0.exr").write_bytes(b"file first")
    (root / "renders/1.exr").write_bytes(b"quiet")

    def replace(path: Path, before: int) -> None:
        if before:
            return
        path.unlink()
        if what == "directory":
            write_files(path, {"a": b"in it"}, mtime_ns=1_000_000_000)
        elif what == "fifo":
            os.mkfifo(path)
        else:
            path.symlink_to("/etc/hostname")

    times = restless(monkeypatch, root / "renders/0.exr", replace)

    result = s.finish()

    assert len(times) == 2
    also = ["renders/0.exr/a"] if what == "directory" else []
    assert paths_of(s.host, result) == [[*also, "renders/1.exr"]]
    assert is_missing(s, b"file first")


def test_what_keeps_changing_while_it_is_uploaded_fails_the_task_and_is_in_no_manifest(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = sessions
    root = s.started(s.submitted())
    (root / "renders/0.exr").write_bytes(b"0")
    restless(monkeypatch, root / "renders/0.exr", write_again)

    with pytest.raises(FileChangedError, match=r"renders/0\.exr"):
        s.finish()

    assert s.host.outputs().roots == []


def test_what_is_submitted_while_it_changes_is_stored_as_what_it_is(
    any_sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = any_sessions
    write_files(s.source, {"0.usd": b"first one", "1.usd": b"quiet"}, mtime_ns=1_000_000_000)
    restless(monkeypatch, s.source / "0.usd", rewrite_once, of=submit)

    result, summary = s.host.submit(s.source)

    [properties] = result.attachments.manifests
    assert properties.input_manifest_path is not None
    manifest = manifest_at(s.host, properties.input_manifest_path)
    assert {entry.path: entry.hash for entry in manifest.entries} == {
        "0.usd": hash_of(b"rewritten"),
        "1.usd": hash_of(b"quiet"),
    }
    assert (summary.bytes, summary.bytes_uploaded, summary.bytes_reused) == (14, 14, 0)
    assert is_missing(s, b"first one")


def test_what_keeps_changing_while_it_is_submitted_is_refused(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(sessions.source, {"0.usd": b"0"}, mtime_ns=1_000_000_000)
    restless(monkeypatch, sessions.source / "0.usd", write_again, of=submit)

    with pytest.raises(FileChangedError, match=r"0\.usd"):
        sessions.host.submit(sessions.source)
