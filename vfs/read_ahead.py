"""How far ahead of a reader to fetch: at most half as much as it has read one after another.

So whoever reads a few tiles here and there, as a renderer does of a texture, makes little move but
them, while a reader that goes on is soon as far behind what is fetched as the store is slow.
"""

from typing import Final

# Requests of one reader may arrive in any order; so many that came early are remembered.
EARLY: Final = 64


class ReadAhead:
    """The reading of one file; not for several threads at once.

    Args:
        part_bytes: What is fetched at least.
        request_bytes: What is fetched at most with one request, a multiple of `part_bytes`.
        most_bytes: How far ahead at most.
    """

    def __init__(self, *, part_bytes: int, request_bytes: int, most_bytes: int) -> None:
        self._part_bytes = part_bytes
        self._request_bytes = request_bytes
        self._most_bytes = most_bytes
        # From where to where it was read without a gap; what came before its turn, start to end.
        self._begin = self._end = 0
        self._early: dict[int, int] = {}

    def after(self, offset: int, length: int) -> int:
        """Return up to which byte of the file to fetch, now that this was asked for.

        Never less than the end of what was asked for. Rounded, so that what is fetched ahead of a
        steady reader are whole requests and not a part for each of its steps.
        """
        end = offset + length
        if offset != self._end:
            if abs(offset - self._end) > self._request_bytes or len(self._early) >= EARLY:
                self._begin, self._end = offset, end
                self._early.clear()
            elif offset > self._end:
                self._early[offset] = end
            return end
        self._end = end
        while self._end in self._early:
            self._end = self._early.pop(self._end)
        window = min(self._most_bytes, (self._end - self._begin) // 2)
        step = self._part_bytes
        while 2 * step <= min(window, self._request_bytes):
            step *= 2
        return max(end, (self._end + window) // step * step)
