#!/bin/sh
# What the worker agent starts, as the job's user, to mount a root; it runs until it is unmounted.
# The agent has libraries looked for in ../../../lib, which are none of Python's.
unset LD_LIBRARY_PATH
if ! IFS= read -r python <"${0%/*}/../../../propmaster-python" || ! [ -x "$python" ]; then
  echo "propmaster: $0 does not find propmaster's Python; install the prefix again"
  exit 1
fi
exec "$python" -P -m agent_plugin.workers vfs-mount "$@"
