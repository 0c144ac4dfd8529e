"""Names, keys and metadata are those that the real Deadline packages compute."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_plugin.session.job import ManifestProperties
from agent_plugin.session.roots import (
    input_manifest_key,
    output_manifest_key,
    output_metadata,
    root_from_metadata,
    session_directory_name,
    timestamp,
)

NAMES: dict[str, Any] = json.loads(
    (Path(__file__).parent / "golden" / "vectors.json").read_text(encoding="ascii")
)["names"]
IDS: dict[str, str] = NAMES["ids"]
LOCATIONS = [None, "Projects"]
STARTED_AT = 1700000000.123456


def output_key(root: str, location: str | None, task: str | None) -> str:
    return output_manifest_key(
        IDS["farm_id"],
        IDS["queue_id"],
        IDS["job_id"],
        IDS["step_id"],
        task,
        STARTED_AT,
        IDS["session_action_id"],
        ManifestProperties(root, "posix", file_system_location_name=location),
    )


@pytest.mark.parametrize("root", NAMES["roots"])
def test_session_directories_have_the_agents_names(root: str) -> None:
    assert session_directory_name(root) == NAMES["roots"][root]["session_dir_name"]


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("root", NAMES["roots"])
def test_output_manifests_have_the_agents_keys(root: str, location: str | None) -> None:
    name = NAMES["roots"][root][f"output_manifest_name[fsl={location}]"]

    assert output_key(root, location, IDS["task_id"]) == f"{NAMES['partial_task_prefix']}/{name}"
    assert output_key(root, location, None) == f"{NAMES['partial_chunk_prefix']}/{name}"


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("root", NAMES["roots"])
def test_output_manifests_have_the_agents_metadata(root: str, location: str | None) -> None:
    metadata = output_metadata(root, location)

    assert metadata == NAMES["roots"][root][f"output_metadata[fsl={location}]"]
    assert root_from_metadata(metadata) == root


@pytest.mark.parametrize("root", [root for root in NAMES["roots"] if root not in ("", ".")])
def test_input_manifests_have_the_clients_keys(root: str) -> None:
    # The client hashes str(Path(root)), which drops a trailing slash.
    name = NAMES["roots"][root.rstrip("/") or "/"]["input_manifest_name"]

    assert input_manifest_key("farm", "queue", "guid", root) == f"farm/queue/Inputs/guid/{name}"


def test_an_input_manifest_is_named_as_the_uploader_does() -> None:
    name = NAMES["uploader_input_name[Path('/mnt/projects/shot01/')]"]

    assert input_manifest_key("f", "q", "g", "/mnt/projects/shot01/") == f"f/q/Inputs/g/{name}"


@pytest.mark.parametrize("seconds", NAMES["timestamps"])
def test_times_are_written_as_the_agent_does(seconds: str) -> None:
    assert timestamp(float(seconds)) == NAMES["timestamps"][seconds]


@given(st.floats(0, 4e9), st.floats(0, 4e9))
def test_names_of_times_are_ordered_as_the_times_are(first: float, second: float) -> None:
    """Mutations seen to fail here: no zeros before the microseconds; rounding instead of cutting.

    The second gives a seventh digit for 0.9999999.
    """
    earlier, later = sorted((first, second))

    assert timestamp(earlier) <= timestamp(later)
    assert len(timestamp(first)) == len("1970-01-01T00:00:00.000000Z")
