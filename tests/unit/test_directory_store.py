"""What is particular to a store in a directory: links, rights, full disks, files of its own."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent_plugin.content import directory_files, leftovers
from agent_plugin.content.digest import Digest
from agent_plugin.content.directory_store import DirectoryStore
from agent_plugin.content.errors import (
    BlobNotFoundError,
    DocumentNotFoundError,
    StoreAccessError,
    StoreProtocolError,
    UnsafePathError,
)
from agent_plugin.content.open_store import build_store
from agent_plugin.content.store import Cancellation
from tests.servers.other_user import being_nobody

BLOB = b"content"
DIGEST = Digest.of(BLOB)
NAME = f"{DIGEST.hex}.xxh128"


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


@pytest.fixture
def root(tmp_path: Path, store: DirectoryStore) -> Path:
    store.put(DIGEST, BLOB)
    store.put_document("a/b", b"{}", {"asset-root": "/a"})
    return tmp_path / "store"


def test_the_url_is_percent_encoded_and_leads_back(tmp_path: Path) -> None:
    directory = tmp_path / "a b%41+é"
    store = build_store(f"file://{tmp_path}/a%20b%2541+%C3%A9")

    assert store.url == f"file://{tmp_path}/a%20b%2541%2B%C3%A9"
    store.put(DIGEST, BLOB)
    assert directory.is_dir()
    assert build_store(store.url).get(DIGEST) == BLOB


def test_reading_what_is_not_there_makes_nothing_and_is_refused(
    tmp_path: Path, store: DirectoryStore
) -> None:
    """The address was mistyped, or the disk that has the store is not mounted."""
    calls: list[Callable[[], object]] = [
        lambda: store.get(DIGEST),
        lambda: store.read_range(DIGEST, 0, 1),
        lambda: store.find_missing([DIGEST]),
        lambda: list(store.list_blobs()),
        lambda: store.get_document("a/b", max_bytes=9),
        lambda: list(store.list_documents("")),
    ]
    for call in calls:
        with pytest.raises(StoreAccessError, match=f"^{tmp_path}/store.*: No such file"):
            call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", ["put", "put_document", "make"])
def test_the_first_write_makes_the_directory(tmp_path: Path, write: str) -> None:
    first, second = DirectoryStore(tmp_path / "store"), DirectoryStore(tmp_path / "store")
    for store in (first, second):
        if write == "put":
            store.put(DIGEST, BLOB)
        elif write == "put_document":
            store.put_document("a/b", b"{}", {})
        else:
            store.make()

    assert (tmp_path / "store").is_dir()
    assert first.find_missing([DIGEST]) == (set() if write == "put" else {DIGEST})


def test_only_the_last_directory_is_made(tmp_path: Path) -> None:
    """The disk of a farm may not be mounted; a directory in its place would swallow everything."""
    with pytest.raises(StoreAccessError, match="No such file"):
        DirectoryStore(tmp_path / "not" / "there")


def test_a_store_whose_directory_vanished_does_not_answer_absent(
    root: Path, store: DirectoryStore
) -> None:
    root.rename(root.with_name("gone"))
    calls: list[Callable[[], object]] = [
        lambda: store.get(DIGEST),
        lambda: store.find_missing([DIGEST]),
        lambda: store.put(DIGEST, BLOB),
        lambda: store.get_document("a/b", max_bytes=9),
        lambda: list(store.list_documents("")),
    ]
    for call in calls:
        with pytest.raises(StoreAccessError, match="No such file"):
            call()


def test_files_are_readable_for_others_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        store = DirectoryStore(tmp_path / "store")
        store.put(DIGEST, BLOB)
        store.put_document("a/b", b"{}", {"asset-root": "/a"})
    finally:
        os.umask(before)
    modes = {path.is_dir(): path.stat().st_mode & 0o777 for path in (tmp_path / "store").rglob("*")}
    assert modes == {True: 0o750, False: 0o640}


@pytest.mark.parametrize("make", ["link", "dangling", "fifo", "directory"])
def test_what_is_no_file_in_a_blobs_place_is_refused(
    root: Path, store: DirectoryStore, make: str
) -> None:
    """Neither followed, nor waited for, nor overwritten."""
    place = root / "Data" / NAME
    place.unlink()
    outside = root.parent / "outside"
    if make == "link":
        outside.write_bytes(BLOB)
        place.symlink_to(outside)
    elif make == "dangling":
        place.symlink_to(outside)
    elif make == "fifo":
        os.mkfifo(place)
    else:
        place.mkdir()

    for call in (
        lambda: store.get(DIGEST),
        lambda: store.put(DIGEST, BLOB),
        lambda: store.find_missing([DIGEST]),
        lambda: store.read_range(DIGEST, 0, 1),
    ):
        with pytest.raises(UnsafePathError):
            call()
    assert list(store.list_blobs()) == []
    assert make == "link" or not outside.exists()


def test_a_link_in_a_directorys_place_is_not_followed(root: Path, store: DirectoryStore) -> None:
    outside = root.parent / "outside"
    (root / "Manifests").rename(outside)
    (root / "Manifests").symlink_to(outside)
    (root / "Data").rename(root.parent / "data")
    (root / "Data").symlink_to(root.parent / "data")

    for call in (
        lambda: store.get_document("a/b", max_bytes=9),
        lambda: store.put_document("a/c", b"", {}),
        lambda: list(store.list_documents("")),
        lambda: store.get(DIGEST),
        lambda: store.put(Digest.of(b"x"), b"x"),
        lambda: list(store.list_blobs()),
    ):
        with pytest.raises(UnsafePathError):
            call()
    assert sorted(path.name for path in outside.rglob("*")) == [".b.metadata.json", "a", "b"]


def test_links_among_documents_are_refused_and_not_listed(
    root: Path, store: DirectoryStore
) -> None:
    (root / "Manifests" / "a" / "link").symlink_to("b")
    (root / "Manifests" / "a" / "up").symlink_to("..")

    assert [info.key for info in store.list_documents("")] == ["a/b"]
    for key in ["a/link", "a/up/a/b"]:
        with pytest.raises(UnsafePathError):
            store.get_document(key, max_bytes=9)
        with pytest.raises(UnsafePathError):
            store.put_document(key, b"", {})


def test_files_of_its_own_are_no_documents(root: Path, store: DirectoryStore) -> None:
    staging = root / "Manifests" / ".propmaster-staging.partial"
    staging.mkdir()
    (staging / ".propmaster-0.partial").write_bytes(b"left by a crash")
    (staging / "x").write_bytes(b"")
    for key in [
        "a/.b.metadata.json",
        ".x.metadata.json",
        ".propmaster-staging.partial",
        ".propmaster-staging.partial/x",
        "a/.propmaster-0.partial",
    ]:
        with pytest.raises(UnsafePathError, match="the store's own"):
            store.get_document(key, max_bytes=99)
        with pytest.raises(UnsafePathError, match="the store's own"):
            store.put_document(key, b"{}", {})
    assert [info.key for info in store.list_documents("")] == ["a/b"]


@pytest.mark.parametrize(
    "text", [b"", b"[1]", b"{", b'{"a": "\\u00e9"}', b'{"A": "x"}', b"\xff", b'"x"', b"7"]
)
def test_metadata_that_can_not_be_read_is_not_taken_for_none(
    root: Path, store: DirectoryStore, text: bytes
) -> None:
    (root / "Manifests" / "a" / ".b.metadata.json").write_bytes(text)
    with pytest.raises(StoreProtocolError, match="metadata"):
        store.get_document("a/b", max_bytes=9)


def test_metadata_are_plain_json_beside_the_document(root: Path, store: DirectoryStore) -> None:
    sidecar = root / "Manifests" / "a" / ".b.metadata.json"
    assert json.loads(sidecar.read_bytes()) == {"asset-root": "/a"}
    store.put_document("a/b", b"{}", {})
    assert not sidecar.exists()


@pytest.fixture(params=["unnamed", "named"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether the file system has files without names; those of network file systems do not.

    Without them it is asked as a kernel is that does not know the flag: EISDIR.
    """
    kind: str = request.param
    if kind == "named":
        monkeypatch.setattr(directory_files, "_UNNAMED", os.O_RDWR | os.O_DIRECTORY)
    return kind


def test_what_is_there_stays_or_is_replaced_and_nothing_else_is_left(
    root: Path, store: DirectoryStore, how: str
) -> None:
    del how
    assert not store.put(DIGEST, BLOB)
    other = Digest.of(b"other")
    assert store.put(other, b"other")
    cut_off = root / "Data" / f"{other.hex}.xxh128"
    cut_off.write_bytes(b"oth")
    assert store.put(other, b"other")
    for data in (b"{}", b"[]"):
        store.put_document("a/b", data, {"asset-root": data.decode()})

    assert store.get(other) == b"other"
    document = store.get_document("a/b", max_bytes=9)
    assert (document.data, document.metadata) == (b"[]", {"asset-root": "[]"})
    files = [path.name for path in root.rglob("*") if path.is_file()]
    assert sorted(files) == sorted([".b.metadata.json", "b", NAME, cut_off.name])
    assert cut_off.stat().st_nlink == 1


LARGE = bytes(5_000_000)
WRITER = """
import os, sys
from pathlib import Path
from agent_plugin.content import directory_files
from agent_plugin.content.digest import Digest
from agent_plugin.content.directory_store import DirectoryStore
from agent_plugin.content.store import Cancellation

store, source, how = sys.argv[1:]
if how == "named":
    directory_files._UNNAMED = os.O_RDWR | os.O_DIRECTORY

def written(_bytes):
    print("some of it is written", flush=True)
    sys.stdin.read()

with open(source, "rb") as file:
    digest = Digest.of(file.read())
    DirectoryStore(Path(store)).put_file(
        digest, file.fileno(), cancellation=Cancellation(), progress=written
    )
"""


@contextmanager
def writer(root: Path, how: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that is in the middle of storing LARGE until its input is closed."""
    source = root.parent / "source"
    source.write_bytes(LARGE)
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, root, source, how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"some of it is written\n"
            yield process
        finally:
            process.kill()


def test_of_a_killed_writer_nothing_is_left(
    root: Path, store: DirectoryStore, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or nothing once an hour has passed, unless somebody still writes."""
    data = root / "Data"
    with writer(root, how) as process:
        process.send_signal(signal.SIGKILL)
    with writer(root, how) as alive:
        before = [path.name for path in data.rglob("*") if path.is_file()]
        assert len(before) == (1 if how == "unnamed" else 3)
        # Within the hour nobody knows who may still write; the change time can not be set back.
        DirectoryStore(root).put(Digest.of(b"x"), b"x")
        assert {path.name for path in data.rglob("*")} >= set(before)
        monkeypatch.setattr(leftovers, "ABANDONED_SECONDS", -1.0)
        DirectoryStore(root).put(Digest.of(b"y"), b"y")
        names = {path.name for path in data.rglob("*") if path.is_file()}
        assert len(names) == 3 + (how == "named"), "the blobs, and what the living writer has"
        assert alive.stdin is not None
        alive.stdin.close()
        assert alive.wait(30) == 0
    assert store.find_missing([Digest.of(LARGE)]) == set()
    assert sorted(path.name for path in data.rglob("*") if path.is_file()) == sorted(
        f"{Digest.of(one).hex}.xxh128" for one in (BLOB, b"x", b"y", LARGE)
    )


def test_who_may_write_beside_unfinished_files_may_write_them(root: Path, how: str) -> None:
    """Whatever the umask of the first one was."""
    (root / "Data").chmod(0o1777)
    before = os.umask(0o077)
    try:
        DirectoryStore(root).put(Digest.of(b"x"), b"x")
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o7777 for path in (root / "Data").iterdir() if path.is_dir()]
    assert modes == ([0o1777] if how == "named" else [])


def test_metadata_that_no_store_could_keep_are_a_mistake(store: DirectoryStore) -> None:
    for metadata in ({"Asset": "x"}, {"a": "é"}, {"a": "x\ny"}, {"a b": "x"}):
        with pytest.raises(ValueError, match="not metadata"):
            store.put_document("a", b"", metadata)


def test_names_that_can_not_be_keys_are_passed_over(root: Path, store: DirectoryStore) -> None:
    directory = os.fsencode(root / "Manifests")
    for name in [b"\xff\xfe", b"new\nline"]:
        Path(os.fsdecode(directory + b"/" + name)).write_bytes(b"")
    assert [info.key for info in store.list_documents("")] == ["a/b"]


def test_a_write_that_fails_leaves_nothing(root: Path) -> None:
    """A process that may write 4 KiB of each file at most, as on a full disk."""
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from agent_plugin.content.digest import Digest\n"
        "from agent_plugin.content.directory_store import DirectoryStore\n"
        "from agent_plugin.content.errors import NoSpaceError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        f"store = DirectoryStore(Path({str(root)!r}))\n"
        "data = b'x' * 10_000\n"
        "for call in (lambda: store.put(Digest.of(data), data),\n"
        "             lambda: store.put_document('a/large', data, {})):\n"
        "    try:\n"
        "        call()\n"
        "    except NoSpaceError as error:\n"
        "        print(error.code)\n"
    )
    before = sorted(root.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "E_NO_SPACE\nE_NO_SPACE\n"
    assert sorted(root.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_who_may_not_write_or_read_is_told_so(root: Path) -> None:
    """Never that something is absent."""
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from agent_plugin.content.digest import Digest\n"
        "from agent_plugin.content.directory_store import DirectoryStore\n"
        "from agent_plugin.content.errors import StoreAccessError\n"
        f"root, digest = Path({str(root)!r}), Digest.of(b'content')\n"
        "os.fchdir(os.open(root, os.O_RDONLY))\n"
        "os.setgroups([])\n"
        "os.setgid(65534)\n"
        "os.setuid(65534)\n"
        "store = DirectoryStore(Path('.'))\n"
        "assert store.get(digest) == b'content'\n"
        "for call in (lambda: store.put(Digest.of(b'x'), b'x'),\n"
        "             lambda: store.put_document('a/c', b'', {}),\n"
        "             lambda: store.put_document('c/d', b'', {}),\n"
        "             lambda: store.get_document('secret/x', max_bytes=9),\n"
        "             lambda: list(store.list_documents(''))):\n"
        "    try:\n"
        "        call()\n"
        "    except StoreAccessError as error:\n"
        "        print(error.code)\n"
    )
    secret = root / "Manifests" / "secret"
    secret.mkdir()
    (secret / "x").write_bytes(b"")
    for path in [root, root / "Data", root / "Manifests", root / "Manifests" / "a"]:
        path.chmod(0o755)
    (root / "Data" / NAME).chmod(0o644)
    secret.chmod(0o700)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("E_ACCESS\n" * 5, "")


def test_what_holds_the_directory_need_not_be_readable() -> None:
    """It may be entered and written, as a drop box that root has made."""
    # Where everybody may enter; pytest's own directories are closed to others.
    with tempfile.TemporaryDirectory(dir="/tmp") as outer:
        Path(outer).chmod(0o755)
        box = Path(outer) / "box"
        box.mkdir()
        box.chmod(0o733)
        with being_nobody():
            with pytest.raises(PermissionError):
                list(box.iterdir())
            store = DirectoryStore(box / "store")
            store.put(DIGEST, BLOB)
            store.put_document("a/b", b"{}", {})

            assert DirectoryStore(box / "store").get(DIGEST) == BLOB


def test_absent_is_absent_before_anything_was_stored(store: DirectoryStore) -> None:
    store.make()

    assert store.find_missing([DIGEST]) == {DIGEST}
    assert list(store.list_blobs()) == []
    assert list(store.list_documents("")) == []
    with pytest.raises(BlobNotFoundError):
        store.get(DIGEST)
    with pytest.raises(DocumentNotFoundError):
        store.get_document("a", max_bytes=1)


def test_what_is_wrong_with_the_callers_file_is_the_systems_own_error(
    root: Path, store: DirectoryStore
) -> None:
    with (root / "Data" / NAME).open("rb") as readable, pytest.raises(OSError, match="descriptor"):
        store.fetch(DIGEST, readable.fileno(), cancellation=Cancellation())
