"""Imports point one way: cli, then session, then transfer, then content; vfs stands beside."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    path.relative_to(ROOT).as_posix()
    for package in ("agent_plugin", "vfs")
    for path in (ROOT / package).rglob("*.py")
)

CONTENT = ["agent_plugin.content"]
TRANSFER = [*CONTENT, "agent_plugin.transfer"]
SETTINGS = [
    *(*CONTENT, "agent_plugin.schema", "agent_plugin.sizes"),
    *("agent_plugin.settings", "agent_plugin.settings_file", "agent_plugin.settings_publishers"),
    # What publishers a queue has.
    *("agent_plugin.publish.placeholders", "agent_plugin.publish.spec"),
]
HOST = [*SETTINGS, *TRANSFER, "agent_plugin.services"]

# What publishes at a task's end; none of it knows of sessions.
PUBLISHING = [
    f"agent_plugin.publish.{module}"
    for module in (
        *("archive", "contents", "destination", "leftovers", "outputs", "packed"),
        *("placeholders", "plain", "publisher", "result_documents", "run", "spec"),
    )
]

# What a module may import of ours, by the longest path here that it starts with. `agent_plugin`
# itself, which is the version and nothing else, anybody may.
MAY_IMPORT = {
    "agent_plugin/content/": CONTENT,
    "agent_plugin/transfer/": [*TRANSFER, "agent_plugin.sizes"],
    **{
        f"{module.replace('.', '/')}.py": [*TRANSFER, "agent_plugin.schema", *PUBLISHING]
        for module in PUBLISHING
    },
    "agent_plugin/sources/": [*CONTENT, "agent_plugin.schema", "agent_plugin.sources"],
    "agent_plugin/session/": [
        *(*TRANSFER, *PUBLISHING, "agent_plugin.schema", "agent_plugin.session"),
        "agent_plugin.sources",
    ],
    "agent_plugin/publish/": [*TRANSFER, "agent_plugin.schema", "agent_plugin.publish"],
    # What a job's executions left is found by the manifests of its sessions.
    "agent_plugin/publish/results.py": [
        *(*TRANSFER, "agent_plugin.publish"),
        *("agent_plugin.session.manifests", "agent_plugin.session.roots"),
    ],
    "agent_plugin/farm.py": [*CONTENT, "agent_plugin.schema", "agent_plugin.session"],
    "agent_plugin/desktop_entry.py": CONTENT,
    "agent_plugin/mime_apps.py": [],
    "agent_plugin/url_handler.py": [
        *CONTENT,
        *("agent_plugin.desktop_entry", "agent_plugin.mime_apps"),
        "agent_plugin.session.download_url",
    ],
    "agent_plugin/schema.py": CONTENT,
    "agent_plugin/sizes.py": [],
    "agent_plugin/settings": SETTINGS,
    "agent_plugin/services.py": [*SETTINGS, *TRANSFER],
    "agent_plugin/transfers.py": HOST,
    "agent_plugin/session_logs.py": SETTINGS,
    "agent_plugin/queue_settings.py": [*HOST, "agent_plugin.session.queues"],
    "agent_plugin/ending.py": [
        *(*HOST, "agent_plugin.publish"),
        *("agent_plugin.session.publishing", "agent_plugin.session.state"),
    ],
    "agent_plugin/mounting.py": [
        *(*HOST, "agent_plugin.session.mounts", "agent_plugin.session.mount_request"),
        "agent_plugin.session_logs",
    ],
    "agent_plugin/workers/": [
        *(*HOST, "agent_plugin.mounting", "agent_plugin.session", "agent_plugin.workers"),
        *("agent_plugin.ending", "agent_plugin.queue_settings", "agent_plugin.session_logs"),
    ],
    "agent_plugin/doctor": [
        *(*SETTINGS, *TRANSFER, "agent_plugin.session.mounts"),
        *("agent_plugin.session.mount_control", "agent_plugin.session.mount_request"),
        *("agent_plugin.doctor_files", "agent_plugin.doctor_mounts"),
        "agent_plugin.workers.deadline",
    ],
    "agent_plugin/cli/": ["agent_plugin"],
    "agent_plugin/__init__.py": [],
    "agent_plugin/__main__.py": ["agent_plugin.cli"],
    "vfs/": ["vfs", *CONTENT],
}

S3_LIBRARIES = ("boto3", "botocore", "obstore", "mypy_boto3_s3")
# demo_store.py signs one request by hand, to see that the server it started is its own; farm.py
# asks the Deadline API, which boto3 knows as well.
KNOW_S3 = ("agent_plugin/content/s3_", "agent_plugin/cli/demo_store.py", "agent_plugin/farm.py")

NAMED_AFTER_NOTHING = {"utils", "util", "helpers", "helper", "common", "manager", "base", "misc"}


def _imports(module: str) -> Iterator[str]:
    """Yield every module that a module imports, wherever in it."""
    package = module.removesuffix(".py").split("/")[:-1]
    tree = ast.parse((ROOT / module).read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            # `from agent_plugin.content import events` imports a module, too.
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def _is_below(name: str, packages: tuple[str, ...] | list[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _allowed(module: str) -> list[str]:
    return MAY_IMPORT[max((path for path in MAY_IMPORT if module.startswith(path)), key=len)]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_is_below_it(module: str) -> None:
    ours = {name for name in _imports(module) if _is_below(name, ["agent_plugin", "vfs"])}
    ours.discard("agent_plugin.__version__")

    assert sorted(name for name in ours if not _is_below(name, _allowed(module))) == []


@pytest.mark.parametrize("module", [module for module in MODULES if module[:4] != "vfs/"])
def test_nothing_imports_the_mount_which_is_a_process_of_its_own(module: str) -> None:
    assert [name for name in _imports(module) if _is_below(name, ["vfs"])] == []


def test_only_the_s3_store_knows_the_libraries_for_s3() -> None:
    knowing = {module for module in MODULES for name in _imports(module) if _is_s3(name)}

    assert sorted(module for module in knowing if not module.startswith(KNOW_S3)) == []
    assert knowing, "the test looks for the wrong names"


def _is_s3(name: str) -> bool:
    return _is_below(name, S3_LIBRARIES)


def test_no_module_is_named_after_nothing() -> None:
    words = {module: set(Path(module).stem.split("_")) for module in MODULES}
    packages = {module: set(Path(module).parts[:-1]) for module in MODULES}

    assert [m for m in MODULES if (words[m] | packages[m]) & NAMED_AFTER_NOTHING] == []


def test_the_version_is_all_that_the_package_itself_has() -> None:
    """Importing a leaf must not load boto3, or the command line."""
    tree = ast.parse((ROOT / "agent_plugin/__init__.py").read_bytes())

    assert [type(node) for node in tree.body] == [ast.Expr, ast.Assign]
