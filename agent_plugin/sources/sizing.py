"""Whether what sources bring fits on a disk, known before the first byte is fetched."""

from dataclasses import dataclass
from typing import Literal

from agent_plugin.content.errors import NoSpaceError

Wished = Literal["COPIED", "VIRTUAL", "AUTO"]


@dataclass(frozen=True, slots=True)
class Placement:
    """How a source is brought in, and why AUTO chose so."""

    file_system: Literal["COPIED", "VIRTUAL"]
    reason: str = ""


def fit(
    wished: Wished, needed: int, *, free: int, reserve: int, where: str, obstacle: str = ""
) -> Placement:
    """Decide how a source is brought in, by the room that there is.

    Args:
        wished: How it was wished.
        needed: The sum of the sizes of its objects, in bytes.
        free: Bytes that may still be written where it goes.
        reserve: Bytes of those that are to be left.
        where: Where that is, for the message.
        obstacle: Why nothing can be mounted here; empty if it can.

    Raises:
        NoSpaceError: It would have to be copied and does not fit; nothing was written.
    """
    fits = needed + reserve <= free or needed == 0
    if wished == "VIRTUAL":
        return Placement("VIRTUAL")
    if fits:
        return Placement("COPIED")
    if wished == "AUTO" and not obstacle:
        return Placement("VIRTUAL", f"{needed} bytes do not fit where {free} are free")
    also = f"; nothing can be mounted instead: {obstacle}" if wished == "AUTO" else ""
    raise NoSpaceError(
        f"{where}: {needed} bytes are needed and {free} are free, of which {reserve} are to be left"
        f"{also}",
        hint="free some space, use another disk for sessions, or bring the source in as VIRTUAL",
    )
