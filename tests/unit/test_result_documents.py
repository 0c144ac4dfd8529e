"""Result documents: how large they become, and which result of an execution comes. Pure."""

import msgspec
import pytest

from agent_plugin.content.errors import JobInvalidError
from agent_plugin.publish.placeholders import Execution
from agent_plugin.publish.publications import chosen_results
from agent_plugin.publish.result_documents import (
    MAX_RESULTS_BYTES,
    Contents,
    ExcludedOutputs,
    Published,
    PublishFailure,
    Result,
    ResultParams,
    ResultsDocument,
)
from agent_plugin.publish.results import check_only

EXECUTION = Execution("f", "q", "j", "s", "t", "e", "n", "w", 1_700_000_000.0)


def test_o5_a_document_has_room_for_all_that_people_exclude() -> None:
    """Of 20 publishers, the most that there can be, all outputs but one, with names at their worst.

    Seen to fail when the document had all paths: nobody could read it any more.
    """
    paths = [f"{number:06}" + "\x01" * 250 for number in range(10_000)]
    turns = [
        Published(
            publisher,
            result=Result("s3", ResultParams("bucket", "k" * 1024)),
            failure=PublishFailure(publisher, "b", "k" * 1024, "E", "m" * 5000, required=False),
            excluded=ExcludedOutputs(publisher, "bucket", "k" * 1024, paths),
        )
        for publisher in range(20)
    ]

    document = ResultsDocument.of(EXECUTION, turns)

    assert len(msgspec.json.encode(document)) < MAX_RESULTS_BYTES
    assert {each.files for each in document.excluded} == {10_000}
    assert document.excluded[0].paths == paths[: 10_000 - document.excluded[0].more]
    assert document.excluded[0].paths
    assert document.excluded[0].shortened == document.excluded[0]


@pytest.mark.parametrize(
    ("keys", "files", "comes"),
    [
        (["a.tar.gz", "b/", "c/"], [2, 2, 2], 1),
        (["a.tar.gz", "b/", "c/"], [3, 2, 2], 0),
        (["b/", "c/"], [1, 2], 1),
        (["a.tar.gz", "b/"], [], 1),
    ],
)
def test_o7_of_the_results_of_an_execution_that_with_most_files_comes(
    keys: list[str], files: list[int], comes: int
) -> None:
    """People may have excluded some from one: seen to fail when a plain one always came."""
    turns = [
        Published(at, result=Result("s3", ResultParams("bucket", key)))
        for at, key in enumerate(keys)
    ]
    contents = [Contents(number, number, "0" * 32) for number in files]
    document = msgspec.structs.replace(ResultsDocument.of(EXECUTION, turns), contents=contents)

    assert chosen_results(document, every=False) == [comes]
    assert list(chosen_results(document, every=True)) == list(range(len(keys)))


@pytest.mark.parametrize("published", [False, True])
def test_o7_an_execution_that_is_not_there_is_named_with_where_else_to_look(
    published: bool,
) -> None:
    """Seen to fail when last runs were spoken of where all runs count."""
    with pytest.raises(JobInvalidError, match="no execution b with results") as refused:
        check_only("job", ["a"], ["a", "b"], published=published)

    assert "propmaster results JOB" in refused.value.hint
    assert ("only its last run" in refused.value.hint) is not published
