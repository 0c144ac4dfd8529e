"""Whatever is in the file that the agent's scripts are given: it is read, or refused by name."""

import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent_plugin.content.errors import InputError, JobInvalidError, LocalReadError
from agent_plugin.content.manifest import FileEntry, Manifest, encode
from agent_plugin.session.job import JobDocument
from agent_plugin.session.roots import session_directory_name
from agent_plugin.workers.deadline.properties import (
    Arguments,
    SessionDirectory,
    given_inputs,
    job_of,
    parse_arguments,
    read_roots,
)

ARGUMENTS = Arguments("bucket", "prefix", "roots.json")
IDS = {
    "DEADLINE_FARM_ID": "farm-" + "1" * 32,
    "DEADLINE_QUEUE_ID": "queue-" + "2" * 32,
    "DEADLINE_JOB_ID": "job-" + "3" * 32,
}
# Text as a hostile writer would have it: separators, dots, NUL, lone surrogates.
PATHS = st.one_of(
    st.text(max_size=20),
    st.text(alphabet="/.a\0\\", max_size=12),
    st.sampled_from(
        ["/etc", "/etc/passwd", "/", "..", "../x", "link/x", "link", "//x", "/a/../b", "\udc80"]
    ),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | PATHS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PATHS, inner, max_size=3),
    max_leaves=8,
)


def element(session: Path, root_path: str = "/mnt/show") -> dict[str, Any]:
    """Return a root as the agent writes it."""
    return {
        "manifestProperties": {
            "rootPath": root_path,
            "rootPathFormat": "posix",
            "inputManifestPath": "farm/queue/Inputs/guid/hash_input",
            "inputManifestHash": "0" * 32,
            "outputRelativeDirectories": ["renders"],
        },
        "localManifestPaths": [f"{session}/manifests/x_job"],
        "localRootPath": f"{session}/{session_directory_name(root_path)}",
        "localInputManifestPath": None,
    }


def read(session: Path, content: bytes) -> JobDocument:
    """Do with a file all that a call does before it begins."""
    (session / "roots.json").write_bytes(content)
    directory = SessionDirectory(session, None)
    roots = read_roots(directory, "roots.json")
    for root in roots:
        mapped = not root.local_root.is_relative_to(session)
        assert not mapped or root.properties.file_system_location_name is not None
        assert root.local_root.is_absolute()
        assert ".." not in root.local_root.parts
    job = job_of(roots, ARGUMENTS, IDS, session)
    given_inputs(roots, directory)
    return job


def refused_or_read(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        session = Path(name)
        (session / "link").symlink_to("/etc")
        with suppress(InputError, LocalReadError):
            read(session, content)


def test_what_the_agent_writes_is_read(tmp_path: Path) -> None:
    roots = [element(tmp_path), element(tmp_path, "/mnt/other")]

    job = read(tmp_path, json.dumps(roots).encode())

    assert [manifest.root_path for manifest in job.attachments.manifests] == [
        "/mnt/show",
        "/mnt/other",
    ]


def test_a_root_that_is_listed_twice_counts_once(tmp_path: Path) -> None:
    job = read(tmp_path, json.dumps([element(tmp_path), element(tmp_path)]).encode())

    assert len(job.attachments.manifests) == 1


def test_of_manifests_the_one_that_is_named_last_wins(tmp_path: Path) -> None:
    """The agent writes what each step's sync brings under one name, and lists it again."""
    for name in "12":
        entry = FileEntry(name * 32, 0, "renders/x", 1)
        (tmp_path / name).write_bytes(encode(Manifest.of([entry])))

    merged = SessionDirectory(tmp_path, None).read_manifests(["1", "2", "1"])

    assert merged is not None
    assert [entry.hash for entry in merged.entries] == ["1" * 32]


def test_a_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    (tmp_path / "four").write_bytes(b"1234")
    directory = SessionDirectory(tmp_path, None)

    assert directory.read("four", most=4) == b"1234"
    with pytest.raises(JobInvalidError, match="more than 3 bytes"):
        directory.read("four", most=3)


@given(st.binary(max_size=60))
@example(b"[" * 100_000)
@example(b"\xff\xfe")
@example(b"")
def test_bytes_that_are_no_json_are_refused(content: bytes) -> None:
    refused_or_read(content)


@given(VALUES)
def test_json_that_is_something_else_is_refused(value: Any) -> None:
    refused_or_read(json.dumps(value).encode())


@given(data=st.data())
def test_a_root_with_anything_in_a_place_is_read_or_refused(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        session = Path(name)
        (session / "link").symlink_to("/etc")
        roots = [element(session), element(session, "/mnt/other")]
        place: Any = data.draw(st.sampled_from([roots[1], roots[1]["manifestProperties"]]))
        key = data.draw(st.sampled_from([*place, "fileSystemLocationName", "more"]))
        place[key] = data.draw(VALUES | PATHS.map(lambda text: f"{session}/{text}"))
        with suppress(InputError, LocalReadError):
            read(session, json.dumps(roots).encode())


@given(st.lists(st.sampled_from(["-s3", "-wp", "--s3-uri", "s3://b/p", "x", "-h", ""]) | PATHS))
def test_a_command_line_is_understood_or_refused(arguments: list[str]) -> None:
    with suppress(InputError):
        parsed = parse_arguments(arguments)
        assert "/" not in parsed.bucket
        assert parsed.root_prefix
