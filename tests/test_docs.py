"""The documents say what the program does: every name in one is in the other."""

import ast
import importlib
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from msgspec import inspect

from agent_plugin.cli import (
    cache,
    doctor,
    ls,
    manifest,
    queue,
    results,
    source,
    task,
    transfer,
    transfer_create,
    worker_serve,
)
from agent_plugin.cli.demo_screen import DemoResult
from agent_plugin.cli.main import COMMANDS, propmaster
from agent_plugin.cli.worker_install import InstallResult
from agent_plugin.content import errors, events
from agent_plugin.content.object_snapshot import SnapshotDocument
from agent_plugin.publish.getting import GetResult
from agent_plugin.session.end import EndResult
from agent_plugin.session.job import JobDocument
from agent_plugin.session.outputs import OutputsResult
from agent_plugin.session.start_result import StartResult
from agent_plugin.session.state import FinishResult, SessionState
from agent_plugin.session.submit import SubmitResult
from agent_plugin.session.sync import SyncResult
from agent_plugin.session.sync_checkpoint import Advance, Header
from agent_plugin.settings import Settings, load
from agent_plugin.sources.spec import InputSource
from agent_plugin.transfer.query_attributes import TASK, TRANSFER, Attribute
from agent_plugin.url_handler import HandlerStatus
from agent_plugin.workers.deadline.agent_status import WorkerStatus

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Far above anything measured, so that only a hang meets it.
EXAMPLE_SECONDS = 100.0

_HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)
_CODE = re.compile(r"`([^`\n]+)`")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_REFERENCE = re.compile(r"\[(test_\w+\.py)::(test_\w+)\]")


def read(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def rows(text: str, *, first: str) -> dict[str, list[str]]:
    """Return a table's rows by their first cell, of the table whose first heading is `first`."""
    lines = iter(text.splitlines())
    found: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith(f"| {first} |"):
            next(lines)
            break
    for line in lines:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        found[f"{cells[0].strip('`')} {cells[1]}" if first == "code" else cells[0].strip("`")] = (
            cells
        )
    assert found, f"there is no table with the heading {first}"
    return found


def section(text: str, heading: str) -> str:
    """Return what stands below a heading, up to the next one of its level or above."""
    found = next(match for match in _HEADING.finditer(text) if match[2] == heading)
    rest = text[found.end() :]
    end = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def words(text: str) -> set[str]:
    """Return what is set as code in a text: whole, and keys by their last name."""
    whole = set(_CODE.findall(text))
    return whole | {word.rpartition(".")[2].removesuffix("[]") for word in whole}


# --------------------------------------------------------------------------------------- events

EVENTS = {
    name: value
    for name, value in vars(events).items()
    if name.isupper() and isinstance(value, str) and name != "LOGGER_NAME" and name[0] != "_"
}


def test_every_event_is_documented_and_no_other() -> None:
    assert set(rows(read("LOG_EVENTS.md"), first="event")) == set(EVENTS.values())


def _logged() -> Iterator[tuple[str, str, set[str]]]:
    """Yield (event, level, fields) of each place where one is logged."""
    for path in (*(ROOT / "agent_plugin").rglob("*.py"), *(ROOT / "vfs").rglob("*.py")):
        tree = ast.parse(path.read_bytes())
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            named = {
                node.targets[0].id: node.value
                for node in ast.walk(function)
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            }
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and (found := _event_of(call)):
                    yield found[0], found[1], _fields_of(call, named)


def _event_of(call: ast.Call) -> tuple[str, str] | None:
    function, first = call.func, call.args[0] if call.args else None
    if (
        isinstance(function, ast.Attribute)
        and function.attr in ("info", "warning", "error", "exception")
        and isinstance(first, ast.Attribute)
        and first.attr in EVENTS
    ):
        level = "error" if function.attr == "exception" else function.attr
        return EVENTS[first.attr], level
    return None


def _fields_of(call: ast.Call, named: dict[str, ast.expr]) -> set[str]:
    fields: ast.expr | None = next((kw.value for kw in call.keywords if kw.arg == "extra"), None)
    if isinstance(fields, ast.Name):
        fields = named[fields.id]
    if fields is None:
        return {"exception"}
    assert isinstance(fields, ast.Dict)
    return {str(key.value) for key in fields.keys if isinstance(key, ast.Constant)}


def test_levels_and_fields_of_events_are_those_of_the_program() -> None:
    documented = {
        event: (set(cells[1].split(", ")), set(_CODE.findall(cells[2])))
        for event, cells in rows(read("LOG_EVENTS.md"), first="event").items()
        if "reserved" not in cells[4]
    }
    levels: dict[str, set[str]] = {}
    fields: dict[str, set[str]] = {}
    for event, level, names in _logged():
        levels.setdefault(event, set()).add(level)
        fields.setdefault(event, set()).update(names)

    assert {event: (levels[event], fields[event]) for event in sorted(levels)} == dict(
        sorted(documented.items())
    )


# --------------------------------------------------------------------------------------- errors


def _classes(base: type[errors.PropmasterError]) -> Iterator[type[errors.PropmasterError]]:
    yield base
    for below in base.__subclasses__():
        # Others are an implementation's own, with the reference of one of these.
        if below.__module__ == errors.__name__:
            yield from _classes(below)


CLASSES = list(_classes(errors.PropmasterError))


def _exit_codes() -> dict[str, list[str]]:
    return {cells[1].strip("`"): cells for cells in _rows_of_codes().values()}


def _rows_of_codes() -> dict[str, list[str]]:
    table = read("EXIT_CODES.md")
    return rows(table[table.index("| code | reference |") :], first="code")


@pytest.mark.parametrize("failure", CLASSES, ids=lambda failure: failure.__name__)
def test_every_failure_has_its_exit_code_documented(failure: type[errors.PropmasterError]) -> None:
    cells = _exit_codes()[failure.reference]

    assert cells[0] == str(failure.exit_code)
    assert failure.__name__ in cells[2].split(", ")
    assert cells[3] == f"`{failure.code}`"


def test_no_other_exit_code_is_documented_and_none_is_given_twice() -> None:
    documented = _exit_codes()
    in_order = [int(cells[0]) for cells in documented.values()]
    assert in_order == sorted(in_order)
    names = [name for cells in documented.values() for name in cells[2].split(", ")]
    codes: dict[int, set[str]] = {}
    for failure in CLASSES:
        codes.setdefault(failure.exit_code, set()).add(failure.reference)

    assert sorted(names) == sorted(failure.__name__ for failure in CLASSES)
    shared = {code: references for code, references in codes.items() if len(references) > 1}
    assert shared == {68: {"store-unavailable", "store-throttled"}}


def test_every_reference_is_a_heading_of_troubleshooting_and_no_other() -> None:
    headings = [match[2] for match in _HEADING.finditer(read("TROUBLESHOOTING.md"))]
    told = {heading[6:-1] for heading in headings if heading.startswith("error[")}

    assert told == {failure.reference for failure in CLASSES} | {"crashed"}
    for reference, cells in _exit_codes().items():
        assert f"Exit code {cells[0]}." in section(
            read("TROUBLESHOOTING.md"), f"error[{reference}]"
        )


# -------------------------------------------------------------------------- commands and options


def _commands() -> Iterator[tuple[str, click.Command]]:
    for name in COMMANDS:
        command = importlib.import_module(COMMANDS[name][0]).command
        if isinstance(command, click.Group):
            yield from ((f"{name} {sub}", each) for sub, each in command.commands.items())
        else:
            yield name, command


@pytest.mark.parametrize(("name", "command"), list(_commands()), ids=lambda each: str(each)[:30])
def test_every_command_is_documented_with_its_options(name: str, command: click.Command) -> None:
    text = _command_section(name)

    for parameter in command.params:
        if isinstance(parameter, click.Option):
            for option in parameter.opts:
                assert re.search(rf"{option}\b", text), f"{option} of {name}"


def _command_section(name: str) -> str:
    text = read("PROTOCOL.md")
    heading = next(
        match[2]
        for match in _HEADING.finditer(text)
        if f"propmaster {name}" in match[2].split(", ")
    )
    return section(text, heading)


def test_the_commands_own_options_are_documented() -> None:
    for parameter in propmaster.params:
        assert any(f"`propmaster {option}`" in read("PROTOCOL.md") for option in parameter.opts)


RESULTS: dict[str, Any] = {
    "session start": StartResult,
    "session finish-task": FinishResult,
    "session end": EndResult,
    "submit": SubmitResult,
    "outputs list": OutputsResult,
    "ls": ls.ListResult,
    "get": GetResult,
    "outputs sync": SyncResult,
    "url-handler status": HandlerStatus,
    "results": results.JobResults,
    "manifest show": manifest.ShowResult,
    "manifest verify": manifest.VerifyResult,
    "manifest diff": manifest.DiffResult,
    "manifest snapshot": manifest.SnapshotResult,
    "cache show": cache.ShowResult,
    "cache verify": cache.VerifyResult,
    "cache collect": cache.CollectResult,
    "source resolve": source.ResolveResult,
    "transfer find": transfer.TransfersResult,
    "transfer show": transfer.ShowResult,
    "transfer create": transfer_create.CreateResult,
    "transfer run": transfer_create.RunResult,
    "task add": task.TasksResult,
    "transfer set": transfer.TransfersResult,
    "transfer pause": transfer.TransfersResult,
    "task find": task.TasksResult,
    "task set": task.TasksResult,
    "queue show": queue.QueuesResult,
    "queue explain": queue.ExplainResult,
    "worker install": InstallResult,
    "worker status": WorkerStatus,
    "doctor": doctor.DoctorResult,
    "demo": DemoResult,
    "worker serve": worker_serve.ServeResult,
}


def _keys(kind: inspect.Type, *, below: bool = True) -> Iterator[str]:
    """Yield the keys of a struct, and of the structs that are in it."""
    if isinstance(kind, inspect.StructType):
        for field in kind.fields:
            yield field.encode_name
            if below:
                yield from _keys(field.type)
    elif isinstance(kind, inspect.ListType | inspect.VarTupleType | inspect.CollectionType):
        yield from _keys(kind.item_type)
    elif isinstance(kind, inspect.UnionType):
        for each in kind.types:
            yield from _keys(each)


@pytest.mark.parametrize("name", RESULTS)
def test_every_key_of_a_result_is_documented(name: str) -> None:
    # What submit prints is a part of the job document, which is described as such.
    below = RESULTS[name] is not SubmitResult
    keys = set(_keys(inspect.type_info(RESULTS[name]), below=below))

    assert keys - words(_command_section(name)) == set()


@pytest.mark.parametrize("attribute", [*TRANSFER, *TASK], ids=lambda attribute: attribute.name)
def test_every_attribute_of_transfers_and_tasks_is_documented(attribute: Attribute) -> None:
    rows_of_attributes = section(read("PROTOCOL.md"), "Attributes").splitlines()

    names = ", ".join(f"`{alias}`" for alias in attribute.aliases)
    first = f"| `{attribute.name}`{f' ({names})' if names else ''} | {attribute.kind} | "
    assert [row for row in rows_of_attributes if row == f"{first}{attribute.about} |"]


def test_every_key_of_the_job_document_is_documented() -> None:
    keys = set(_keys(inspect.type_info(JobDocument)))

    text = read("PROTOCOL.md")
    documented = words(section(text, "The job document")) | words(section(text, "Input sources"))
    assert keys - documented == set()


def test_every_field_of_an_input_source_is_documented() -> None:
    keys = set(_keys(inspect.type_info(InputSource)))

    assert keys - words(section(read("PROTOCOL.md"), "Input sources")) == set()


def test_every_key_of_a_snapshot_of_objects_is_documented() -> None:
    keys = set(_keys(inspect.type_info(SnapshotDocument)))

    assert keys - words(section(read("PROTOCOL.md"), "The snapshot")) == set()


def test_the_example_of_a_job_document_is_one() -> None:
    text = section(read("PROTOCOL.md"), "The job document")
    example = text[text.index("```json\n") + len("```json\n") :].partition("```")[0]

    job = JobDocument.decode(example.encode(), "docs/PROTOCOL.md")

    assert job.store_url == "s3://studio-jobs/DeadlineCloud"


@pytest.mark.parametrize("name", ["session start", "session finish-task"])
def test_the_example_of_a_result_is_one(name: str) -> None:
    example = _command_section(name).partition("```json\n")[2].partition("```")[0]

    decoded = msgspec.json.decode(example, type=RESULTS[name])

    assert set(json.loads(example)) == set(json.loads(msgspec.json.encode(decoded)))


def test_every_key_of_the_state_file_is_documented() -> None:
    keys = {field.encode_name for field in msgspec.structs.fields(SessionState)}
    [roots] = [f for f in msgspec.structs.fields(SessionState) if f.name == "roots"]
    keys |= set(_keys(inspect.type_info(roots.type), below=True))

    text = read("PROTOCOL.md")
    # Of a source the state has what the job document says.
    documented = words(section(text, "The state file")) | words(section(text, "Input sources"))
    assert keys - documented == set()


def test_every_key_of_the_checkpoint_is_documented() -> None:
    keys = {key for kind in (Header, Advance) for key in _keys(inspect.type_info(kind))}

    assert keys - words(section(read("PROTOCOL.md"), "The checkpoint of a sync")) == set()


@pytest.mark.parametrize(
    ("schema", "heading"),
    [("transfer/ledger.sql", "The ledger"), ("content/schema.sql", "The local index")],
)
def test_every_table_and_column_is_documented(schema: str, heading: str) -> None:
    connection = sqlite3.connect(":memory:")
    connection.executescript((ROOT / "agent_plugin" / schema).read_text(encoding="utf-8"))
    tables = [
        name
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        # SQLite's own, for AUTOINCREMENT.
        if name != "sqlite_sequence"
    ]
    columns = {
        row[1] for table in tables for row in connection.execute(f"PRAGMA table_info({table})")
    }
    connection.close()

    assert ({*tables} | columns) - words(section(read("PROTOCOL.md"), heading)) == set()


def test_every_setting_is_documented_with_its_key() -> None:
    settings = inspect.type_info(Settings)
    assert isinstance(settings, inspect.StructType)
    keys = {
        f"{table.encode_name}.{key}"
        for table in settings.fields
        for key in _keys(table.type, below=False)
    }

    assert set(rows(section(read("OPERATING.md"), "Settings"), first="key")) == keys


def test_the_example_of_a_settings_file_has_every_key_and_is_valid(tmp_path: Path) -> None:
    text = section(read("OPERATING.md"), "Settings")
    example = tmp_path / "config.toml"
    example.write_text(text[text.index("```toml\n") + len("```toml\n") :].partition("```")[0])

    settings = load(example, environment={})

    assert (
        settings.store
        == load(None, environment={"HOME": "/x"}, default_file=tmp_path / "absent").store
    )
    for key in rows(text, first="key"):
        assert f"\n{key.partition('.')[2]} = " in example.read_text()


def test_the_example_of_a_queues_table_is_valid(tmp_path: Path) -> None:
    text = section(read("OPERATING.md"), "Queues")
    example = tmp_path / "config.toml"
    example.write_text(text[text.index("```toml\n") + len("```toml\n") :].partition("```")[0])

    settings = load(example, environment={"HOME": "/x"})

    [queue_id] = settings.queues
    assert settings.for_queue(queue_id).paths.cache_dir == Path("/fast/propmaster")
    assert settings.for_queue(queue_id).store.concurrency == 32


# ------------------------------------------------------------------------------------ semantics


def _tests() -> dict[str, set[str]]:
    """Return the names of the test functions by file name."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        names = {
            node.name
            for node in ast.walk(ast.parse(path.read_bytes()))
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        }
        found.setdefault(path.name, set()).update(names)
    return found


def test_every_promise_names_a_test_that_exists() -> None:
    tests = _tests()
    bullets = [line for line in read("SEMANTICS.md").splitlines() if line.startswith("- ")]
    assert len(bullets) > 100

    without = [line for line in bullets if not re.search(r"\.( \[[^]]+\])+$", line)]
    wrong = [
        f"{file}::{name}"
        for line in bullets
        for file, name in _REFERENCE.findall(line)
        if name not in tests.get(file, set())
    ]
    assert (without, wrong) == ([], [])
    assert not [line for line in bullets if not _REFERENCE.search(line)]


def test_no_promise_is_held_by_slow_tests_alone() -> None:
    slow = {
        (path.name, node.name)
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.FunctionDef)
        and "pytest.mark.slow" in [ast.unparse(decorator) for decorator in node.decorator_list]
    }
    assert slow

    bullets = [line for line in read("SEMANTICS.md").splitlines() if line.startswith("- ")]
    assert [line for line in bullets if set(_REFERENCE.findall(line)) <= slow] == []


# ---------------------------------------------------------------------------------------- links


def _anchors(path: Path) -> set[str]:
    text = _FENCE.sub("", path.read_text(encoding="utf-8"))
    return {
        re.sub(r"[^\w\- ]", "", match[2].lower()).replace(" ", "-")
        for match in _HEADING.finditer(text)
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in _LINK.findall(_FENCE.sub("", document.read_text(encoding="utf-8"))):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (document.parent / file).resolve() if file else document
        assert path.exists(), target
        assert not anchor or anchor in _anchors(path), target


def test_every_document_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")

    for path in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{path.name})" in readme


def test_the_readme_names_the_packages_that_the_two_commands_need() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    lists = re.findall(r"^(?:VENV|TEST)_PACKAGES := (.+)$", makefile, re.MULTILINE)
    named = words((ROOT / "README.md").read_text(encoding="utf-8"))

    assert len(lists) == 2
    assert {package for line in lists for package in line.split()} - named == set()


def test_every_benchmark_has_its_section() -> None:
    names = {
        path.stem.removeprefix("bench_") for path in (ROOT / "tests/benchmarks").glob("bench_*.py")
    }
    headings = {match[2] for match in _HEADING.finditer(read("BENCHMARKS.md"))}

    assert names - headings == set()


# -------------------------------------------------------------------------------------- example


def test_the_worked_example_runs(tmp_path: Path) -> None:
    text = read("PROTOCOL.md")
    script = text[text.index("```sh run\n") + len("```sh run\n") :].partition("\n```")[0]
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
        "HOME": str(tmp_path),
        "AWS_EC2_METADATA_DISABLED": "true",
    }

    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=EXAMPLE_SECONDS,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("a scene\nA SCENE\n")
    assert (tmp_path / "show/cache/cloth.abc").read_text() == "A SCENE\n"
    assert not list(tmp_path.glob("session*/assetroot-*"))
