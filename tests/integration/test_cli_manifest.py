"""`propmaster manifest` shows, checks, compares and makes manifests."""

import os
import subprocess
from pathlib import Path

import pytest

from agent_plugin.content.digest import Digest, hash_name
from agent_plugin.content.directory_store import DirectoryStore
from agent_plugin.content.manifest import decode
from tests.servers.command import CALL_SECONDS, Command
from tests.servers.deadline_peers import CLIENT_PYTHON
from tests.servers.trees import write_files

MTIME_NS = 1_700_000_000_123_456_789
NOT_UTF8 = b"cup\xe9.txt"


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path / "host")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    write_files(
        root,
        {"a.txt": b"alpha", "sub/b.bin": 70_000, NOT_UTF8: b"not UTF-8", "empty": b""},
        mtime_ns=MTIME_NS,
    )
    return root


@pytest.fixture
def manifest(command: Command, tree: Path, tmp_path: Path) -> Path:
    output = tmp_path / "tree.manifest"
    assert command("manifest", "snapshot", tree, "--output", output).code == 0
    return output


def test_a_snapshot_is_the_canonical_manifest_of_all_files(
    command: Command, tree: Path, manifest: Path
) -> None:
    data = manifest.read_bytes()
    entries = decode(data, source="snapshot").by_path()

    assert list(entries) == ["a.txt", "cup\udce9.txt", "empty", "sub/b.bin"]
    assert entries["a.txt"].digest == Digest.of(b"alpha")
    assert entries["a.txt"].mtime == MTIME_NS // 1000
    assert manifest.stat().st_mode & 0o777 == 0o600
    assert command("manifest", "snapshot", tree).stdout == data


def test_a_snapshot_tells_what_it_wrote(command: Command, tree: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = command("manifest", "snapshot", tree, "--output", output, "--json")

    data = output.read_bytes()
    expected = {"output": str(output), "files": 4, "bytes": 70_014, "hash": Digest.of(data).hex}
    assert done.json == expected


CLIENTS_SNAPSHOT = """
import sys
from deadline.job_attachments.api.manifest import _manifest_snapshot
made = _manifest_snapshot(
    root=sys.argv[1], destination=sys.argv[2], name="n", print_function_callback=lambda *_: None
)
print(made.manifest)
"""


@pytest.mark.peers
def test_a_snapshot_has_the_bytes_that_the_clients_snapshot_has(
    command: Command, tree: Path, tmp_path: Path
) -> None:
    names = {
        b"\xff",
        b"\xed\xa0\x80",
        b"\xee\x80\x80",
        b"\xf0\x9f\x98\x80",
        b"nl\n",
        b'q"\\\x7f',
        b"zero",
    }
    times = (-1, -1001, 0, 999, 1_719_848_112_123_456_999)
    for at, name in enumerate(sorted(names)):
        path = tree / "sub" / os.fsdecode(name)
        path.write_bytes(b"" if name == b"zero" else name)
        os.utime(path, ns=(0, times[at % len(times)]))
    (tree / "link").symlink_to("a.txt")
    (tree / "linked").symlink_to("sub")
    (tree / "broken").symlink_to("nowhere")
    (tree / "no files/at all").mkdir(parents=True)

    done = subprocess.run(
        [CLIENT_PYTHON, "-c", CLIENTS_SNAPSHOT, tree, tmp_path / "theirs"],
        env={**os.environ, "HOME": str(tmp_path), "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=CALL_SECONDS,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    theirs = Path(done.stdout.strip()).read_bytes()
    assert len(decode(theirs, source="the client's").entries) == 20
    assert command("manifest", "snapshot", tree).stdout == theirs


def test_the_hash_cache_of_snapshots_is_for_its_user_only(command: Command, tree: Path) -> None:
    command("manifest", "snapshot", tree)

    assert (command.state_dir / "index.db").stat().st_mode & 0o777 == 0o600


def test_a_snapshot_of_some_directories_has_their_files_only(command: Command, tree: Path) -> None:
    done = command("manifest", "snapshot", tree, "--include-dir", "sub")

    assert list(decode(done.stdout, source="snapshot").by_path()) == ["sub/b.bin"]


def test_a_snapshot_warns_of_each_link_that_it_skips(command: Command, tree: Path) -> None:
    (tree / "leak").symlink_to("/etc/hostname")
    done = command("manifest", "snapshot", tree)

    assert done.code == 0
    assert [(event["event"], event["path"]) for event in done.events] == [
        ("file.skipped", f"{tree}/leak")
    ]


def test_a_directory_without_files_has_no_manifest(command: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = command("manifest", "snapshot", tmp_path / "empty", "--output", tmp_path / "out")

    assert done.code == 65
    assert f"{tmp_path}/empty has no files there, and a root without files" in done.stderr
    assert "damaged" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_directory_to_include_that_is_not_there_is_named(command: Command, tree: Path) -> None:
    done = command("manifest", "snapshot", tree, "--include-dir", "sub", "--include-dir", "nope")

    assert (done.code, done.stdout) == (2, b"")
    assert f"there is no directory 'nope' below {tree}" in done.stderr


def test_two_manifests_can_not_both_be_standard_input(command: Command, manifest: Path) -> None:
    done = command("manifest", "diff", "-", "-", stdin=manifest.read_bytes())

    assert (done.code, "can not both be standard input" in done.stderr) == (2, True)


@pytest.mark.parametrize("words", ["show", "verify", "diff", "snapshot"])
def test_settings_that_are_wrong_are_told_by_each_command(
    command: Command, tree: Path, manifest: Path, tmp_path: Path, words: str
) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text("[paths]\ncache_dri = '/x'\n")
    arguments = {"diff": [manifest, manifest], "snapshot": [tree]}.get(words, [manifest])
    done = command("manifest", words, *arguments, "--config", settings)

    assert (done.code, "cache_dri" in done.stderr) == (67, True)


def test_a_snapshot_does_not_replace_a_device(command: Command, tree: Path) -> None:
    done = command("manifest", "snapshot", tree, "--output", "/dev/null")

    assert done.code == 80
    assert Path("/dev/null").is_char_device()


def test_show_lists_files_with_size_time_hash_and_path(command: Command, manifest: Path) -> None:
    shown = command("manifest", "show", manifest)

    first, _, *rows = shown.text.splitlines()
    assert first == f"4 files, 70014 bytes, xxh128 {Digest.of(manifest.read_bytes()).hex}"
    assert rows[0].split() == ["5", str(MTIME_NS // 1000), Digest.of(b"alpha").hex, "a.txt"]
    assert rows[1].endswith("cup\\udce9.txt")


def test_show_is_limited_on_request_and_says_so(command: Command, manifest: Path) -> None:
    limited = command("manifest", "show", manifest, "--limit", "1").text

    assert "3 more files" in limited
    as_json = command("manifest", "show", manifest, "--limit", "1", "--json").json
    assert (as_json["files"], as_json["bytes"], len(as_json["paths"])) == (4, 70_014, 1)


def test_show_reads_standard_input_and_names_keep_their_bytes(
    command: Command, manifest: Path
) -> None:
    shown = command("manifest", "show", "-", "--json", stdin=manifest.read_bytes()).json

    assert os.fsencode(shown["paths"][1]["path"]) == NOT_UTF8


def test_a_broken_manifest_exits_with_its_own_code_and_names_the_reason(
    command: Command, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b'{"hashAlg":"xxh128","manifestVersion":"2023-03-03","paths":[]}')
    done = command("manifest", "verify", broken)

    assert done.code == 65
    assert f"error[manifest-invalid]: {broken}" in done.stderr
    absent = command("manifest", "show", tmp_path / "absent")
    assert (absent.code, "No such file" in absent.stderr) == (85, True)


def test_verify_checks_the_manifests_own_hash(command: Command, manifest: Path) -> None:
    right = Digest.of(manifest.read_bytes()).hex

    assert command("manifest", "verify", manifest, "--expected-hash", right).code == 0
    wrong = command("manifest", "verify", manifest, "--expected-hash", hash_name("other"))
    assert (wrong.code, right in wrong.stderr) == (65, True)
    for none in ("zz", right.upper(), right[:31], f"{right}0", ""):
        refused = command("manifest", "verify", manifest, "--expected-hash", none)
        assert (refused.code, "is no xxh128" in refused.stderr) == (2, True)


def test_verify_finds_a_tree_as_it_was(command: Command, tree: Path, manifest: Path) -> None:
    done = command("manifest", "verify", manifest, "--root", tree, "--json")

    assert (done.code, done.json["checked"], done.json["differences"]) == (0, ["root"], [])


def test_verify_names_each_file_that_is_not_as_it_was(
    command: Command, tree: Path, manifest: Path
) -> None:
    same_size = tree / "a.txt"
    times = (same_size.stat().st_atime_ns, same_size.stat().st_mtime_ns)
    same_size.write_bytes(b"omega")
    os.utime(same_size, ns=times)
    (tree / "empty").unlink()
    (tree / "empty").symlink_to("/etc/hostname")
    (tree / os.fsdecode(NOT_UTF8)).unlink()
    os.utime(tree / "sub/b.bin", ns=(0, 0))
    done = command("manifest", "verify", manifest, "--root", tree, "--json")

    assert done.code == 1
    reasons = {one["path"]: one["reason"] for one in done.json["differences"]}
    assert sorted(reasons) == ["a.txt", "cup\udce9.txt", "empty", "sub/b.bin"]
    assert reasons["a.txt"].startswith("its content is xxh128:")
    assert reasons["cup\udce9.txt"] == "it is not there"
    assert "out of its root" in reasons["empty"]
    assert reasons["sub/b.bin"].startswith("its time is 0 us, not ")


def test_verify_names_each_file_whose_blob_the_store_lacks(
    command: Command, manifest: Path, tmp_path: Path
) -> None:
    store = DirectoryStore(tmp_path / "store")
    store.put(Digest.of(b"alpha"), b"alpha")
    store.put(Digest.of(b""), b"")
    done = command("manifest", "verify", manifest, "--store", store.url, "--json")

    assert done.code == 1
    paths = [(one["path"], one["where"]) for one in done.json["differences"]]
    assert paths == [("cup\udce9.txt", "store"), ("sub/b.bin", "store")]
    told = command("manifest", "verify", manifest, "--store", store.url)
    assert "2 differences" in told.text


def test_diff_tells_new_changed_deleted_and_touched(
    command: Command, tree: Path, manifest: Path, tmp_path: Path
) -> None:
    (tree / "new").write_bytes(b"new")
    (tree / "a.txt").write_bytes(b"changed")
    (tree / "empty").unlink()
    os.utime(tree / "sub/b.bin", ns=(0, 0))
    after = tmp_path / "after.manifest"
    command("manifest", "snapshot", tree, "--output", after)
    done = command("manifest", "diff", manifest, after, "--json")

    paths = {kind: [entry["path"] for entry in entries] for kind, entries in done.json.items()}
    assert paths == {
        "new": ["new"],
        "changed": ["a.txt"],
        "deleted": ["empty"],
        "touched": ["sub/b.bin"],
    }
    told = command("manifest", "diff", manifest, after)
    assert (told.code, told.text.splitlines()[-1]) == (
        0,
        "1 new, 1 changed, 1 deleted, 1 touched",
    )
