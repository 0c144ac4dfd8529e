"""What the probe of the transports says on hosts that lack one thing or another."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from agent_plugin.content import fusermount
from agent_plugin.content.errors import MountFailedError
from agent_plugin.content.mount_probe import choose_transport
from tests.servers.hooks import REPOSITORY

NEEDS_ROOT = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv"
)
WITHOUT_SYS_ADMIN = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
LOOK = """
import json
from agent_plugin.content.errors import MountFailedError
from agent_plugin.content.mount_probe import choose_transport
found = {}
for wished in ("auto", "fusepy", "kernel"):
    try:
        choice = choose_transport(wished)
        found[wished] = [choice.transport, choice.reason]
    except MountFailedError as error:
        found[wished] = ["", error.message]
print(json.dumps(found))
"""


def look(*prefix: str, environment: Mapping[str, str] | None = None) -> dict[str, tuple[str, str]]:
    """Return, by what is wished, the transport that another process would choose, and why."""
    done = subprocess.run(
        [*prefix, sys.executable, "-c", LOOK],
        cwd=REPOSITORY,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        check=True,
        timeout=60,
    )
    return {wished: (found[0], found[1]) for wished, found in json.loads(done.stdout).items()}


@NEEDS_ROOT
def test_root_takes_the_kernel_transport_and_may_have_either() -> None:
    found = look()

    assert found["auto"][0] == "kernel"
    assert "faster" in found["auto"][1]
    assert found["kernel"] == ("kernel", "it was asked for")
    assert found["fusepy"] == ("fusepy", "it was asked for")


@NEEDS_ROOT
def test_who_may_not_mount_goes_through_fusermount_and_hears_why(tmp_path: Path) -> None:
    shutil.copy("/bin/true", tmp_path / "fusermount")
    path = f"{tmp_path}:{os.environ['PATH']}"

    found = look(*WITHOUT_SYS_ADMIN, environment={"PATH": path})

    assert found["auto"][0] == "fusepy"
    assert "CAP_SYS_ADMIN" in found["auto"][1]
    assert found["fusepy"] == ("fusepy", "it was asked for")
    assert found["kernel"][0] == ""
    assert "CAP_SYS_ADMIN" in found["kernel"][1]


@NEEDS_ROOT
def test_without_fusermount_nobody_but_root_mounts(tmp_path: Path) -> None:
    (tmp_path / "setpriv").symlink_to(shutil.which("setpriv") or "")
    environment = {"PATH": str(tmp_path)}

    found = look(*WITHOUT_SYS_ADMIN, environment=environment)

    assert {transport for transport, _ in found.values()} == {""}
    assert "no fusermount" in found["fusepy"][1]
    assert "CAP_SYS_ADMIN" in found["auto"][1]
    assert "no fusermount" in found["auto"][1]
    assert look(environment=environment)["fusepy"][0] == "fusepy"


def test_a_missing_libfuse_is_an_obstacle_with_its_reason() -> None:
    found = look(environment={"FUSE_LIBRARY_PATH": "/no/such/libfuse.so.2"})

    assert found["fusepy"][0] == ""
    assert "libfuse2" in found["fusepy"][1]
    assert "/no/such/libfuse.so.2" in found["fusepy"][1]


@NEEDS_ROOT
def test_a_kernel_transport_that_was_refused_is_not_tried_again() -> None:
    assert choose_transport("auto", kernel_refused="too old").transport == "fusepy"
    with pytest.raises(MountFailedError, match="too old"):
        choose_transport("kernel", kernel_refused="too old")


def test_the_library_is_not_loaded_into_who_only_mounts_by_the_kernel() -> None:
    code = (
        "import sys, vfs.__main__, agent_plugin.content.mount_probe as probe\n"
        "probe.kernel_obstacle()\n"
        "sys.exit('fuse' in sys.modules or 'libfuse' in open('/proc/self/maps').read())\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=60)


def test_a_script_that_stands_for_fusermount_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker agent puts a drop-in's own before the host's."""
    found = fusermount.find()
    for name in ("fusermount3", "fusermount"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    if found is None:
        pytest.skip("this host has no setuid fusermount")
    assert fusermount.find() == found
