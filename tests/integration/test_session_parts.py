"""Sources of which each task takes its part, by a parameter of the task."""

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest

from agent_plugin.content import events
from agent_plugin.content.errors import (
    ObjectChangedError,
    PathClashError,
    SessionStateError,
    SourceEmptyError,
    SourceInvalidError,
    UnsafePathError,
)
from agent_plugin.session.bring import bring
from agent_plugin.session.job import JobDocument
from agent_plugin.sources.parts import share_of
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.hooks import Host, action
from tests.servers.proxied_object import until
from tests.servers.s3_server import S3Server
from tests.servers.source_jobs import content_below, job_with_sources, source_of, store_objects

COUNT = 3
NAMES = [f"{at:03}.exr" for at in range(12)]


@pytest.fixture
def host(tmp_path: Path, s3: S3Server) -> Host:
    return Host(tmp_path / "host", f"file://{tmp_path}/store", environment=s3.environment)


@pytest.fixture
def proxied(tmp_path: Path, s3: S3Server, fault_proxy: FaultProxy) -> Host:
    """A host that reaches the objects by way of the proxy."""
    return Host(
        tmp_path / "host",
        f"file://{tmp_path}/store",
        environment=s3.environment_at(fault_proxy.url),
        store={"attempts": 1},
    )


@pytest.fixture
def session_dir(tmp_path: Path) -> Path:
    return tmp_path / "sessions" / "session-1"


def parted(s3: S3Server, prefix: str, **fields: Any) -> dict[str, Any]:
    """Return a source whose part the task parameter Part says.

    Of each name its first characters count, and not the prefix, which is another in each run: each
    part has some of NAMES.
    """
    partition = {
        "Type": "substring",
        "StartIndex": 0,
        "EndIndex": 3,
        "Count": COUNT,
        "IndexParameter": "Part",
    }
    return source_of(s3, prefix, Partition=partition, **fields)


def shares(job: JobDocument, content: Mapping[str, bytes]) -> list[dict[str, bytes]]:
    """Return what each part of a job's first source has, told by another way than the snapshot."""
    source = job.input_sources[0]
    share = share_of(source, 0)
    return [
        {
            name: data
            for name, data in content.items()
            if share.part_of(f"{source.key}{name}") == part
        }
        for part in range(COUNT)
    ]


def test_s8_each_task_has_the_part_that_its_parameter_says(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path
) -> None:
    """The mutation that was caught: the next part placed over the one before."""
    content = store_objects(s3, s3_prefix, dict.fromkeys(NAMES, 1000))
    job = job_with_sources(host, parted(s3, s3_prefix, Target="/in/plates"))
    parts = shares(job, content)
    assert all(parts), "a part without objects shows nothing"

    [told] = host.start(job, session_dir).sources

    place = session_dir / "in/plates"
    assert (told.files, told.bytes, told.index_parameter) == (12, 12_000, "Part")
    assert (told.file_system, told.part, told.bytes_fetched) == ("", None, 0)
    assert not place.exists()
    for part in (0, 2, 1):
        [source] = host.begin_task(session_dir, Part=str(part), Frame="7").sources
        assert (source.part, source.file_system) == (part, "COPIED")
        assert (source.files, source.bytes_fetched) == (len(parts[part]), 1000 * len(parts[part]))
        assert content_below(place) == parts[part]
        assert [each.name for each in place.parent.iterdir()] == ["plates"]
        assert host.finish_task(session_dir, action(task_number=part)).files == 0
    assert host.end(session_dir).removed
    assert list(session_dir.iterdir()) == []


def test_s8_a_part_that_is_in_place_stays_as_the_task_before_left_it(
    proxied: Host, s3: S3Server, s3_prefix: str, session_dir: Path, fault_proxy: FaultProxy
) -> None:
    """Caught: a part that is brought anew whatever is in place."""
    content = store_objects(s3, s3_prefix, dict.fromkeys(NAMES, 1000))
    job = job_with_sources(proxied, parted(s3, s3_prefix))
    proxied.start(job, session_dir)
    proxied.begin_task(session_dir, Part="1")
    (session_dir / "inputs/left by a task").write_bytes(b"x")
    fault_proxy.forget()

    [told] = proxied.begin_task(session_dir, Part="1").sources

    part = shares(job, content)[1]
    assert (told.bytes_fetched, told.bytes_reused) == (0, 1000 * len(part))
    assert fault_proxy.requests == []
    assert content_below(session_dir / "inputs") == {**part, "left by a task": b"x"}


def test_s8_the_bucket_is_listed_once_and_a_part_is_of_that_listing(
    proxied: Host, s3: S3Server, s3_prefix: str, session_dir: Path, fault_proxy: FaultProxy
) -> None:
    """The mutation that was caught: a part that is resolved when its task begins."""
    content = store_objects(s3, s3_prefix, dict.fromkeys(NAMES, 1000))
    job = job_with_sources(proxied, parted(s3, s3_prefix))
    parts = shares(job, content)
    proxied.start(job, session_dir)
    store_objects(s3, s3_prefix, {f"later-{at}": b"x" for at in range(9)})
    changed = min(parts[2])
    store_objects(s3, s3_prefix, {changed: b"another"})
    fault_proxy.forget()

    proxied.begin_task(session_dir, Part="0")
    assert content_below(session_dir / "inputs") == parts[0]
    with pytest.raises(ObjectChangedError, match=changed):
        proxied.begin_task(session_dir, Part="2")

    assert not any("list-type" in request.query for request in fault_proxy.requests)
    assert not (session_dir / "inputs").exists(), "of the part before nothing may be left to see"
    proxied.begin_task(session_dir, Part="1")
    assert content_below(session_dir / "inputs") == parts[1]


NOT_TOLD = "task parameter Part, which says the part of plates, was not told"
NO_PART = [
    ({}, f"{NOT_TOLD} (none was told)", ""),
    ({"Part": "1-3"}, "task parameter Part: '1-3' is no whole number", "of type INT"),
    ({"Part": "3"}, "task parameter Part: 3 is not one of the 3 parts of plates", "0 to 2"),
]
NO_PART_EITHER = [
    ({"Frame": "1"}, f"{NOT_TOLD} (told: Frame)", ""),
    ({"Part": "1_0"}, "task parameter Part: '1_0' is no whole number", "of type INT"),
    ({"Part": ""}, "task parameter Part: '' is no whole number", "of type INT"),
    ({"Part": "9" * 5000}, "task parameter Part: '9999", "of type INT"),
    ({"Part": "-1"}, "task parameter Part: -1 is not one of the 3 parts", "0 to 2"),
]


@pytest.mark.parametrize(
    ("told", "message", "hint"),
    [*NO_PART, *(pytest.param(*each, marks=pytest.mark.slow) for each in NO_PART_EITHER)],
)
def test_s8_a_parameter_that_says_no_part_is_named_and_leaves_no_part(
    host: Host,
    s3: S3Server,
    s3_prefix: str,
    session_dir: Path,
    told: dict[str, str],
    message: str,
    hint: str,
) -> None:
    """The mutation that was caught: the part of the task before left where the next one looks."""
    store_objects(s3, s3_prefix, dict.fromkeys(NAMES, 10))
    host.start(job_with_sources(host, parted(s3, s3_prefix, Alias="plates")), session_dir)
    host.begin_task(session_dir, Part="0")

    with pytest.raises(SourceInvalidError) as caught:
        host.begin_task(session_dir, **told)

    assert message in caught.value.message
    assert hint in caught.value.hint
    assert not (session_dir / "inputs").exists()


def test_s8_an_empty_part_is_an_error_unless_that_is_fine(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path, expected_events: set[str]
) -> None:
    """Caught: no error for an empty part; one where OnEmpty says that it is fine."""
    store_objects(s3, s3_prefix, {"only": b"x"})
    job = job_with_sources(
        host,
        parted(s3, s3_prefix, Alias="plates"),
        parted(s3, s3_prefix, Target="free", OnEmpty="ok"),
        parted(s3, s3_prefix, Target="spare", Required=False),
    )
    whole = [bool(share) for share in shares(job, {"only": b"x"})]
    full, empty = whole.index(True), whole.index(False)
    host.start(job, session_dir)

    host.begin_task(session_dir, Part=str(full))
    assert (session_dir / "spare/only").exists()
    with pytest.raises(SourceEmptyError, match=f"plates: part {empty} of 3 has none of 1 objects"):
        host.begin_task(session_dir, Part=str(empty))
    assert not (session_dir / "inputs").exists()

    host.end(session_dir)
    expected_events.add(events.SOURCE_SKIPPED)
    host.start(job_with_sources(host, *_sources(job)[1:]), session_dir)
    free, spare = host.begin_task(session_dir, Part=str(empty)).sources
    assert (free.files, free.file_system, free.part) == (0, "COPIED", empty)
    assert list((session_dir / "free").iterdir()) == []
    assert (spare.file_system, spare.part) == ("", None)
    assert "has none of 1 objects" in spare.reason
    assert not (session_dir / "spare").exists()


def _sources(job: JobDocument) -> list[dict[str, Any]]:
    import msgspec  # noqa: PLC0415 - used once

    return [msgspec.to_builtins(source) for source in job.input_sources]


@pytest.mark.slow
def test_s8_a_begin_that_is_killed_leaves_no_part_and_the_next_takes_it_up(
    proxied: Host, s3: S3Server, s3_prefix: str, session_dir: Path, fault_proxy: FaultProxy
) -> None:
    """The mutation that was caught: a part that is taken for in place before it is."""
    content = store_objects(s3, s3_prefix, dict.fromkeys((f"{at:03}" for at in range(90)), 20_000))
    job = job_with_sources(proxied, parted(s3, s3_prefix))
    parts = shares(job, content)
    proxied.start(job, session_dir)
    proxied.begin_task(session_dir, Part="0")
    fault_proxy.inject(Fault.DRIP, key="/[0-9]{3}$", bytes_per_second=200_000)
    arguments = ("session", "begin-task", "--session-dir", session_dir, "--parameter", "Part=1")
    process = proxied.popen(*map(str, arguments))
    built = session_dir / ".propmaster-inputs.partial"
    until(lambda: len(parts[1].keys() & {each.name for each in built.glob("*")}) > 5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    fault_proxy.clear()

    assert not (session_dir / "inputs").exists()
    [told] = proxied.begin_task(session_dir, Part="1").sources

    assert content_below(session_dir / "inputs") == parts[1]
    assert told.bytes_reused > 0
    assert told.bytes_reused + told.bytes_fetched == told.bytes
    assert not built.exists()


def test_s8_a_session_that_is_started_again_has_no_part_until_a_task_begins(
    proxied: Host, s3: S3Server, s3_prefix: str, session_dir: Path, fault_proxy: FaultProxy
) -> None:
    """Caught: a part that a start leaves in place; one that it removes, to be fetched again."""
    content = store_objects(s3, s3_prefix, dict.fromkeys(NAMES, 1000))
    job = job_with_sources(proxied, parted(s3, s3_prefix))
    with pytest.raises(SessionStateError, match="no session was started"):
        proxied.begin_task(session_dir, Part="0")
    proxied.start(job, session_dir)
    proxied.begin_task(session_dir, Part="0")

    [again] = proxied.start(job, session_dir).sources
    there = (session_dir / "inputs").exists()
    fault_proxy.forget()
    [told] = proxied.begin_task(session_dir, Part="0").sources

    assert (again.file_system, again.part, there) == ("", None, False)
    assert (told.bytes_fetched, told.bytes_reused) == (0, told.bytes)
    assert fault_proxy.count("GET", r"\.exr$") == 0
    assert content_below(session_dir / "inputs") == shares(job, content)[0]


def test_s8_what_a_job_puts_in_the_place_of_a_part_leads_nowhere_and_goes(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path, tmp_path: Path
) -> None:
    content = store_objects(s3, s3_prefix, dict.fromkeys(NAMES, 100))
    job = job_with_sources(host, parted(s3, s3_prefix, Target="in/plates"))
    parts = shares(job, content)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "plates").mkdir(parents=True)
    (elsewhere / "plates/kept").write_bytes(b"the host's")
    (session_dir / "in").mkdir(parents=True)
    host.start(job, session_dir)
    place = session_dir / "in/plates"

    place.symlink_to(elsewhere)
    host.begin_task(session_dir, Part="0")
    assert content_below(place) == parts[0]
    (place / next(iter(parts[0]))).write_bytes(b"a task's")
    (place / "own").write_bytes(b"a task's")
    host.begin_task(session_dir, Part="1")
    assert content_below(place) == parts[1]
    place.rename(session_dir / "moved")
    place.write_bytes(b"a task's")
    host.begin_task(session_dir, Part="2")
    assert content_below(place) == parts[2]
    (session_dir / "in").rename(session_dir / "away")
    (session_dir / "in").symlink_to(elsewhere)
    with pytest.raises(UnsafePathError, match="behind a symbolic link"):
        host.begin_task(session_dir, Part="0")

    assert content_below(elsewhere) == {"plates/kept": b"the host's"}
    host.end(session_dir)
    assert content_below(elsewhere) == {"plates/kept": b"the host's"}


def test_s8_a_link_that_is_planted_while_a_task_begins_leads_nowhere(
    host: Host,
    s3: S3Server,
    s3_prefix: str,
    session_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Caught: a source behind a link taken for a directory of the host's own."""
    store_objects(s3, s3_prefix, dict.fromkeys(NAMES, 100))
    host.start(job_with_sources(host, parted(s3, s3_prefix, Target="in/plates")), session_dir)
    host.begin_task(session_dir, Part="0")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "plates").mkdir(parents=True)

    def bring_later(*arguments: Any) -> Any:
        (session_dir / "in").rename(session_dir / "away")
        (session_dir / "in").symlink_to(elsewhere)
        return bring(*arguments)

    monkeypatch.setattr("agent_plugin.session.begin_task.bring", bring_later)
    with pytest.raises(UnsafePathError, match="behind a symbolic link"):
        host.begin_task(session_dir, Part="1")

    assert content_below(elsewhere) == {}


def test_s8_what_is_in_the_place_of_a_part_before_the_session_is_refused(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path
) -> None:
    """Caught: no look at what is in the place, when nothing is brought there yet."""
    store_objects(s3, s3_prefix, dict.fromkeys(NAMES, 100))
    (session_dir / "inputs").mkdir(parents=True)
    (session_dir / "inputs/own").write_bytes(b"somebody's")

    with pytest.raises(PathClashError, match="is there already"):
        host.start(job_with_sources(host, parted(s3, s3_prefix)), session_dir)

    assert content_below(session_dir / "inputs") == {"own": b"somebody's"}


def test_s8_begin_task_as_the_command_that_a_runtime_calls(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path
) -> None:
    """The worked example of docs/PROTOCOL.md, by its words."""
    content = store_objects(s3, s3_prefix, dict.fromkeys(NAMES, 1000))
    job = job_with_sources(host, parted(s3, s3_prefix, Target="plates"))
    parts = shares(job, content)
    started = host.run(*host.start_arguments(job, session_dir)[:-1])
    begin = ("session", "begin-task", "--session-dir", str(session_dir), "--parameter")

    first = host.call(*begin, "Part=0")
    second = host.run(
        "session", "begin-task", "--parameter", "Part=1", PROPMASTER_SESSION_DIR=str(session_dir)
    )
    bad = host.run(*begin, "Part=x")
    with pytest.raises(click.BadParameter, match="Part is said twice"):
        host.call(*begin, "Part=0", "--parameter", "Part=1")

    assert (
        "12 files, 12.0 kB; each task has the part that its parameter Part says" in started.stdout
    )
    assert first["sources"][0] == {
        "source": f"s3://{s3.bucket}/{s3_prefix}/",
        "alias": "",
        "localRoot": str(session_dir / "plates"),
        "fileSystem": "COPIED",
        "files": len(parts[0]),
        "bytes": 1000 * len(parts[0]),
        "bytesFetched": 1000 * len(parts[0]),
        "bytesReused": 0,
        "reason": "",
        "indexParameter": "Part",
        "part": 0,
    }
    assert second.returncode == 0, second.stderr
    assert f"part 1 -> {session_dir}/plates: {len(parts[1])} files" in second.stdout
    assert bad.returncode == 97
    assert "error[source-invalid]: task parameter Part: 'x' is no whole number" in bad.stderr


@pytest.mark.slow
def test_s8_within_a_wrap_hook_the_task_says_its_part_and_the_hook_stores_once(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path
) -> None:
    """A hook is told no task parameters: the wrapped `openjd run` says them.

    The mutations that were caught: outputs stored by both; the last task's part left for one that
    says none.
    """
    content = store_objects(s3, s3_prefix, dict.fromkeys(NAMES, 1000))
    job = job_with_sources(host, parted(s3, s3_prefix, Target="plates"))
    parts = shares(job, content)
    entered = host.run("openjd", "enter", "--session-dir", session_dir, "--job", host.job_file(job))
    assert f"openjd_env: PROPMASTER_SOURCE_0={session_dir}/plates" in entered.stdout
    [root] = [line for line in entered.stdout.splitlines() if "PROPMASTER_ROOT_0=" in line]
    renders = f"{root.partition('=')[2]}/renders"
    hook = ("openjd", "run", "--step=Render", "--")
    task = [*host.argv()[:-2], "openjd", "run", "--config", str(host.config)]
    script = f'mkdir -p {renders}; ls {session_dir}/plates > {renders}/"$0"'

    known = {"PROPMASTER_SESSION_DIR": str(session_dir), "PROPMASTER_CONFIG": str(host.config)}
    ended = [
        host.run(
            *(*hook, *task, f"--parameter=Part={part}", "--", "sh", "-c", script, str(part)),
            **known,
        )
        for part in (0, 2)
    ]
    silent = host.run(*hook, "sh", "-c", f"ls {session_dir}/plates", **known)

    assert [each.returncode for each in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    assert [each.stdout.count("output files") for each in ended] == [1, 1]
    for part in (0, 2):
        assert Path(renders, str(part)).read_text().split() == sorted(parts[part])
    assert "until the task says --parameter Part" in silent.stdout
    assert "No such file or directory" in silent.stderr
    assert silent.returncode == 2
