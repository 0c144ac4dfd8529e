"""Files are opened and directories made below a root, and nowhere else."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_plugin.content.errors import (
    LocalReadError,
    LocalWriteError,
    PathClashError,
    UnsafePathError,
)
from agent_plugin.content.safe_path import Root, split
from tests.servers.descriptors import open_below


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def root(directory: Path) -> Iterator[Root]:
    with Root(directory) as opened:
        yield opened


def read(root: Root, path: str) -> bytes:
    fd = root.open_file(path)
    with os.fdopen(fd, "rb") as file:
        return file.read()


@pytest.mark.parametrize(
    ("path", "parts"),
    [("", []), (".", []), ("./", []), ("a/./b//c/", ["a", "b", "c"]), ("...", ["..."])],
)
def test_a_path_is_split_as_the_kernel_does(path: str, parts: list[str]) -> None:
    assert split(path) == parts


@pytest.mark.parametrize("path", ["/", "/etc/passwd", "..", "a/../b", "a/..", "a\0b"])
def test_a_path_that_could_leave_its_root_is_refused(root: Root, path: str) -> None:
    with pytest.raises(UnsafePathError):
        split(path)
    with pytest.raises(UnsafePathError):
        root.open_file(path)
    with pytest.raises(UnsafePathError):
        root.directory(path)


def test_a_root_that_does_not_exist_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Root(tmp_path / "nothing")


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(LocalReadError, match="file"):
        Root(tmp_path / "file")


def test_a_root_that_may_be_no_link_is_refused_if_it_is_one(directory: Path) -> None:
    link = directory.with_name("link")
    link.symlink_to(directory)
    above = directory.with_name("above")
    above.symlink_to(directory.parent)

    with pytest.raises(UnsafePathError, match="link is a symbolic link"):
        Root(link, follow=False)
    with Root(link) as followed, Root(above / "root", follow=False) as opened:
        assert followed.real_path == opened.real_path == str(directory)
        assert os.fstat(opened.fd).st_ino == directory.stat().st_ino


@pytest.mark.parametrize("kind", ["nothing", "file", "broken link", "link to a file"])
def test_a_root_that_may_be_no_link_is_a_directory(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "root"
    expected: type[Exception] = UnsafePathError
    match kind:
        case "nothing":
            expected = FileNotFoundError
        case "file":
            root.touch()
            expected = LocalReadError
        case "broken link":
            root.symlink_to("nowhere")
        case _:
            (tmp_path / "file").touch()
            root.symlink_to("file")

    with pytest.raises(expected, match="root"):
        Root(root, follow=False)


def test_a_file_is_read_by_its_path(root: Root, directory: Path) -> None:
    (directory / "a" / "b").mkdir(parents=True)
    (directory / "a" / "b" / "c.txt").write_bytes(b"content")

    assert read(root, "a/b/c.txt") == b"content"


def test_links_inside_the_root_are_followed(root: Root, directory: Path) -> None:
    (directory / "real" / "deep").mkdir(parents=True)
    (directory / "real" / "deep" / "file").write_bytes(b"content")
    (directory / "directory").symlink_to("real/deep")
    (directory / "absolute").symlink_to(directory / "real" / "deep" / "file")
    (directory / "real" / "upwards").symlink_to("../directory/file")

    assert read(root, "directory/file") == b"content"
    assert read(root, "absolute") == b"content"
    assert read(root, "real/upwards") == b"content"


def test_links_out_of_the_root_are_refused(root: Root, directory: Path) -> None:
    (directory.parent / "secret").write_bytes(b"secret")
    (directory.parent / "root-too").mkdir()
    (directory.parent / "root-too" / "secret").write_bytes(b"secret")
    (directory / "file").symlink_to("../secret")
    (directory / "absolute").symlink_to(directory.parent / "secret")
    (directory / "directory").symlink_to("..")
    (directory / "namesake").symlink_to("../root-too")

    for path in ("file", "absolute", "directory/secret", "namesake/secret"):
        with pytest.raises(UnsafePathError):
            root.open_file(path)


def test_links_in_a_loop_are_refused(root: Root, directory: Path) -> None:
    (directory / "a").symlink_to("b")
    (directory / "b").symlink_to("a")

    with pytest.raises(UnsafePathError, match="Too many levels"):
        root.open_file("a")


@pytest.mark.parametrize("path", ["missing", "missing/file", "broken", "file/below"])
def test_what_is_not_there_is_not_found(root: Root, directory: Path, path: str) -> None:
    (directory / "file").touch()
    (directory / "broken").symlink_to("nowhere")

    with pytest.raises(FileNotFoundError):
        root.open_file(path)


def test_only_regular_files_are_opened_and_none_is_waited_for(root: Root, directory: Path) -> None:
    os.mkfifo(directory / "fifo")
    (directory / "directory").mkdir()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(directory / "socket"))
        before = open_below(directory)

        for path in ("fifo", "socket", "directory", ""):
            with pytest.raises(LocalReadError):
                root.open_file(path)
        assert open_below(directory) == before


def test_missing_directories_are_made(root: Root, directory: Path) -> None:
    fd = root.directory("a/b/c")

    assert os.fstat(fd).st_ino == (directory / "a" / "b" / "c").stat().st_ino
    assert root.directory("a/b/c") == fd
    assert root.directory("a//b/./c/") == fd
    assert root.directory("") == root.fd


def test_a_new_directory_has_the_mode_that_the_umask_leaves(root: Root, directory: Path) -> None:
    before = os.umask(0o027)
    try:
        root.directory("a")
    finally:
        os.umask(before)

    assert (directory / "a").stat().st_mode & 0o7777 == 0o750


def test_a_missing_directory_is_not_found_when_it_shall_not_be_made(
    root: Root, directory: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="root/a'"):
        root.directory("a/b", create=False)
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("create", [True, False])
def test_a_link_where_a_directory_must_be_is_refused_wherever_it_leads(
    root: Root, directory: Path, create: bool
) -> None:
    (directory / "inside").mkdir()
    (directory / "link").symlink_to("inside")
    (directory / "broken").symlink_to("../outside")

    for path in ("link", "link/below", "broken", "broken/below"):
        with pytest.raises(UnsafePathError, match=r"link|broken"):
            root.directory(path, create=create)
    assert list((directory / "inside").iterdir()) == []
    assert not (directory.parent / "outside").exists()


@pytest.mark.parametrize("create", [True, False])
def test_a_file_where_a_directory_must_be_is_a_clash(
    root: Root, directory: Path, create: bool
) -> None:
    (directory / "file").touch()

    with pytest.raises(PathClashError, match="root/file is a file"):
        root.directory("file/below", create=create)


def test_a_name_too_long_for_the_file_system_is_named(root: Root) -> None:
    with pytest.raises(LocalWriteError, match="xxx"):
        root.directory("x" * 300)
    with pytest.raises(LocalReadError, match="xxx"):
        root.open_file("x" * 300)


def test_no_more_directories_stay_open_than_allowed(directory: Path) -> None:
    before = open_below(directory)
    with Root(directory, max_directories=8) as root:
        for number in range(100):
            root.directory(f"d{number}/below")
            assert open_below(directory) <= before + 1 + 8
    assert open_below(directory) == before


def test_the_directories_used_last_stay_open(directory: Path) -> None:
    with Root(directory, max_directories=4) as root:
        kept = root.directory("kept")
        identity = os.fstat(kept).st_ino
        for number in range(20):
            root.directory(f"other{number}")
            assert root.directory("kept") == kept
        assert os.fstat(kept).st_ino == identity


def test_a_held_directory_stays_open_whatever_else_is_asked_for(directory: Path) -> None:
    before = open_below(directory)
    with Root(directory, max_directories=2) as root:
        with root.holding("held") as fd:
            identity = os.fstat(fd).st_ino
            for number in range(20):
                root.directory(f"other{number}")
            assert os.fstat(fd).st_ino == identity == (directory / "held").stat().st_ino
        with root.holding("") as fd:
            assert fd == root.fd
    assert open_below(directory) == before


def test_a_directory_held_over_the_end_is_closed_by_its_holder(directory: Path) -> None:
    before = open_below(directory)
    root = Root(directory)
    with root.holding("held") as fd:
        root.close()
        root.close()

        assert os.fstat(fd).st_ino == (directory / "held").stat().st_ino
    assert open_below(directory) == before


def test_paths_of_500_directories_work(directory: Path) -> None:
    deep = "/".join(["directory"] * 500)
    with Root(directory, max_directories=4) as root:
        fd = os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=root.directory(deep))
        os.write(fd, b"content")
        os.close(fd)

    with Root(directory) as root:
        assert read(root, f"{deep}/file") == b"content"


def test_threads_that_share_a_root_each_get_their_directory(directory: Path) -> None:
    wrong: list[str] = []

    def work(root: Root, seed: int) -> None:
        for number in range(200):
            name = f"d{(seed * 7 + number) % 30}/below"
            with root.holding(name) as fd:
                if os.fstat(fd).st_ino != (directory / name).stat().st_ino:
                    wrong.append(name)

    with Root(directory, max_directories=3) as root:
        threads = [threading.Thread(target=work, args=(root, seed)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert wrong == []
