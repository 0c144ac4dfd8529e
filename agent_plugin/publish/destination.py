"""Where a publisher writes, and by what its own objects are known again.

Each object tells in its metadata which execution published it and what it is. So a publication
that was interrupted, or whose answer got lost, finds what it has written before and goes on; what
anybody else has written at a key stays, unless the publisher says that it may be overwritten.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from agent_plugin.content.errors import KeyExistsError, ObjectNotFoundError, StoreAccessError
from agent_plugin.content.objects import ObjectInfo, object_url
from agent_plugin.content.s3_errors import BucketAbsentError
from agent_plugin.content.s3_objects import S3Objects

EXECUTION: Final = "propmaster-execution"
HASH: Final = "propmaster-xxh128"

_HINT: Final = (
    "Put {executionID} or {taskID} into the publisher's Key, so that each run has keys of its own,"
    " or say Overwrite: true."
)


class Standing(Enum):
    """What is at a key."""

    NOTHING = auto()
    SAME = auto()  # what is to be there, by this execution
    OWN = auto()  # something else, by this execution
    FOREIGN = auto()  # somebody else's


@dataclass(frozen=True, slots=True)
class Destination:
    """Keys of one bucket, for one execution.

    Attributes:
        objects: The bucket's server, asked as who may write there.
        bucket: Its name.
        overwrite: Whether whatever is at a key may be replaced.
        execution_id: Whose objects they are to be.
    """

    objects: S3Objects
    bucket: str
    overwrite: bool
    execution_id: str

    def metadata(self, **more: str) -> dict[str, str]:
        """Return what an object is known by."""
        return {EXECUTION: self.execution_id, **more}

    def look(self, key: str, metadata: Mapping[str, str]) -> tuple[Standing, ObjectInfo | None]:
        """Return what is at a key, where an object with this metadata is to be.

        Who may not read or list is not told, and takes it for nothing: writing will tell.

        Raises:
            StoreAccessError: The bucket is not there.
        """
        try:
            found = self.objects.head(self.bucket, key)
        except BucketAbsentError:
            raise
        except (ObjectNotFoundError, StoreAccessError):
            return Standing.NOTHING, None
        if all(found.metadata.get(name) == value for name, value in metadata.items()):
            return Standing.SAME, found
        if found.metadata.get(EXECUTION) == self.execution_id:
            return Standing.OWN, found
        return Standing.FOREIGN, found

    def write(
        self, key: str, metadata: Mapping[str, str], put: Callable[[bool], ObjectInfo]
    ) -> ObjectInfo:
        """Return what `put` has written, or what this execution had written before.

        Args:
            key: Where.
            metadata: By which it is known.
            put: Writes it; told whether something that is there may be replaced.

        Raises:
            KeyExistsError: Somebody else's object is there.
            StoreError: It can not be written.
        """
        try:
            return put(self.overwrite)
        except KeyExistsError as error:
            standing, found = self.look(key, metadata)
            if standing is Standing.SAME and found is not None:
                return found
            if standing is Standing.OWN:
                return put(True)
            raise self.exists([key], 1) from error

    def exists(self, keys: list[str], of: int) -> KeyExistsError:
        """Return the error for keys that somebody else has written.

        Args:
            keys: Those, at least one.
            of: How many were to be written.
        """
        place = object_url(self.bucket, keys[0])
        if of == 1:
            return KeyExistsError(f"{place} exists already", hint=_HINT)
        return KeyExistsError(
            f"{place} exists already; {len(keys)} of the {of} keys are taken", hint=_HINT
        )
