"""What libfuse is told of a file: our struct stat is that of fusepy, field by field."""

import pytest

from agent_plugin.content.mount_probe import LIBFUSE2
from vfs.nodes import Attributes


def test_attributes_are_packed_as_a_struct_stat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSE_LIBRARY_PATH", LIBFUSE2)
    try:
        import fuse  # noqa: PLC0415 - it loads libfuse

        from vfs.transports.fusepy_transport import _packed  # noqa: PLC0415 - as above
    except OSError:
        pytest.skip("libfuse 2 is not installed")

    attributes = Attributes(
        1 << 62 | 5, 0o100644, 3, 1001, 1002, 0x801, 1 << 40, 1 << 31,
        1_600_000_000_123_456_789, -1, 7,
    )  # fmt: skip
    packed = fuse.c_stat.from_buffer_copy(_packed(attributes))

    assert (packed.st_ino, packed.st_mode, packed.st_nlink) == attributes[:3]
    assert (packed.st_uid, packed.st_gid, packed.st_rdev) == attributes[3:6]
    assert (packed.st_size, packed.st_blocks, packed.st_blksize) == (1 << 40, 1 << 31, 4096)
    times = (packed.st_atimespec, packed.st_mtimespec, packed.st_ctimespec)
    assert [(time.tv_sec, time.tv_nsec) for time in times] == [
        (1_600_000_000, 123_456_789),
        (-1, 999_999_999),
        (0, 7),
    ]
    assert packed.st_dev == 0
