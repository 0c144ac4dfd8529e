"""Publishers in the settings file: strict, and told by the line that is wrong."""

from pathlib import Path

import pytest

from agent_plugin.content.errors import SettingsInvalidError
from agent_plugin.settings import load_explained

QUEUE = "queue-" + "a" * 32
TEXT = f"""\
[[outputs.publishers]]
type = "S3"
params.bucket = "all-results"
params.key = "all/{{jobID}}"

[[queues."{QUEUE}".outputs.publishers]]
Type = "s3"
[queues."{QUEUE}".outputs.publishers.Params]
Bucket = "studio-results"
Key = "show/{{jobID}}"
Required = true

[[queues."{QUEUE}".outputs.publishers]]
Type = "s3"
params.Bucket = "studio-results"
params.key = "show/{{taskID}}/all"
params.encoding = "ZSTD"
"""


def load(text: str, tmp_path: Path) -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Return for all jobs and for the queue where its publishers are set, and which they are."""
    file = tmp_path / "config.toml"
    file.write_text(text)
    loaded = load_explained(file, environment={"HOME": "/home/someone"}, user_id=1000)
    return {
        queue: (
            loaded.source("outputs.publishers", queue).removeprefix(f"{file}:"),
            [
                (publisher.params.bucket, publisher.key_template)
                for publisher in loaded.settings.for_queue(queue).outputs.publishers
            ],
        )
        for queue in ("", QUEUE)
    }


def test_a_queues_publishers_come_in_place_of_the_general_ones(tmp_path: Path) -> None:
    assert load(TEXT, tmp_path) == {
        "": ("1", [("all-results", "all/{jobID}/")]),
        QUEUE: (
            "6",
            [("studio-results", "show/{jobID}/"), ("studio-results", "show/{taskID}/all.tar.zst")],
        ),
    }
    general = TEXT.partition("\n\n")[0]
    assert load(general, tmp_path)[QUEUE] == ("1", [("all-results", "all/{jobID}/")])
    none = f'{general}\n[queues."{QUEUE}"]\noutputs.publishers = []\n'
    assert load(none, tmp_path)[QUEUE] == ("6", [])


@pytest.mark.parametrize(
    ("wrong", "right", "told"),
    [
        ("true", "1", "line 11: {q}[0].Params.Required: expected `bool`"),
        ("Required", "Require", "line 11: {q}[0].Params.Require: unknown key"),
        ('Bucket = "studio-results"\nKey', "Key", "line 8: {q}[0].Params.Bucket: missing"),
        ("{taskID}/all", "{taskid}", "line 16: {q}[1].Params.Key: column 6: there is no"),
        ("show/{taskID}", "/show", "line 16: {q}[1].Params.Key: '/show/all' has an empty"),
        ("ZSTD", "rar", "line 17: {q}[1].Params.Encoding: 'rar' is not allowed"),
        ('"ZSTD"', '"gzip"\nparams.Compress = false', "line 17: {q}[1].Params.Encoding: gzip is"),
        ("all/{jobID}", "all//x", "line 4: outputs.publishers[0].Params.Key: 'all//x' has an"),
        ('"S3"', '"gcs"', "line 2: outputs.publishers[0].Type: 'gcs' is not allowed"),
        ('params.bucket = "all', 'params.Endpoint = "h:/u"\n&', "line 3: outputs.publishers[0]."),
    ],
)
def test_what_is_wrong_with_a_publisher_is_told_by_its_line(
    tmp_path: Path, wrong: str, right: str, told: str
) -> None:
    """Seen to fail when the tables of a list had no lines of their own."""
    with pytest.raises(SettingsInvalidError) as caught:
        load(TEXT.replace(wrong, right.replace("&", wrong), 1), tmp_path)

    assert told.format(q=f'queues."{QUEUE}".outputs.publishers') in caught.value.message


def test_two_publishers_of_one_place_are_refused(tmp_path: Path) -> None:
    text = TEXT.replace("{taskID}/all", "{jobID}").replace('params.encoding = "ZSTD"\n', "")

    with pytest.raises(SettingsInvalidError, match=r"line 16: .* is also where publishers\[0\]"):
        load(text, tmp_path)


def test_publishers_that_are_no_list_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsInvalidError, match=r"line 2: outputs\.publishers: expected"):
        load('[outputs]\npublishers = "s3://bucket/key"\n', tmp_path)
