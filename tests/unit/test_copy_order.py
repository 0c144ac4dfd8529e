"""Whose turn it is among copies: the highest transfers only, then the highest tasks."""

from hypothesis import given
from hypothesis import strategies as st

from agent_plugin.transfer.copy_order import MOVING, PAUSED, WAITING, Candidate, turns

CANDIDATES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from((WAITING, PAUSED, MOVING))).map(
        lambda each: Candidate(0, *each)
    ),
    max_size=12,
).map(lambda found: [Candidate(at, *_rest(each)) for at, each in enumerate(found)])


def _rest(each: Candidate) -> tuple[int, int, int]:
    return each.transfer_priority, each.priority, each.state


def test_t11_what_has_begun_goes_on_before_what_has_the_same_priority() -> None:
    found = turns(
        [
            Candidate(1, 500, 500, WAITING),
            Candidate(2, 500, 500, PAUSED),
            Candidate(3, 500, 500, MOVING),
            Candidate(4, 500, 600, WAITING),
        ],
        3,
        -1,
    )

    assert (sorted(found.moving), found.free) == ([2, 3], 1)


def test_t11_of_what_has_the_same_priority_the_older_goes_on() -> None:
    """Seen to fail without ids, and with the younger first."""
    both = [Candidate(at, 500, 500, MOVING) for at in (2, 1)]

    assert turns(both, 1, -1).moving == {1}


def test_t11_nothing_goes_on_while_another_process_moves_something_of_higher_priority() -> None:
    mine = [Candidate(1, 500, 999, MOVING), Candidate(2, 500, 500, WAITING)]

    assert turns(mine, 4, 501).moving == frozenset()
    assert (turns(mine, 4, 501).free, turns(mine, 4, 501).priority) == (0, 501)
    assert (sorted(turns(mine, 4, 500).moving), turns(mine, 4, 500).free) == ([1], 1)


@given(CANDIDATES, st.integers(1, 5), st.integers(-1, 3))
def test_t11_no_place_is_had_by_what_is_outranked_and_none_is_empty(
    candidates: list[Candidate], places: int, elsewhere: int
) -> None:
    """Seen to fail with: states before priorities; transfers of all priorities among the chosen."""
    found = turns(candidates, places, elsewhere)

    may = [each for each in candidates if each.transfer_priority == found.priority]
    assert found.priority == max([elsewhere, *(each.transfer_priority for each in candidates)])
    assert len(found.moving) + found.free == min(places, len(may))
    moving = [each for each in may if each.id in found.moving]
    assert len(moving) == len(found.moving)
    waiting = sorted(each.priority for each in may if each.state == WAITING)[::-1]
    began = [each.priority for each in moving] + waiting[: found.free]
    left = [each.priority for each in may if each.state != WAITING and each not in moving]
    assert not began or max([*left, *waiting[found.free :]], default=-1) <= min(began)
