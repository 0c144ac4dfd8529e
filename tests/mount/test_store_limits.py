"""What the settings allow a store's users holds for mounts as for commands."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mount.conftest import Mounter
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.mount_reader import read_all
from tests.servers.s3_server import S3Server
from tests.servers.trees import write_files

KIB = 1024
# Far above anything measured, so that only a hang meets it.
WAIT_SECONDS = 60.0


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_mount_reads_as_fast_as_it_may(tmp_path: Path) -> None:
    """1.25 MiB at 512 KiB/s; without the limit it takes a tenth of that."""
    mounter = Mounter(tmp_path, f"file://{tmp_path}/store", store={"download_limit": 512 * KIB})
    sizes: dict[str | bytes, bytes | int] = {f"{at}.tx": 64 * KIB for at in range(20)}
    write_files(tmp_path / "source", sizes, mtime_ns=1_600_000_000 * 10**9)
    at = mounter.mount(mounter.stored(tmp_path / "source"))
    try:
        begun = time.monotonic()
        for name in range(20):
            assert len((at / f"{name}.tx").read_bytes()) == 64 * KIB

        # A busy machine takes longer, none takes less.
        assert time.monotonic() - begun >= 2.2
        # Whoever of the host reads next owes it as well.
        assert (mounter.host.state_dir / "limits/download").stat().st_size == 8
    finally:
        mounter.close()


def test_a_mount_asks_for_no_more_at_once_than_it_may(
    tmp_path: Path, s3: S3Server, s3_prefix: str, fault_proxy: FaultProxy
) -> None:
    """Ten files are read at once and the store answers none: two are asked for."""
    mounter = Mounter(
        tmp_path,
        f"s3://{s3.bucket}/{s3_prefix}",
        environment=s3.environment_at(fault_proxy.url),
        store={"concurrency": 1},
    )
    sizes: dict[str | bytes, bytes | int] = {f"{at}.tx": 10_000 + at for at in range(10)}
    write_files(tmp_path / "source", sizes, mtime_ns=1_600_000_000 * 10**9)
    at = mounter.mount(mounter.stored(tmp_path / "source", past_the_proxy=s3))

    def asked() -> int:
        return len({each.key for each in fault_proxy.requests if each.method == "GET"})

    fault_proxy.inject(Fault.STALL, key="Data/")
    with ThreadPoolExecutor(1) as readers:
        reading = readers.submit(read_all, at, [f"{at}.tx" for at in range(10)], threads=10)
        try:
            wait_for(lambda: asked() == 2)
            # Others would have come by now.
            time.sleep(0.5)

            assert asked() == 2
        finally:
            fault_proxy.refuse(0)
            fault_proxy.clear()
        assert {name: seen.size for name, seen in reading.result().items()} == sizes
    mounter.close()
