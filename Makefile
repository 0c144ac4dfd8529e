# Two commands on a fresh machine: `make demo` and `make test`; each does the set-up it needs.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP_FLAGS := --quiet --disable-pip-version-check
# System packages: venv support, a real renderer for the end-to-end test, and two file systems that
# share blocks.
DEBIAN_PACKAGES := python3-venv povray povray-examples xfsprogs btrfs-progs

# The stamps below are made once each, whatever -j says.
.NOTPARALLEL:

.PHONY: demo test test-slow check bench install peers system clean lock

demo: $(VENV)/.installed
	$(BIN)/propmaster demo

test: system $(VENV)/.installed peers check
	$(BIN)/python -m pytest -m "not slow"

test-slow: system $(VENV)/.installed peers
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

bench: $(VENV)/.installed peers
	$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[bench]'
	$(BIN)/python -m tests.benchmarks

install: $(VENV)/.installed

# Made again whenever what the project needs has changed.
$(VENV)/.installed: pyproject.toml packaging/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "propmaster needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(MAKE) --no-print-directory system
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c packaging/constraints.txt -e '.[demo,dev]'
	touch $@

# The real Deadline client and the real worker agent, each in an environment of its own:
# they pin libraries that exclude each other.
peers: .peers/client/.installed .peers/agent/.installed

.peers/client/.installed: Makefile
	test -x .peers/client/bin/python || $(PYTHON) -m venv .peers/client
	.peers/client/bin/python -m pip install $(PIP_FLAGS) deadline==0.60.10 pyyaml
	touch $@

.peers/agent/.installed: Makefile
	test -x .peers/agent/bin/python || $(PYTHON) -m venv .peers/agent
	.peers/agent/bin/python -m pip install $(PIP_FLAGS) deadline-cloud-worker-agent==0.33.6
	touch $@

system:
	@missing=$$(dpkg-query -W -f '$${Package} $${Status}\n' $(DEBIAN_PACKAGES) 2>/dev/null \
	    | awk '/ok installed/ {print $$1}' | grep -vxFf - <(printf '%s\n' $(DEBIAN_PACKAGES)) || true); \
	test -z "$$missing" && exit 0; \
	if [ "$$(id -u)" = 0 ]; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing >/dev/null; \
	else \
	  echo "These system packages are missing. Run:  sudo apt-get install $$missing" >&2; exit 1; \
	fi

# The lock: what pip resolved today, for the extras that are shipped and tested.
lock: $(VENV)/.installed
	$(BIN)/python -m pip freeze --exclude-editable > packaging/constraints.txt

clean:
	rm -rf $(VENV) .peers build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*
