# Two commands on a fresh machine: `make demo` and `make test`; each does the set-up it needs.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP_FLAGS := --quiet --disable-pip-version-check
# Most tests wait for servers and processes: three at once keep two cores busy. The tests of one file
# share what they start, so they stay together.
PARALLEL := -n 3 --dist loadfile
# What Debian splits off Python, and all that the demonstration needs of the system.
VENV_PACKAGES := python3-venv
# For the tests: a real renderer, the file systems that some of them make and mount, sudo, by which
# the worker agent becomes the job user, and what desktops ask who opens a URL.
TEST_PACKAGES := povray povray-examples xfsprogs btrfs-progs e2fsprogs exfatprogs exfat-fuse libfuse2 sudo desktop-file-utils xdg-utils libglib2.0-bin

# For the suites of others that `make test-mount` runs in mounts.
MOUNT_PACKAGES := fio git rsync stress-ng
# Debian also splits off Python's own tests.
PYTHON_TESTS = $(shell "$(PYTHON)" -c 'import test.test_os' 2>/dev/null \
  || "$(PYTHON)" -c 'import sys; print("libpython%d.%d-testsuite" % sys.version_info[:2])')
# For the benchmarks: what their client is compiled with, what mounts are compared with, and by what
# the worker agent becomes the job user.
BENCH_PACKAGES := gcc libc6-dev bindfs sudo

# $(call install_packages,PACKAGES): those that are missing, or else the exact command to run.
define install_packages
@missing=; for package in $(1); do \
  dpkg-query -W -f '$${Status}' "$$package" 2>/dev/null | grep -q 'ok installed$$' \
    || missing="$$missing $$package"; \
done; \
test -z "$$missing" && exit 0; \
if [ "$$(id -u)" = 0 ]; then \
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing >/dev/null; \
else \
  echo "These system packages are missing. Run:  sudo apt-get install$$missing" >&2; exit 1; \
fi
endef

# $(call make_venv,DIRECTORY): one that was interrupted has no pip, and is made again.
define make_venv
$(1)/bin/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(1)
endef

# The stamps below are made once each, whatever -j says.
.NOTPARALLEL:

.PHONY: demo test test-slow test-mount check bench install peers system system-venv clean lock

demo: $(VENV)/.installed
	$(BIN)/propmaster demo

test: system $(VENV)/.installed peers check
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-slow: system $(VENV)/.installed peers .peers/agent-oldest/.installed
	$(BIN)/python -m pytest -m slow

# Mounting needs root.
test-mount: system $(VENV)/.installed
	$(call install_packages,$(MOUNT_PACKAGES) $(PYTHON_TESTS))
	$(BIN)/python -m pytest tests/mount -m "slow or not slow"

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

bench: $(VENV)/.installed peers
	$(call install_packages,$(BENCH_PACKAGES))
	$(BIN)/python -m pip install $(PIP_FLAGS) -c packaging/constraints.txt -e '.[bench]'
	$(BIN)/python -m tests.benchmarks

install: $(VENV)/.installed

# Made again whenever what the project needs has changed.
$(VENV)/.installed: pyproject.toml packaging/constraints.txt
	@test -n "$(PYTHON)" || { echo "propmaster needs Python 3.11 or newer, and there is no python3 in PATH. Try: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "propmaster needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || $(MAKE) --no-print-directory system-venv
	$(call make_venv,$(VENV))
	$(BIN)/python -m pip install $(PIP_FLAGS) -c packaging/constraints.txt -e '.[demo,dev]'
	touch $@

# The real Deadline client, the real worker agent and a real OpenJD runtime, each in an environment
# of its own: they pin libraries that exclude each other.
peers: .peers/client/.installed .peers/agent/.installed .peers/openjd/.installed

.peers/client/.installed: Makefile
	$(call make_venv,.peers/client)
	.peers/client/bin/python -m pip install $(PIP_FLAGS) deadline==0.60.10 pyyaml
	touch $@

.peers/agent/.installed: Makefile
	$(call make_venv,.peers/agent)
	.peers/agent/bin/python -m pip install $(PIP_FLAGS) deadline-cloud-worker-agent==0.33.6
	touch $@

.peers/agent-oldest/.installed: Makefile
	$(call make_venv,.peers/agent-oldest)
	.peers/agent-oldest/bin/python -m pip install $(PIP_FLAGS) deadline-cloud-worker-agent==0.29.0
	touch $@

.peers/openjd/.installed: Makefile
	$(call make_venv,.peers/openjd)
	.peers/openjd/bin/python -m pip install $(PIP_FLAGS) openjd-cli==0.8.0
	touch $@

system:
	$(call install_packages,$(VENV_PACKAGES) $(TEST_PACKAGES))

system-venv:
	$(call install_packages,$(VENV_PACKAGES))

# The lock: what pip resolves today, with all extras, in an environment that knows nothing of the
# lock before.
lock:
	directory=$$(mktemp -d) && trap 'rm -rf "$$directory"' EXIT && \
	"$(PYTHON)" -m venv "$$directory" && \
	"$$directory/bin/python" -m pip install $(PIP_FLAGS) -e '.[demo,dev,bench]' && \
	"$$directory/bin/python" -m pip freeze --exclude-editable > "$$directory/lock" && \
	cp "$$directory/lock" packaging/constraints.txt

clean:
	rm -rf $(VENV) .peers build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*
