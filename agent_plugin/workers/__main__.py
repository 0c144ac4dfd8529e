"""`python -P -m agent_plugin.workers KIND …`: what is installed in place of an agent's script."""

import os
import sys
from pathlib import Path

from agent_plugin.workers.call import DROP_INS, VFS_UNMOUNT
from agent_plugin.workers.front import main

if __name__ == "__main__":
    kind, arguments = sys.argv[1] if sys.argv[1:] else "", sys.argv[2:]
    if kind not in DROP_INS:
        sys.exit(f"usage: python -P -m agent_plugin.workers {'|'.join(DROP_INS)} ...")
    session_dir = None
    if kind == VFS_UNMOUNT:
        # It is started anywhere. Not the mount point itself is looked at: its server may hang.
        above = Path(arguments[-1] if arguments else "/").parent
        session_dir = Path(os.path.realpath(above))
    sys.exit(main(kind, arguments, session_dir=session_dir))
