"""The lines for the agent: how often, how far, and what they say."""

import json

from agent_plugin.session.state import OutputManifestResult
from agent_plugin.transfer.progress import Meter
from agent_plugin.workers.deadline.directives import (
    LogProgress,
    Progress,
    say_snapshot,
    say_uploads,
)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def transfer(progress: Progress | LogProgress, clock: Clock, files: int, seconds: float) -> None:
    """Place files of 1 MB each, evenly, and show it ten times a second."""
    meter = Meter(files, files * 1_000_000, clock=clock)
    with progress.view("sync-in") as view:
        for _ in range(files):
            for _ in range(max(1, round(10 * seconds / files))):
                clock.now += seconds / files / max(1, round(10 * seconds / files))
                view.show(meter.snapshot())
            meter.advance(1_000_000, files=1)
        view.show(meter.snapshot())


def test_there_is_a_pair_a_second_at_most_and_the_last_says_that_all_is_there() -> None:
    lines: list[str] = []
    clock = Clock()
    progress = Progress(lines.append, clock=clock)
    progress.expect(40, 40_000_000)

    transfer(progress, clock, 30, 6.0)
    transfer(progress, clock, 10, 2.0)
    progress.finish()

    percents = [float(line.split(": ")[1]) for line in lines[::2]]
    assert all(line.startswith("openjd_progress: ") for line in lines[::2])
    assert all(line.startswith("openjd_status: ") for line in lines[1::2])
    assert 6 <= len(percents) <= 9
    assert percents == sorted(percents)
    assert 5 <= percents[0] <= 20
    assert all(percent < 100 for percent in percents[:-1])
    assert percents[-1] == 100.0
    assert lines[-1] == "openjd_status: 40 of 40 files, 40.0 MB of 40.0 MB"


def test_a_short_transfer_tells_only_that_it_is_done() -> None:
    lines: list[str] = []
    clock = Clock()
    progress = Progress(lines.append, clock=clock)
    progress.expect(3, 3_000_000)

    transfer(progress, clock, 3, 0.3)
    progress.finish()

    assert lines == [
        "openjd_progress: 100.0",
        "openjd_status: 3 of 3 files, 3.0 MB of 3.0 MB",
    ]


def test_files_without_content_count_too() -> None:
    lines: list[str] = []
    clock = Clock()
    progress = Progress(lines.append, clock=clock)
    progress.expect(4, 0)
    meter = Meter(4, 0, clock=clock)

    with progress.view("sync-in") as view:
        meter.advance(0, files=2)
        clock.now = 1.5
        view.show(meter.snapshot())

    assert lines[0] == "openjd_progress: 50.0"


def test_an_upload_is_told_now_and_then_and_not_as_the_agents_progress() -> None:
    lines: list[str] = []
    clock = Clock()

    transfer(LogProgress(lines.append, clock=clock), clock, 50, 25.0)

    assert len(lines) == 2
    assert all(line.startswith("uploading: ") for line in lines)


def test_what_the_agent_parses_is_ascii_json() -> None:
    lines: list[str] = []

    say_snapshot(lines.append, "/sessions/shöt \udcff", "manifest_snapshot/x.manifest")
    say_uploads(lines.append, [("C:\\shöt", OutputManifestResult("farm-1/x_output", "00"))])

    assert all(line.isascii() for line in lines)
    assert json.loads(lines[0].removeprefix("ja_snapshot: ")) == {
        "root": "/sessions/shöt \udcff",
        "manifest": "manifest_snapshot/x.manifest",
    }
    assert json.loads(lines[1].removeprefix("ja_upload: ")) == [
        {
            "output_manifest_path": "farm-1/x_output",
            "output_manifest_hash": "00",
            "source_path": "C:\\shöt",
        }
    ]


def test_what_is_in_place_is_not_done_before_that_is_told() -> None:
    lines: list[str] = []
    clock = Clock()
    progress = Progress(lines.append, clock=clock)
    progress.expect(3, 3_000_000)

    transfer(progress, clock, 3, 0.3)
    with progress.view("sync-in") as view:
        clock.now = 5.0
        view.show(Meter(0, 0, clock=clock).snapshot())

    assert lines[0] == "openjd_progress: 99.9"
