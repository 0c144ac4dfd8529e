"""The grammar of sources on a command line."""

import pytest

from agent_plugin.content.errors import SourceInvalidError
from agent_plugin.sources.command_line import parse_source
from agent_plugin.sources.spec import InputSource

SHA256 = "ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0="


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("s3://show", InputSource("show")),
        ("s3://show/", InputSource("show")),
        ("s3://show/d/001.txt", InputSource("show", "d/001.txt")),
        ("S3://show/d/", InputSource("show", "d/")),
        ("s3://show/d/001.txt:/plates", InputSource("show", "d/001.txt", target="/plates")),
        ("s3://show/d/001.txt:plates", InputSource("show", "d/001.txt", target="plates")),
        ("s3://show/d:f:1.txt:/plates", InputSource("show", "d:f:1.txt", target="/plates")),
        ("src=s3://show/d:f:1.txt", InputSource("show", "d:f:1.txt")),
        ("source=s3://show/k,destination=a/b", InputSource("show", "k", target="a/b")),
        ("src=s3://show/a=b=c,dst=/x", InputSource("show", "a=b=c", target="/x")),
        ("s3://show/a=b:/x", InputSource("show", "a=b", target="/x")),
        ("s3://show/k:/x,dst=/y", InputSource("show", "k", target="/y")),
        ("dst=/y,src=s3://show/k", InputSource("show", "k", target="/y")),
        ("SRC=s3://show/k,Target=/y", InputSource("show", "k", target="/y")),
        (
            "s3://noaa-goes16/ABI-L1b-RadC/2000/001/12/OR_ABI*:/inputs,opt=region=us-east-1",
            InputSource("noaa-goes16", "ABI-L1b-RadC/2000/001/12/OR_ABI*", region="us-east-1"),
        ),
        (
            "s3://show/k,opt=endpoint=http://127.0.0.1:9000,option=region=us-east-1",
            InputSource("show", "k", endpoint="http://127.0.0.1:9000", region="us-east-1"),
        ),
        # A key is no part of a URL.
        ("s3://show/a?b", InputSource("show", "a?b")),
        ("s3://show/a?versionId=1#f", InputSource("show", "a?versionId=1#f")),
        ("s3://show/100%25 é+.exr", InputSource("show", "100%25 é+.exr")),
        ("s3://show//a//b", InputSource("show", "/a//b")),
        ("s3://show/[a]@b", InputSource("show", "[a]@b")),
        ("s3://show/ a ", InputSource("show", " a ")),
        ("s3://show/a\nb", InputSource("show", "a\nb")),
        ('s3://show/a"b', InputSource("show", 'a"b')),
        # Quotes, as in CSV.
        ('"s3://show/a,b:/x",dst=/y', InputSource("show", "a,b", target="/y")),
        ('"src=s3://show/a,b"', InputSource("show", "a,b")),
        ('"s3://show/a""b,c"', InputSource("show", 'a"b,c')),
        (r's3://show/d/,"opt=filter=\d{1,2}"', InputSource("show", "d/", filter=r"\d{1,2}")),
        (r"s3://show/d/,opt=filter=a=\d", InputSource("show", "d/", filter=r"a=\d")),
        *(
            (f"s3://show/k,opt={name}=v", InputSource("show", "k", version_id="v"))
            for name in ("versionID", "version-id", "version_id", "VERSIONID")
        ),
        *(
            (f"s3://show/k,opt={name}={SHA256}", InputSource("show", "k", checksum_sha256=SHA256))
            for name in ("checksum-256", "checksum256", "checksum_256", "ChecksumSHA256")
        ),
        (
            "s3://show/d/,opt=mode=virtual,opt=no-sign=true,opt=on-empty=ok,opt=alias=plates",
            InputSource("show", "d/", mode="virtual", no_sign=True, on_empty="ok", alias="plates"),
        ),
        (
            "s3://show/d/,opt=required=false,opt=filter=x,opt=anchored=1",
            InputSource("show", "d/", required=False, filter="x", anchored=True),
        ),
        ("s3://show/k,opt=profile=vendor", InputSource("show", "k", profile="vendor")),
    ],
)
def test_s1_an_argument_is_a_source(text: str, source: InputSource) -> None:
    assert parse_source(text) == source


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("", "source '': it does not begin with s3://", "its form is s3://bucket/key:/inputs"),
        ("show/k", "source 'show/k': it does not begin with s3://", ""),
        ("https://show/k", "source 'https://show/k': it does not begin with s3://", ""),
        ("dst=/x", "source 'dst=/x': it names no bucket", ""),
        ("src=show/k", "source 'show/k': it is no s3:// place", ""),
        ("x=s3://show/k", "source 'x=s3://show/k': 'x' is not known", "known: source, src, target"),
        ("s3://show/k,/x", "source '/x': it is no name=value", ""),
        ("s3://show/k,", "source '': it is no name=value", ""),
        ("s3://show/k,src=s3://b/k", "source 's3://b/k': the source is said twice", ""),
        (
            "s3://show/k,opt=regin=x",
            "source 'opt=regin=x': no option is called 'regin'",
            "Region",
        ),
        ("s3://show/k,opt=region", "source 'opt=region': it is no opt=name=value", ""),
        ("s3://show/k,opt=bucket=b", "source 'opt=bucket=b': no option is called 'bucket'", ""),
        (
            "s3://show/k,opt=partition=x",
            "source 'opt=partition=x': no option is called 'partition'",
            "",
        ),
        (
            "s3://show/k,opt=region=a,opt=region=b",
            "source 'opt=region=b': Region is said twice",
            "",
        ),
        (
            "s3://show/k,opt=required=yes",
            "source 'opt=required=yes': Required is neither true nor false",
            "",
        ),
        ('s3://show/k,"dst=/x', "source 's3://show/k,\"dst=/x': a quote is not closed", ""),
        ('"s3://show/k"x,dst=/x', "follows a closing quote", ""),
        ("s3://x/k", "the source: Bucket: 'x' is not a bucket name", ""),
        ("s3:///k", "the source: Bucket: empty", ""),
        ("s3://show/k:../x", "the source: Target: '../x' is no directory", ""),
        ("s3://show/k,opt=filter=(", "the source: Filter: no regular expression", ""),
        ("s3://show/k,opt=mode=lazy", "the source: Mode: 'lazy' is not allowed", "virtual"),
    ],
)
def test_s1_an_argument_that_is_none_is_refused_by_its_part(
    text: str, message: str, hint: str
) -> None:
    with pytest.raises(SourceInvalidError) as caught:
        parse_source(text)

    assert message in caught.value.message
    assert hint in caught.value.hint
