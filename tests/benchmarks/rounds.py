"""Rounds in which every contender runs once, and what is printed of them.

The machines are shared and noisy, so contenders take turns, each round beginning with another one,
and what counts is the ratio of medians within one run, not the seconds.
"""

import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

# One contender's turn: makes ready, measures, cleans up. Returns wall seconds by the name of what
# was measured; a contender may measure two things at once.
Turn = Callable[[int], Mapping[str, float]]


def interleave(turns: Sequence[Turn], *, rounds: int) -> dict[str, list[float]]:
    """Let every contender have its turn in every round; return all seconds by name."""
    measured: dict[str, list[float]] = {}
    for number in range(rounds):
        first = number % len(turns)
        for turn in [*turns[first:], *turns[:first]]:
            # What the one before left to be written back is not this one's to wait for.
            os.sync()
            for name, seconds in turn(number).items():
                measured.setdefault(name, []).append(seconds)
    return measured


def lines(
    bench: str,
    measured: Mapping[str, Sequence[float]],
    *,
    reference: str,
    files: int | None = None,
    megabytes: float | None = None,
) -> Iterator[dict[str, object]]:
    """Yield one line for each name measured.

    Args:
        bench: What was measured.
        measured: Wall seconds of all rounds, by name.
        reference: The name whose median stands above the others' in `ratio_to_<reference>`: how
            many times as fast as the reference, so more is better.
        files: Moved in one round, for `files_per_s`.
        megabytes: Moved in one round, in units of 1,000,000 bytes, for `mb_per_s`.
    """
    medians = {name: statistics.median(seconds) for name, seconds in measured.items()}
    for name, seconds in measured.items():
        line: dict[str, object] = {
            "bench": bench,
            "peer": name,
            "rounds": len(seconds),
            "median_s": round(medians[name], 4),
            "spread_s": round(max(seconds) - min(seconds), 4),
        }
        if files is not None:
            line["files_per_s"] = round(files / medians[name])
        if megabytes is not None:
            line["mb_per_s"] = round(megabytes / medians[name], 1)
        line[f"ratio_to_{reference}"] = round(medians[reference] / medians[name], 2)
        yield line


def sandwich(
    reference: Callable[[], float], contender: Callable[[], float], *, rounds: int
) -> list[tuple[float, float]]:
    """Measure a contender between two runs of the reference, again and again.

    So each of them comes after the other, whatever the one before leaves in the caches of the
    machine and of its host, and what grows or shrinks steadily cancels out.

    Returns:
        For each round the mean seconds of the two references, and the contender's.
    """
    reference()
    before = reference()
    measured = []
    for _ in range(rounds):
        between = contender()
        after = reference()
        measured.append(((before + after) / 2, between))
        before = after
    return measured


def ratio_line(
    bench: str, peer: str, measured: Sequence[tuple[float, float]], *, reference: str
) -> dict[str, object]:
    """Return the line of one contender, measured by `sandwich`.

    Args:
        bench: What was measured.
        peer: The contender.
        measured: Seconds of the reference and of the contender, for each round.
        reference: `ratio_to_<reference>` is the median of the rounds' ratios: how many times as
            fast as the reference, so more is better; `ratio_low`, `ratio_high` are the quartiles.
    """
    ratios = sorted(before / after for before, after in measured)
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "bench": bench,
        "peer": peer,
        "rounds": len(ratios),
        "median_s": round(statistics.median(after for _, after in measured), 6),
        f"{reference}_s": round(statistics.median(before for before, _ in measured), 6),
        f"ratio_to_{reference}": round(middle, 3),
        "ratio_low": round(low, 3),
        "ratio_high": round(high, 3),
    }
