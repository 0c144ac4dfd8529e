"""Pools of threads where the host gives none, or no more."""

import threading

import pytest

from agent_plugin.content.errors import LocalReadError
from vfs.threads import Threads


def refuse_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no thread begin any more, as where pids.max of a cgroup is reached."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)


def test_what_can_not_be_begun_is_refused_and_not_done_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As ThreadPoolExecutor does."""
    called: list[str] = []
    with Threads(2) as threads:
        refuse_threads(monkeypatch)
        with pytest.raises(LocalReadError, match="no further thread"):
            threads.submit(called.append, "refused")
        monkeypatch.undo()

        threads.submit(called.append, "done").result(10)
    assert called == ["done"]


def test_where_the_host_gives_no_further_thread_those_there_are_do_all_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    release, both = threading.Event(), threading.Barrier(2)
    with Threads(2) as threads:
        first = threads.submit(release.wait, 10)
        refuse_threads(monkeypatch)
        others = [threads.submit(str.upper, "done") for _ in range(3)]
        monkeypatch.undo()
        release.set()
        assert first.result(10)
        assert [each.result(10) for each in others] == ["DONE"] * 3

        at_once = [threads.submit(both.wait, 10) for _ in range(2)]
        assert {each.result(20) for each in at_once} == {0, 1}, "there are two again"
