"""What servers of a mount know of open files, though any of them may be killed at any write."""

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfs.transports.open_files import MOST_NODES, NOT_OPEN, Opened, OpenFiles

SENT_AGAIN = 1 << 63


class KilledError(Exception):
    """The server is dead; nothing after this is carried out."""


class Dying:
    """Words that take so many more writes and then no more."""

    def __init__(self, words: memoryview, writes: int) -> None:
        self.words = words
        self._left = writes

    def __getitem__(self, at: int | slice) -> int | memoryview:
        return self.words[at]

    def __setitem__(self, at: int, word: int) -> None:
        if not self._left:
            raise KilledError
        self._left -= 1
        self.words[at] = word


class Step(NamedTuple):
    """A request, and after how many writes its server is killed; or before it answers."""

    node: int
    opens: bool
    kills: list[int]
    is_answered_before_the_next: bool


def carry_out(files: OpenFiles, request: int, node: int, *, opens: bool) -> None:
    before = files[node]
    if files.was_counted(request):
        return
    opened = before.opens + (1 if opens else -1)
    files.change(request, node, Opened(opened, 100 + node) if opened else NOT_OPEN)


def carry_out_and_die(files: OpenFiles, request: int, node: int, writes: int, opens: bool) -> None:
    words = files._words
    files._words = Dying(words, writes)  # type: ignore[assignment]
    try:
        carry_out(files, request, node, opens=opens)
    except KilledError:
        pass
    finally:
        files._words = words


steps = st.lists(
    st.builds(
        Step,
        node=st.integers(1, 3),
        opens=st.booleans(),
        kills=st.lists(st.integers(0, 9), max_size=3),
        is_answered_before_the_next=st.booleans(),
    ),
    max_size=12,
)


@given(steps)
def test_each_request_counts_once_however_often_servers_are_killed(steps: list[Step]) -> None:
    """Seen to catch: the words of a change in another order; no `recover`; no `was_counted`."""
    files = OpenFiles()
    known = dict.fromkeys(range(1, 4), 0)
    unanswered: list[tuple[int, Step]] = []
    for request, step in enumerate(steps, start=1):
        if not step.opens and not known[step.node]:
            continue
        known[step.node] += 1 if step.opens else -1
        number = request
        for writes in step.kills:
            carry_out_and_die(files, number, step.node, writes, step.opens)
            files.recover()
            # The kernel sends again what nobody has answered, in any order.
            for earlier, other in reversed(unanswered):
                carry_out(files, earlier | SENT_AGAIN, other.node, opens=other.opens)
            number = request | SENT_AGAIN
        carry_out(files, number, step.node, opens=step.opens)
        if step.is_answered_before_the_next:
            unanswered.clear()
        else:
            unanswered.append((request, step))

        assert {node: files[node].opens for node in known} == known
        assert {node: files[node].backing for node in known} == {
            node: 100 + node if opens else 0 for node, opens in known.items()
        }


def test_a_backing_file_that_a_killed_server_may_not_have_given_back_is_told() -> None:
    files = OpenFiles()
    files.change(1, 7, Opened(1, 5))
    assert files.recover() == 0
    files.change(2, 7, NOT_OPEN)
    assert files.recover() == 5


@pytest.mark.parametrize("node", [MOST_NODES, MOST_NODES + 5])
def test_of_nodes_beyond_the_table_nothing_is_known(node: int) -> None:
    assert OpenFiles()[node] == NOT_OPEN


def test_only_what_is_sent_again_may_have_been_counted() -> None:
    files = OpenFiles()
    files.change(3, 1, Opened(1, 0))
    assert not files.was_counted(3)
    assert files.was_counted(3 | SENT_AGAIN)
    assert not files.was_counted(4 | SENT_AGAIN)
