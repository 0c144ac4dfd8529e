"""Where a job's roots are on this host, and by which names readers find their manifests."""

from pathlib import Path

import msgspec
import pytest

from agent_plugin.content.errors import ManifestInvalidError, PathMappingError
from agent_plugin.session.job import Attachments, JobDocument, ManifestProperties, PathMappingRule
from agent_plugin.session.roots import (
    LocalRoot,
    choose_local_roots,
    location_from_metadata,
    output_manifest_prefix,
    output_metadata,
    path_mapping_rules,
    root_from_metadata,
    session_directory_name,
    timestamp,
)

SESSION = Path("/sessions/abc")
SHOW = "/mnt/show"
SHOW_DIRECTORY = SESSION / session_directory_name(SHOW)


def root(path: str = SHOW, location: str | None = None) -> ManifestProperties:
    path_format = "windows" if "\\" in path else "posix"
    return ManifestProperties(path, path_format, file_system_location_name=location)  # type: ignore[arg-type]  # one of the two


def rule(source: str, destination: str) -> PathMappingRule:
    return PathMappingRule("posix", source, destination)


def job(*manifests: ManifestProperties, rules: tuple[PathMappingRule, ...] = ()) -> JobDocument:
    return JobDocument(
        farm_id="farm",
        queue_id="queue",
        job_id="job",
        attachments=Attachments(manifests),
        path_mapping_rules=rules,
    )


def test_a_root_without_location_is_a_directory_of_the_session() -> None:
    given = job(root())

    assert choose_local_roots(given, SESSION) == [LocalRoot(SHOW_DIRECTORY, (0,), mapped=False)]
    assert path_mapping_rules(given, SESSION) == [rule(SHOW, str(SHOW_DIRECTORY))]


def test_rules_say_nothing_of_a_root_without_location() -> None:
    given = job(root(), rules=(rule(SHOW, "/local/show"),))

    assert choose_local_roots(given, SESSION) == [LocalRoot(SHOW_DIRECTORY, (0,), mapped=False)]
    assert path_mapping_rules(given, SESSION) == [
        rule(SHOW, "/local/show"),
        rule(SHOW, str(SHOW_DIRECTORY)),
    ]


def test_a_root_with_location_is_where_the_rule_with_exactly_its_path_leads() -> None:
    rules = (rule("/mnt", "/elsewhere"), rule(SHOW, "/local/show"), rule(SHOW, "/second"))
    given = job(root(location="Projects"), rules=rules)

    assert choose_local_roots(given, SESSION) == [LocalRoot(Path("/local/show"), (0,), mapped=True)]
    assert path_mapping_rules(given, SESSION) == list(rules)


def test_a_root_with_location_and_no_rules_at_all_is_a_directory_of_the_session() -> None:
    given = job(root(location="Projects"))

    assert choose_local_roots(given, SESSION) == [LocalRoot(SHOW_DIRECTORY, (0,), mapped=False)]
    assert path_mapping_rules(given, SESSION) == [rule(SHOW, str(SHOW_DIRECTORY))]


@pytest.mark.parametrize("source", ["/mnt", "/mnt/show/", "/mnt/show/sub", "/MNT/show"])
def test_a_root_with_location_and_no_rule_of_exactly_its_path_is_refused(source: str) -> None:
    given = job(root(location="Projects"), rules=(rule(source, "/local"),))

    with pytest.raises(PathMappingError, match=r"'/mnt/show'.*'Projects'") as caught:
        choose_local_roots(given, SESSION)
    assert source in caught.value.hint
    with pytest.raises(PathMappingError):
        path_mapping_rules(given, SESSION)


def test_windows_roots_are_mapped_like_any_other() -> None:
    windows = "C:\\Users\\me\\show"
    given = job(
        root(windows),
        root("Z:\\show", "Projects"),
        rules=(PathMappingRule("windows", "Z:\\show", "/local/show"),),
    )
    directory = SESSION / "assetroot-d5c52817e0df97013f6f"

    assert choose_local_roots(given, SESSION) == [
        LocalRoot(directory, (0,), mapped=False),
        LocalRoot(Path("/local/show"), (1,), mapped=True),
    ]
    assert msgspec.to_builtins(path_mapping_rules(given, SESSION)[-1]) == {
        "sourcePathFormat": "windows",
        "sourcePath": windows,
        "destinationPath": str(directory),
    }


def test_manifests_that_lead_to_one_directory_share_a_local_root() -> None:
    rules = (rule("/a", "/local/show"), rule("/b", "/local/show/"), rule("/c", "/other"))
    given = job(root("/a", "A"), root("/c", "A"), root("/b", "B"), rules=rules)

    assert choose_local_roots(given, SESSION) == [
        LocalRoot(Path("/local/show"), (0, 2), mapped=True),
        LocalRoot(Path("/other"), (1,), mapped=True),
    ]


def test_the_same_path_in_and_out_of_a_location_is_one_directory_and_one_rule() -> None:
    given = job(root(), root(location="Projects"))

    assert choose_local_roots(given, SESSION) == [LocalRoot(SHOW_DIRECTORY, (0, 1), mapped=False)]
    assert path_mapping_rules(given, SESSION) == [rule(SHOW, str(SHOW_DIRECTORY))]


def test_a_root_inside_another_is_reported() -> None:
    rules = (rule("/a", "/local"), rule("/b", "/local/x/y"), rule("/c", "/local/x"))
    given = job(root("/a", "A"), root("/b", "A"), root("/c", "A"), rules=rules)

    assert [found.inside for found in choose_local_roots(given, SESSION)] == [
        None,
        Path("/local/x"),
        Path("/local"),
    ]


@pytest.mark.parametrize("destination", ["relative", "Z:\\show", "/a/../b"])
def test_a_rule_that_leads_to_no_path_of_this_host_is_refused(destination: str) -> None:
    given = job(root(location="Projects"), rules=(rule(SHOW, destination),))

    with pytest.raises(PathMappingError, match="not an absolute path of this host"):
        choose_local_roots(given, SESSION)


@pytest.mark.parametrize("destination", ["/", "/sessions", "/sessions/abc", "/sessions/abc/"])
def test_a_rule_that_would_put_the_session_inside_a_root_is_refused(destination: str) -> None:
    given = job(root(location="Projects"), rules=(rule(SHOW, destination),))

    with pytest.raises(PathMappingError, match="holds the session directory"):
        choose_local_roots(given, SESSION)


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf"), 1e12])
def test_what_is_no_time_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="no time"):
        timestamp(seconds)


def test_the_manifests_of_all_tasks_are_below_the_steps_prefix() -> None:
    assert output_manifest_prefix("f", "q", "j", "s", None) == "f/q/j/s/"
    assert output_manifest_prefix("f", "q", "j", "s", "t") == "f/q/j/s/t/"


@pytest.mark.parametrize("path", ["/a\nb", "/trailing ", " ", "/del\x7f", "/日本"])
def test_a_root_that_a_header_would_change_is_given_as_json_too(path: str) -> None:
    metadata = output_metadata(path, None)

    assert all(value.isascii() and value.isprintable() for value in metadata.values())
    assert root_from_metadata(metadata) == path


@pytest.mark.parametrize("location", ["Projects", "My Projects", "Projects ", " Projects", "  "])
def test_a_location_that_a_header_would_change_is_given_as_json_too(location: str) -> None:
    metadata = output_metadata("/mnt/show", location)

    assert all(value == value.strip() != "" for value in metadata.values())
    assert metadata.get("file-system-location-name", "") == location.strip()
    assert location_from_metadata(metadata) == location
    assert ("file-system-location-name-json" in metadata) == (location != location.strip())


def test_a_root_may_have_no_location() -> None:
    assert location_from_metadata(output_metadata("/mnt/show", None)) is None


def test_the_json_form_of_a_root_comes_first() -> None:
    assert root_from_metadata({"asset-root": "plain"}) == "plain"
    assert root_from_metadata({"asset-root": "plain", "asset-root-json": '"json"'}) == "json"


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"asset-root-json": "no json"},
        {"asset-root-json": "3"},
        {"asset-root-json": "[" * 100_000},
        {"asset-root-json": '"/a\\u0000b"'},
        {"asset-root-json": '"/a\\ud800b"'},
    ],
)
def test_metadata_that_names_no_root_is_refused(metadata: dict[str, str]) -> None:
    with pytest.raises(ManifestInvalidError, match="asset-root"):
        root_from_metadata(metadata)
