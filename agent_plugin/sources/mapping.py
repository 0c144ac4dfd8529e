"""Which file each object of a source becomes.

The directories that the source's key names are left away, and nothing else: of `d/set1/` the object
`d/set1/001.txt` becomes `001.txt`, of `d/set*` it becomes `set1/001.txt`, of no key at all it keeps
its whole key. Whether a path may be one, and whether two can stand beside each other, the snapshot
decides (content/object_snapshot.py), before anything is fetched.
"""

from typing import Final

WILDCARD: Final = "*"


def names_one_object(key: str) -> bool:
    """Say whether a key is that of one object, and not what several begin with."""
    return key != "" and not key.endswith((WILDCARD, "/"))


def prefix_of(key: str) -> str:
    """Return what the keys of a source begin with: its own, without blanks around and one `*`.

    Args:
        key: As the source says it, if it is not that of one object.
    """
    return key.strip().removesuffix(WILDCARD)


def path_of(key: str, prefix: str) -> str:
    """Return the path of an object below the source's target; it is not checked yet.

    Args:
        key: The object's, whole.
        prefix: What the source named: the object's own key, or what it begins with.
    """
    names = key.split("/")
    start = 0
    for name, named in zip(names[:-1], prefix.split("/")[:-1], strict=False):
        if name != named:
            break
        start += 1
    return "/".join(names[start:])
