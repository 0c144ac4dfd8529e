"""The publishers that an operator gives to all jobs, or to those of a queue.

They have the form of those in a job document, and their rules; what is wrong with one is told by
the line of the settings file.
"""

from collections.abc import Sequence
from typing import Any

from agent_plugin.content.errors import PlaceholderUnknownError, SettingsInvalidError
from agent_plugin.publish.spec import Publisher, defects, spelled
from agent_plugin.settings_file import SettingsFile


def spell_publishers(document: dict[str, Any]) -> None:
    """Have a document's publishers with names and words as their schema spells them."""
    outputs = document.get("outputs")
    if isinstance(outputs, dict) and "publishers" in outputs:
        document["outputs"] = outputs | {"publishers": spelled(outputs["publishers"])}


def refuse_publishers(
    publishers: Sequence[Publisher], file: SettingsFile, queue_id: str | None = None
) -> None:
    """See that publishers keep the rules that their schema can not tell.

    Args:
        publishers: Of one table.
        file: That has them.
        queue_id: Whose table it is; None for the general one.

    Raises:
        SettingsInvalidError: Naming file, line and key.
    """
    try:
        defect = next(defects(publishers, "outputs.publishers"), None)
    except PlaceholderUnknownError as error:
        key, _, reason = error.message.partition(", ")
        defect = key, reason, error.hint
    if defect is None:
        return
    key, reason, hint = defect
    above = () if queue_id is None else ("queues", queue_id)
    prefix = "" if queue_id is None else f'queues."{queue_id}".'
    line = file.line(*above, *key.split("."))
    place = f"{file.path}, line {line}" if line else f"{file.path}"
    raise SettingsInvalidError(f"{place}: {prefix}{key}: {reason}", hint=hint)
