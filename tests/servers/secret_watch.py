"""Looks for secrets where they must not be: in argument lists while things run, and in files."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

# A command that runs for less is missed; what we start takes tens of milliseconds to start.
_POLL_SECONDS: Final = 0.02


class ArgumentWatch:
    """Looks at the arguments of all processes of the host, while entered.

    Attributes:
        found: The command lines that had one of the secrets.
    """

    def __init__(self, secrets: Sequence[str]) -> None:
        self.found: set[str] = set()
        self._secrets = [secret.encode() for secret in secrets]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            for process in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):
                    words = (process / "cmdline").read_bytes()
                    if any(secret in words for secret in self._secrets):
                        self.found.add(words.replace(b"\0", b" ").decode(errors="replace"))


def files_with(secrets: Sequence[str], root: Path, *, except_below: Path) -> Iterator[Path]:
    """Yield the regular files below `root` in which one of the secrets stands."""
    wanted = [secret.encode() for secret in secrets]
    for path in root.rglob("*"):
        if path.is_relative_to(except_below) or path.is_symlink() or not path.is_file():
            continue
        data = path.read_bytes()
        if any(secret in data for secret in wanted):
            yield path
