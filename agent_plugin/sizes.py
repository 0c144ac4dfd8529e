"""Amounts as operators write them: of disk space, and of bytes a second."""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

_SIZE: Final = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,6})?)\s*([A-Za-z%]*)")
_UNITS: Final = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000 ** (n + 1) for n, letter in enumerate("kmgt")},
    **{f"{letter}ib": 1024 ** (n + 1) for n, letter in enumerate("kmgt")},
}
# Below, one blob would hold up its readers for minutes.
LEAST_RATE: Final = 16 * 1024


class Size:
    """An amount of disk space: bytes, or a part of the file system it is on.

    Not a dataclass, because msgspec would then expect a table in the file and not ask `parse`.

    Args:
        bytes: Used when `percent` is 0.
        percent: Of the file system's size, 0 to 100.
    """

    __slots__ = ("bytes", "percent")

    def __init__(self, bytes: int = 0, *, percent: float = 0.0) -> None:  # noqa: A002 - its unit
        self.bytes = bytes
        self.percent = percent

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Size):
            return NotImplemented
        return (self.bytes, self.percent) == (other.bytes, other.percent)

    def __hash__(self) -> int:
        return hash((self.bytes, self.percent))

    def __repr__(self) -> str:
        return f"Size({self.bytes}, percent={self.percent})"

    @classmethod
    def parse(cls, value: object) -> Self:
        """Return the size that a number of bytes, "200 GiB", "1.5TB" or "5 %" says.

        Raises:
            ValueError: It says none.
        """
        match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
        if match is not None and match[2] == "%" and float(match[1]) <= 100:  # noqa: PLR2004 - %
            return cls(percent=float(match[1]))
        if match is not None and match[2].lower() in _UNITS:
            return cls(int(float(match[1]) * _UNITS[match[2].lower()]))
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63:
            return cls(value)
        raise ValueError(
            f"{value!r} is no size; allowed: bytes as a number, or text such as '200 GiB' or '5 %'"
        )

    def on(self, directory: Path) -> int:
        """Return the bytes that it means for a directory, which need not exist yet."""
        if not self.percent:
            return self.bytes
        return int(_filesystem_bytes(directory) * self.percent / 100)


class Rate(Size):
    """Bytes a second; 0 is no limit."""

    __slots__ = ()

    @classmethod
    def parse(cls, value: object) -> Self:
        """Return the rate that a number of bytes or "50 MiB" says, each second.

        Raises:
            ValueError: It says none, or one that is too low to work with.
        """
        try:
            rate = super().parse(value)
        except ValueError:
            rate = None
        if rate is None or rate.percent or 0 < rate.bytes < LEAST_RATE:
            raise ValueError(
                f"{value!r} is no limit; allowed: bytes a second as a number, or text such as"
                f" '50 MiB', at least {LEAST_RATE} of them; 0 for none"
            )
        return rate


def _filesystem_bytes(directory: Path) -> int:
    for path in (directory, *directory.parents[:-1]):
        with suppress(OSError):
            filesystem = os.statvfs(path)
            return filesystem.f_blocks * filesystem.f_frsize
    filesystem = os.statvfs("/")
    return filesystem.f_blocks * filesystem.f_frsize
