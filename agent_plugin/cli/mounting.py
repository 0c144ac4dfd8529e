"""The paths of mounts, as commands are given them."""

import os
from pathlib import Path


def path_of_mount(named: Path) -> Path:
    """Return the path by which the kernel's table knows a mount point.

    Its last component is not looked at, since its server may hang; links above it are followed.
    """
    if named.name in ("", ".."):
        return Path(os.path.realpath(named))
    return Path(os.path.realpath(named.parent), named.name)
