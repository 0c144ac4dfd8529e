"""Which packages count where others have theirs in PYTHONPATH: our own.

Render applications, and the environments that a queue makes for them, set the variable for all that
they start; without this their msgspec or click would be loaded in the place of ours. The variable
stays as it is for what we start in turn: a task's command may need it.
"""

import os
import site
import sys


def prefer_own_packages() -> None:
    """Have the variable's directories looked through last; call it before anything else is loaded.

    They stay, for whoever has our libraries there and nowhere else; and where this package is, or
    this Python's own packages are, keeps its place.
    """
    named = os.environ.get("PYTHONPATH")
    if not named or sys.flags.ignore_environment:
        return
    kept = {
        os.path.abspath(f"{__file__}/../../.."),  # noqa: PTH100 - pathlib would load more
        os.path.dirname(os.__file__),  # noqa: PTH120 - as above
        *site.getsitepackages(),
    }
    others = {os.path.abspath(path) for path in named.split(os.pathsep) if path} - kept  # noqa: PTH100 - as above
    last = [path for path in sys.path if path in others]
    sys.path[:] = [path for path in sys.path if path not in others] + last
