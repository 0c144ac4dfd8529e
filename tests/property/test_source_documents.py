"""Whatever a document or an argument says: it is a source that keeps the rules, or refused."""

from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent_plugin.content.errors import SourceInvalidError
from agent_plugin.sources.command_line import parse_source
from agent_plugin.sources.partition import Share
from agent_plugin.sources.spec import InputSource, decode_source, field_name, source_defects

NAMES = st.sampled_from(
    [
        *(field_name(name) for name in InputSource.__struct_fields__),
        *("Type", "Params", "Source", "bucket", "KEY", "Count", "Index", "Pattern", "DateFormat"),
    ]
)
TEXTS = st.one_of(
    st.sampled_from(
        ["show", "d/*", "s3", "object", "date", "%Y", "(", "virtual", "ok", "..", "/a"]
    ),
    st.text(max_size=5),
)
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-2, 9), st.floats(), TEXTS)
DOCUMENTS = st.recursive(
    LEAVES,
    lambda below: st.one_of(
        st.lists(below, max_size=3),
        st.dictionaries(st.one_of(NAMES, TEXTS), below, max_size=5),
        st.dictionaries(NAMES, below, max_size=5).map(lambda fields: {"Bucket": "show", **fields}),
    ),
    max_leaves=12,
)


def _is_sound(source: InputSource) -> None:
    assert list(source_defects(source)) == []
    assert not source.target_path.startswith("/")
    assert ".." not in source.target_path.split("/")
    # It is kept as it reads itself.
    kept = msgspec.json.decode(msgspec.json.encode(source))
    assert decode_source(kept, source="x") == source
    if source.partition is not None and source.partition.index is not None:
        Share(source.partition, "").has("d/2024-01-01")


@given(document=DOCUMENTS)
@example(document={"Bucket": "show", "Type": ["s3"]})
@example(document={"Bucket": "show", "Partition": {"Type": 7}})
@example(document={"Bucket": "show", "Partition": {"Type": "date", "DateFormat": "%"}})
@example(document={"Bucket": "show", "Endpoint": "http://["})
def test_s1_a_document_is_a_source_or_refused(document: Any) -> None:
    """Caught: a Type that is no text lowered, and an endpoint's ValueError let through."""
    try:
        source = decode_source(document, source="job.json", prefix="inputSources[0]")
    except SourceInvalidError as error:
        failed = error
    else:
        _is_sound(source)
        return
    assert failed.message.startswith("job.json: inputSources[0]")


@given(
    text=st.lists(
        st.one_of(
            st.sampled_from(
                ["s3://", "show", "/", ":", ",", '"', '""', "=", "dst=", "src=", "opt="]
            ),
            st.sampled_from(["filter=", "mode=virtual", "d*", "\n", "é", "..", "required=true"]),
            st.text(max_size=3),
        ),
        max_size=9,
    ).map("".join)
)
def test_s1_an_argument_is_a_source_or_refused(text: str) -> None:
    """Caught: a quote at the end that is looked behind, and a target that is not checked."""
    try:
        source = parse_source(text)
    except SourceInvalidError:
        return
    _is_sound(source)


@pytest.mark.parametrize(
    "text", ["s3://show/" + "," * 10_000, '"' * 10_000, "s3://show/" + ":" * 900]
)
def test_s1_a_long_argument_is_refused_at_once(text: str) -> None:
    with pytest.raises(SourceInvalidError):
        parse_source(text)
