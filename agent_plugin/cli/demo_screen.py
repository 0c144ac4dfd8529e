"""What `propmaster demo` found, and how a person is told."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from agent_plugin.transfer.progress import format_bytes

_LINE_CHARACTERS: Final = 96


class Step(msgspec.Struct, rename="camel"):
    """One command of the demonstration; sizes in bytes of distinct content.

    Attributes:
        title: What it does.
        command: As one would type it.
        seconds: Of the process, from start to end.
        files: How many it was about.
        bytes_moved: To or from the store.
        bytes_saved: That were wanted, and were where they had to be.
    """

    title: str
    command: str
    seconds: float
    files: int = 0
    bytes_moved: int = 0
    bytes_saved: int = 0


class Mounted(msgspec.Struct, rename="camel"):
    """The VIRTUAL session beside the COPIED one, each with an empty cache; sizes in bytes.

    Attributes:
        file_system: `VIRTUAL`, or `COPIED` where the host can not mount.
        reason: Why it was copied.
        seconds_to_task, seconds_to_task_copied: Until a task can run.
        bytes_moved, bytes_moved_copied: For the task that reads a part of the inputs.
        outputs_identical: Files that it wrote as in a copied session.
    """

    file_system: str
    reason: str
    seconds_to_task: float
    seconds_to_task_copied: float
    bytes_moved: int
    bytes_moved_copied: int
    outputs_identical: int = 0


class DemoResult(msgspec.Struct, rename="camel"):
    """What the demonstration found; printed by `demo --json`.

    Attributes:
        input: The directory that was submitted.
        files, bytes: What is in it.
        inputs_identical, outputs_identical: Files that were compared byte for byte; one that
            differs ends the demonstration with an error.
        virtual: The job once more, mounted.
        directory: Where everything is, when it was kept.
    """

    input: str
    files: int = 0
    bytes: int = 0
    inputs_identical: int = 0
    outputs_identical: int = 0
    steps: list[Step] = []
    virtual: Mounted | None = None
    seconds: float = 0.0
    directory: str | None = None


class Screen:
    """Tells a person what happens, and a program (`--json`) nothing."""

    def __init__(self, *, silent: bool) -> None:
        from rich.console import Console  # noqa: PLC0415 - 60 ms that only a screen needs

        self._console = Console(quiet=silent, soft_wrap=True, highlight=False)
        self._titles = 0

    def title(self, text: str) -> None:
        """Begin a numbered part."""
        self._titles += 1
        self._console.print(f"\n{self._titles}. {text}", style="bold", markup=False)

    def say(self, text: str, style: str = "") -> None:
        """Print a line."""
        self._console.print(text, style=style, markup=False)

    def command(self, words: Sequence[str]) -> None:
        """Print a command as one can type it."""
        lines = ["  $"]
        for phrase in _phrases(words):
            if len(lines[-1]) + len(phrase) > _LINE_CHARACTERS:
                lines[-1] += " \\"
                lines.append("     ")
            lines[-1] += f" {phrase}"
        self.say("\n".join(lines), "cyan")

    def table(self, result: DemoResult) -> None:
        """Print what each step moved and saved."""
        from rich.table import Table  # noqa: PLC0415 - as above

        table = Table()
        table.add_column("step")
        for heading in ("files", "moved", "saved", "seconds"):
            table.add_column(heading, justify="right")
        for step in result.steps:
            files = str(step.files) if step.files else ""
            sizes = ["", ""]
            if step.bytes_moved or step.bytes_saved:
                sizes = [format_bytes(step.bytes_moved), format_bytes(step.bytes_saved)]
            table.add_row(step.title, files, *sizes, f"{step.seconds:.1f}")
        table.add_section()
        moved = sum(step.bytes_moved for step in result.steps)
        saved = sum(step.bytes_saved for step in result.steps)
        seconds = sum(step.seconds for step in result.steps)
        total = ["all", "", format_bytes(moved), format_bytes(saved), f"{seconds:.1f}"]
        table.add_row(*total, style="bold")
        self.say("\nSummary", "bold")
        self._console.print(table)
        self.say(
            "moved: sent to the store or fetched from it; saved: needed, and not moved because it"
            " was there\nalready; seconds: of the whole command, from start to end."
        )
        if result.virtual is not None:
            self._compare(result.virtual)
        self.say(
            f"\nAll well: {result.inputs_identical} inputs and {result.outputs_identical} outputs"
            f" arrived byte for byte as they were. {result.seconds} s in all.",
            "bold green",
        )

    def _compare(self, virtual: Mounted) -> None:
        if virtual.file_system == "COPIED":
            self.say(f"\nThis host can not mount: {virtual.reason}. VIRTUAL sessions are copied.")
            return
        share = 100 * virtual.bytes_moved / max(1, virtual.bytes_moved_copied)
        self.say(
            f"\nCOPIED: a task could begin after {virtual.seconds_to_task_copied:.1f} s, when"
            f" {format_bytes(virtual.bytes_moved_copied)} had moved.\nVIRTUAL: after"
            f" {virtual.seconds_to_task:.1f} s, and {format_bytes(virtual.bytes_moved)} moved"
            f" ({share:.0f} %) for the task that needed a part."
        )

    def how_to_repeat(self, directory: Path, endpoint_url: str) -> None:
        """Say where everything is, and wait if somebody is there who may use it."""
        self.say(f"\nEverything is kept in {directory}; remove it when you are done.")
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            return
        self.say(
            f"The store goes on serving at {endpoint_url} until you press Enter. To repeat commands"
            f" meanwhile, in another terminal:\n  cd {directory} && source environment"
        )
        sys.stdin.readline()


def _phrases(words: Sequence[str]) -> list[str]:
    """Return the words quoted for a shell, each option together with its value."""
    phrases: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        if before.startswith("--") and not word.startswith("--"):
            phrases[-1] += f" {shlex.quote(word)}"
        else:
            phrases.append(shlex.quote(word))
    return phrases
