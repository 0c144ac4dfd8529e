"""Finding out by trying how writes can be kept, and being killed at it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from agent_plugin.content.leftovers import remove_path
from agent_plugin.content.mount_spec import OVERLAYFS
from agent_plugin.content.writes_probe import AUTO, choose_writes

PROGRAM = """if True:
    import os, signal, sys
    from pathlib import Path
    from agent_plugin.content import detached_mount, writes_probe

    call = detached_mount._syscall

    def then_die(number, *arguments):
        done = call(number, *arguments)
        if number == detached_mount._FSMOUNT:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    detached_mount._syscall = then_die
    writes_probe.choose_writes("auto", Path(sys.argv[1]))
"""


def test_who_is_killed_with_overlayfs_mounted_on_trial_leaves_no_mount(tmp_path: Path) -> None:
    """With a mount at a path, what a killed start had left could not be removed by the next."""
    work_dir = tmp_path / "work"

    killed = subprocess.run([sys.executable, "-c", PROGRAM, work_dir], check=False)

    assert killed.returncode == -signal.SIGKILL
    assert [found.name[:6] for found in work_dir.iterdir()] == ["probe-"]
    assert os.fspath(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    remove_path(work_dir)
    assert not work_dir.exists()


def test_a_trial_leaves_nothing(tmp_path: Path) -> None:
    choice = choose_writes(AUTO, tmp_path / "work")

    assert choice.writes == OVERLAYFS, choice.reason
    assert list((tmp_path / "work").iterdir()) == []
