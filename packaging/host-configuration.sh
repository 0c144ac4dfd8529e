#!/bin/bash
# Host configuration script of a fleet: installs propmaster next to the worker agent of each host.
#
# A service-managed fleet runs it as root on every new worker before the first session (fleet
# settings, "Worker configuration script"); a failure keeps the worker from starting. On hosts of
# your own it is one way to do what docs/OPERATING.md describes. It may be run again.
#
# Set the four values; each can also come from the environment.
set -euo pipefail
# The wheel: a path, a name and version that pip knows, or an s3:// URL that the host's role may read.
WHEEL="${WHEEL:-propmaster}"
# The Python of the worker agent's environment, and the users that it and the jobs run as.
AGENT_PYTHON="${AGENT_PYTHON:-/opt/deadline/worker/bin/python}"
AGENT_USER="${AGENT_USER:-deadline-worker}"
JOB_USER="${JOB_USER:-job-user}"

PREFIX=/opt/propmaster
CONFIG=/etc/propmaster/config.toml

say() { echo "propmaster: $*"; }

for python in python3.13 python3.12 python3.11 python3 none; do
  "$python" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
done
[ "$python" != none ] || { say "Python 3.11 or newer is needed, with venv"; exit 1; }

case "$WHEEL" in
  s3://*)
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    aws s3 cp --only-show-errors "$WHEEL" "$scratch/"
    WHEEL="$scratch/$(basename "$WHEEL")"
    ;;
esac

say "installing to $PREFIX"
"$python" -m venv "$PREFIX"
"$PREFIX/bin/pip" install --quiet --disable-pip-version-check "$WHEEL"

# Job users read it: no secret belongs in it.
if [ ! -e "$CONFIG" ]; then
  install -d -m 0755 /etc/propmaster
  printf '[worker]\nagent_user = "%s"\n' "$AGENT_USER" > "$CONFIG"
  chmod 0644 "$CONFIG"
fi

say "installing to the worker agent"
# Where the agent of a service-managed fleet has its own deadline_vfs, that one is put aside: the
# environment of an agent that runs already can not be changed.
vfs=/opt/deadline_vfs
if [ -e "$vfs" ] && [ ! -e "$vfs/propmaster-python" ]; then
  mv "$vfs" "$vfs.before-propmaster"
fi
"$PREFIX/bin/propmaster" worker install --agent-python "$AGENT_PYTHON" --vfs-prefix "$vfs"

if [ -d /run/systemd/system ]; then
  cp -r "$PREFIX/share/propmaster/systemd/propmaster"* /etc/systemd/system/
  systemctl daemon-reload
  systemctl enable --quiet --now propmaster.socket propmaster-collect.timer
  # One that runs already has the version that was there before.
  systemctl try-restart propmaster.service
else
  say "no systemd here: the service runs until this host ends"
  setsid "$PREFIX/bin/propmaster" worker serve < /dev/null >> /var/log/propmaster.log 2>&1 &
  for _ in $(seq 100); do [ -S /run/propmaster/worker.socket ] && break; sleep 0.1; done
fi

# Exits with 1, and so keeps the worker from starting, if jobs would not reach propmaster.
"$PREFIX/bin/propmaster" doctor --agent --agent-python "$AGENT_PYTHON" --job-user "$JOB_USER"
say "done"
