"""What the installed `attachment_upload.py` runs: hands the call on without the engine."""

import sys

from agent_plugin.workers.call import ATTACHMENT_UPLOAD
from agent_plugin.workers.front import main

if __name__ == "__main__":
    sys.exit(main(ATTACHMENT_UPLOAD, sys.argv[1:]))
