# Put here by propmaster in place of the worker agent's own script, which is kept beside it.
# `propmaster worker status` looks after both, `propmaster worker uninstall` takes this one away.
"""Hand what the worker agent asks to propmaster; run the agent's own script if that is not there.

Runs with the agent's Python, 3.9 or newer, as the job's user, and needs the standard library alone.
It is this file, with the line that begins with `INSTALLED` filled in, that stands in the agent.
"""

import os
import runpy
import sys
from pathlib import Path

INSTALLED = {"python": "", "module": "", "original": ""}

_INSTEAD = "the agent's own script runs"
# What propmaster's Python does. A propmaster that is broken, or half of one that is just being
# replaced, must not fail a job: then the agent's own script runs, with the agent's own Python.
_START = """
import importlib, os, runpy, sys
module, python, original = sys.argv[1:4]
del sys.argv[1:4]
try:
    importlib.import_module(module)
    # It is to run under another name, and runpy warns of one that was imported already.
    del sys.modules[module]
except Exception as error:
    print(f"openjd_status: propmaster can not start ({error!r}): the agent's own script runs")
    sys.stdout.flush()
    os.execv(python, [python, original, *sys.argv[1:]])
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def main() -> None:
    """Become propmaster's process, or else run the agent's own script."""
    original = str(Path(__file__).absolute().with_name(INSTALLED["original"]))
    python = INSTALLED["python"]
    environment = dict(os.environ)
    environment["PROPMASTER_ORIGINAL"] = original
    environment["PROPMASTER_ORIGINAL_PYTHON"] = sys.executable
    start = [python, "-P", "-c", _START, INSTALLED["module"], sys.executable, original]
    try:
        os.execve(python, start + sys.argv[1:], environment)  # noqa: S606 - our own argv
    except OSError as error:
        reason = f"{python}: {error.strerror}"
    sys.stdout.write(f"openjd_status: propmaster can not start ({reason}): {_INSTEAD}\n")
    sys.stdout.flush()
    sys.argv[0] = original
    runpy.run_path(original, run_name="__main__")


if __name__ == "__main__":
    main()
