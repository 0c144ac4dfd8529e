"""How long until a mount can be used, however large the tree."""

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.farm import Farm
from tests.benchmarks.mount_stacks import MountHost, Stack

ROUNDS = 3


def ready_lines(
    farm: Farm, host: MountHost, stack: Stack, manifests: dict[str, Path]
) -> Iterator[dict[str, object]]:
    """Yield a line for each manifest.

    `median_s` is the whole of `propmaster mount`: Python's start, reading the manifest, keeping it
    for the mount, and waiting for the process that mounts. `process_s` is that process's own
    account, from its start until it says that it is ready.
    """
    for name, manifest in manifests.items():
        measured = [_once(farm, host, stack, manifest) for _ in range(ROUNDS)]
        whole = [seconds for seconds, _ in measured]
        yield {
            "bench": f"mount: ready, {name}",
            "peer": stack.name,
            "rounds": ROUNDS,
            "median_s": round(statistics.median(whole), 3),
            "spread_s": round(max(whole) - min(whole), 3),
            "process_s": round(statistics.median(own for _, own in measured), 3),
        }


def _once(farm: Farm, host: MountHost, stack: Stack, manifest: Path) -> tuple[float, float]:
    at = farm.fresh("mount")
    begun = time.perf_counter()
    ready = host.mount(stack, manifest, at)
    seconds = time.perf_counter() - begun
    host.unmount(at)
    return seconds, float(ready["seconds"])
