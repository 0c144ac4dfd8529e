"""`get --published` and `results`: what publishers made of sessions' outputs, on a real server.

Each test has a prefix of its own in the shared bucket. What is hostile is put there by hand.
"""

import gzip
import io
import json
import os
import signal
import tarfile
import time
import urllib.request
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from agent_plugin.content.errors import ArchiveUnsafeError, ObjectChangedError, ResultClashError
from agent_plugin.content.leftovers import is_partial
from agent_plugin.publish.unpack import UnpackLimits
from agent_plugin.sources.spec import decode_source
from agent_plugin.transfer import copy_partial
from tests.servers.hooks import FARM, JOB, QUEUE, Host
from tests.servers.published import Published
from tests.servers.s3_server import S3Server
from tests.servers.sessions import MTIME_NS, Sessions
from tests.servers.trees import write_files as write_files_at

MEBIBYTE = 1024 * 1024
# Far above anything measured, so that only a hang meets it.
CALL_SECONDS = 60.0


def write_files(root: Path, files: dict[str | bytes, bytes | int]) -> None:
    write_files_at(root, files, mtime_ns=MTIME_NS)


@pytest.fixture
def published(s3: S3Server, tmp_path: Path) -> Published:
    return Published(s3, tmp_path)


def read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=CALL_SECONDS) as answer:
        data: bytes = answer.read()
    return data


# ------------------------------------------------------------ plain objects


def test_o7_plain_results_come_by_execution_although_they_share_a_key(published: Published) -> None:
    p = published
    one, two = p.ran(
        {"Key": "all"},
        {"renders/1.exr": b"one", "renders/empty": b""},
        {"renders/2.exr": 9 * MEBIBYTE},
    )

    first = p.get()
    second = p.get()

    assert p.files().keys() == {
        f"{one}/renders/1.exr", f"{one}/renders/empty", f"{two}/renders/2.exr"
    }  # fmt: skip
    assert p.files()[f"{one}/renders/1.exr"] == b"one"
    assert (first.files, first.bytes_fetched) == (3, 3 + 9 * MEBIBYTE)
    assert (second.files, second.bytes_fetched) == (3, 0)
    assert (p.to / one / "renders/1.exr").stat().st_mtime_ns == MTIME_NS
    assert [path.name for path in p.to.iterdir() if is_partial(path.name)] == []


def test_o7_a_plain_result_that_was_changed_is_refused(published: Published) -> None:
    [execution] = published.ran({"Key": "all"}, {"renders/1.exr": b"one"})
    client = published.s3.client()
    key = f"{published.prefix}/all/renders/1.exr"
    head = client.head_object(Bucket=published.bucket, Key=key)
    client.put_object(Bucket=published.bucket, Key=key, Body=b"two", Metadata=head["Metadata"])

    with pytest.raises(ObjectChangedError, match=f"{execution} .*{key} is .*as it was published"):
        published.get()

    assert not published.to.exists()


def test_o7_published_results_come_by_themselves_when_the_manifests_have_gone(
    published: Published,
) -> None:
    p = published
    p.ran({"Key": "all"}, {"renders/1.exr": b"one"})
    client = p.s3.client()
    prefix = f"{p.user.store_url.partition(p.bucket + '/')[2]}/Manifests/{FARM}/{QUEUE}/{JOB}/"
    for entry in client.list_objects_v2(Bucket=p.bucket, Prefix=prefix)["Contents"]:
        client.delete_object(Bucket=p.bucket, Key=entry["Key"])

    p.run("get", JOB[:12], "--to", p.to)

    assert p.files() == {"renders/1.exr": b"one"}
    assert "    3 bytes  renders/1.exr" in p.run("ls", JOB).stdout
    assert p.run("cat", f"{JOB}/renders/1.exr").stdout == "one"


def test_o7_content_that_the_store_has_lost_may_be_published_still(published: Published) -> None:
    p = published
    p.ran({"Key": "all"}, {"renders/1.exr": b"one"})
    client = p.s3.client()
    prefix = f"{p.user.store_url.partition(p.bucket + '/')[2]}/Data/"
    for entry in client.list_objects_v2(Bucket=p.bucket, Prefix=prefix)["Contents"]:
        client.delete_object(Bucket=p.bucket, Key=entry["Key"])

    done = p.run("get", JOB, "--to", p.to, code=69)

    assert "try --published" in done.stderr
    assert p.get().files == 1


# ------------------------------------------------------------ archives


@pytest.mark.parametrize("encoding", ["zstd", pytest.param("gzip", marks=pytest.mark.slow)])
def test_o7_archives_are_verified_and_unpacked(published: Published, encoding: str) -> None:
    p = published
    one, two = p.ran(
        {"Key": "{executionID}", "Encoding": encoding},
        {"renders/1.exr": 20_000, "renders/log": b"1"},
        {"renders/2.exr": b"two", "renders/log": b"2"},
    )

    result = p.get()

    assert p.files().keys() == {
        *(f"{one}/renders/1.exr", f"{one}/renders/log"),
        *(f"{two}/renders/2.exr", f"{two}/renders/log"),
    }
    assert p.files()[f"{two}/renders/2.exr"] == b"two"
    assert result.files == 4
    assert p.get("renders/log", only=[one]).files == 1
    assert p.files()["renders/log"] == b"1", "one execution has no directory of its own"


def test_o7_archives_that_clash_are_not_merged_and_nothing_is_placed(published: Published) -> None:
    p = published
    one, two = p.ran(
        {"Key": "{executionID}", "Encoding": "gzip"},
        {"renders/1.exr": b"1", "renders/log": b"one", "renders/same": b"s"},
        {"renders/2.exr": b"2", "renders/log": b"two", "renders/same": b"s"},
    )

    with pytest.raises(ResultClashError) as refused:
        p.get(merge=True)

    assert f"1 path: renders/log: {', '.join(sorted([one, two]))}" in refused.value.message
    assert p.nothing_is_there()

    assert p.get("renders/same", merge=True).files == 1
    assert p.files() == {"renders/same": b"s"}


def test_o7_an_archive_that_was_replaced_is_refused_before_it_is_unpacked(
    published: Published,
) -> None:
    [execution] = published.ran(
        {"Key": "run.tar.gz", "Encoding": "gzip"}, {"renders/1.exr": b"one"}
    )
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("renders/1.exr"))
    published.put("run.tar.gz", data.getvalue())

    with pytest.raises(ArchiveUnsafeError, match=f"{execution} .* its SHA-256 is"):
        published.get()

    assert published.nothing_is_there()


def test_o7_a_hostile_archive_that_its_document_vouches_for_leads_nowhere(
    published: Published,
) -> None:
    """Who may write to the bucket may write the result document, too."""
    p = published
    [execution] = p.ran({"Key": "run.tar.gz", "Encoding": "gzip"}, {"renders/1.exr": b"one"})
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        info = tarfile.TarInfo("../../../victim")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    hostile = gzip.compress(data.getvalue())
    p.put("run.tar.gz", hostile)
    p.rewrite(execution, lambda found: found["results"][0]["Params"].update(ChecksumSHA256=""))

    with pytest.raises(ArchiveUnsafeError, match=r"'\.\./\.\./\.\./victim': its path is"):
        p.get()

    assert p.nothing_is_there()


def test_o7_an_archive_may_become_only_so_much(published: Published) -> None:
    p = published
    [execution] = p.ran({"Encoding": "gzip"}, {"renders/zeros": bytes(MEBIBYTE)})

    done = p.run("get", JOB, "--published", "--to", p.to, "--max-file-size", "1000", code=99)
    with pytest.raises(ArchiveUnsafeError, match="more than 2000 bytes"):
        p.get(limits=UnpackLimits(total_bytes=2000))

    assert "are more than 1000" in done.stderr
    assert execution in done.stderr
    assert p.nothing_is_there()


def test_o7_raw_brings_archives_as_they_are(published: Published) -> None:
    one, two = published.ran(
        {"Key": "{executionID}", "Encoding": "gzip"}, {"renders/1": b"1"}, {"renders/2": b"2"}
    )

    published.get(raw=True)

    assert published.files().keys() == {f"{one}/{one}.tar.gz", f"{two}/{two}.tar.gz"}
    with tarfile.open(published.to / one / f"{one}.tar.gz") as tar:
        assert tar.getnames() == ["renders/1"]


@pytest.mark.slow
def test_o7_archives_of_one_name_that_publishers_of_an_execution_made_are_not_mixed_up(
    published: Published,
) -> None:
    """One comes if they are the same; seen to fail when the last, or the first, is taken anyway."""
    p = published
    one = {"Key": "a/all", "Encoding": "gzip"}
    runs: dict[str | bytes, bytes | int] = {"renders/1": b"1"}
    p.ran(one, runs, besides=[{**one, "Key": "b/all"}])

    assert p.get(raw=True).files == 1
    assert p.files().keys() == {"all.tar.gz"}
    assert p.get(raw=True).bytes_fetched == 0

    other = Published(p.s3, p.to.parent.parent / "other")
    other.ran(one, runs, besides=[{**one, "Key": "b/all", "Mtime": "zero"}])
    with pytest.raises(ResultClashError, match="published different files of one name") as refused:
        other.get(raw=True)
    for key in ("a/all.tar.gz", "b/all.tar.gz"):
        assert f"s3://{other.bucket}/{other.prefix}/{key}" in refused.value.message
    assert other.nothing_is_there()
    assert other.get().files == 1


def test_o7_after_a_kill_an_archive_goes_on_where_it_was(published: Published) -> None:
    p = published
    data = killed_on_the_way(p)

    result = p.get()

    assert p.files() == {"renders/big": data}
    assert 0 < result.bytes_fetched <= 16 * MEBIBYTE
    assert [path.name for path in p.to.parent.iterdir() if is_partial(path.name)] == []


def test_o7_after_a_power_cut_what_was_not_on_the_disk_is_fetched_again(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = published
    data = killed_on_the_way(p)
    (partial,) = p.to.parent.glob(".propmaster-*/*data-*")
    partial.write_bytes(bytes(partial.stat().st_size))
    started_again = tmp_path / "boot_id"
    started_again.write_text("another\n", encoding="ascii")
    monkeypatch.setattr(copy_partial, "_BOOT_ID", started_again)

    result = p.get()

    assert p.files() == {"renders/big": data}
    assert result.bytes_fetched > 24 * MEBIBYTE
    assert [path.name for path in p.to.parent.iterdir() if is_partial(path.name)] == []


def killed_on_the_way(p: Published) -> bytes:
    """Publish a large archive, and kill who gets it when ranges have come; return its file."""
    data = os.urandom(24 * MEBIBYTE)
    p.ran({"Encoding": "gzip"}, {"renders/big": data})
    slow = Host(
        p.user.home, p.user.store_url, environment=p.user.environment,
        store={"download_limit": "8 MiB"},
    )  # fmt: skip
    process = slow.popen(*map(str, p.arguments("get", JOB, "--published", "--to", p.to)))
    deadline = time.monotonic() + CALL_SECONDS
    while not any(r.stat().st_size >= 32 for r in p.to.parent.glob(".propmaster-*/*ranges-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=CALL_SECONDS)
    assert not p.to.exists()
    return data


# ------------------------------------------------------------ results and links


def test_o5_results_tells_what_was_published_and_what_is_in_the_store(published: Published) -> None:
    one, two = published.ran(
        {"Key": "{executionID}", "Encoding": "gzip"}, {"renders/1": b"1"}, {"renders/2": b"22"}
    )

    result = published.results()
    text = published.run("results", JOB).stdout

    assert [each["execution"] for each in result["executions"]] == [one, two]
    assert [(each["files"], each["bytes"]) for each in result["executions"]] == [(1, 1), (1, 2)]
    assert [each["Params"]["Key"] for each in result["Results"]] == [
        f"{published.prefix}/{one}.tar.gz", f"{published.prefix}/{two}.tar.gz",
    ]  # fmt: skip
    sources = [decode_source(each, source="results") for each in result["Results"]]
    assert [source.key for source in sources] == [
        each["Params"]["Key"] for each in result["Results"]
    ]
    assert f"  published: s3://{published.bucket}/{published.prefix}/{one}.tar.gz" in text


def test_o5_results_tells_how_much_is_published_what_was_left_out_and_what_to_do(
    published: Published,
) -> None:
    p = published
    [one] = p.ran({"Key": "all"}, {"renders/1": b"1", "renders/2": b"22"})

    def change(document: dict[str, Any]) -> None:
        paths = [f"renders/{number}\x1b" for number in range(3, 15)]
        at = {"publisher": 0, "bucket": p.bucket, "key": "all/"}
        document["excluded"] = [{**at, "paths": paths, "more": 7}]
        failure = {**at, "publisher": 1, "key": "taken/", "error": "E_KEY_EXISTS"}
        told = {"message": "it exists", "required": False, "hint": "say Overwrite", "later": True}
        document["failures"] = [{**failure, **told}]

    p.rewrite(one, change)
    [execution] = p.results()["executions"]
    text = p.run("results", JOB).stdout

    assert [(each["files"], each["bytes"]) for each in execution["contents"]] == [(2, 3)]
    assert execution["excluded"][0]["more"] == 7
    assert text.splitlines()[3:] == [
        f"  published: s3://{p.bucket}/{p.prefix}/all/",
        "    2 files, 3 bytes",
        f"  excluded by hand from s3://{p.bucket}/all/: 19 files",
        *(rf"    renders/{number}\x1b" for number in range(3, 13)),
        "    and 9 more",
        f"  not published: s3://{p.bucket}/taken/",
        "    E_KEY_EXISTS: it exists",
        "    hint: say Overwrite",
        "    to be tried again when the session ends",
    ]


def test_o6_each_plain_file_has_a_link_that_ends_when_it_is_told(published: Published) -> None:
    published.ran({"Key": "all"}, {"renders/1": b"one", "renders/2": b"two"})

    result = published.results("--presign", "1m")

    links = {each["Path"]: each["Params"]["PreSignedURL"] for each in result["Results"]}
    assert links.keys() == {"renders/1", "renders/2"}
    assert read(links["renders/2"]) == b"two"
    [first, _] = result["Results"]
    assert first["Type"] == "s3PreSigned"
    assert first["Params"]["SourceSpec"]["Key"] == f"{published.prefix}/all/renders/1"
    signed = parse_qs(urlsplit(links["renders/1"]).query)
    begins = datetime.strptime(signed["X-Amz-Date"][0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    assert signed["X-Amz-Expires"] == ["60"]
    assert result["expires"] == pytest.approx(begins.timestamp() + 60, abs=1)


@pytest.mark.slow
def test_o6_a_link_is_to_the_version_that_was_published(published: Published) -> None:
    p = published
    p.bucket = f"versions-{uuid.uuid4().hex[:12]}"
    client = p.s3.client()
    client.create_bucket(Bucket=p.bucket)
    client.put_bucket_versioning(Bucket=p.bucket, VersioningConfiguration={"Status": "Enabled"})
    p.ran({"Key": "run.tar.gz", "Encoding": "gzip"}, {"renders/1": b"one"})
    p.put("run.tar.gz", b"replaced")

    [link] = p.results("--presign", "1h")["Results"]

    version = link["Params"]["SourceSpec"]["VersionID"]
    assert version
    assert f"versionId={version}" in link["Params"]["PreSignedURL"]
    with tarfile.open(fileobj=io.BytesIO(read(link["Params"]["PreSignedURL"]))) as tar:
        assert tar.getnames() == ["renders/1"]
    assert p.get().files == 1, "get takes that version as well"


def test_o6_links_end_with_the_keys_that_sign_them_and_say_so(
    published: Published, tmp_path: Path
) -> None:
    p = published
    p.ran({"Key": "all"}, {"renders/1": b"one"})
    ends = datetime.now(UTC) + timedelta(minutes=30)
    keys = {
        "Version": 1,
        "AccessKeyId": p.s3.access_key,
        "SecretAccessKey": p.s3.secret_key,
        "Expiration": ends.isoformat(),
    }
    (tmp_path / "keys.json").write_text(json.dumps(keys))
    (tmp_path / "aws-config").write_text(
        f"[default]\nregion = us-east-1\ncredential_process = cat {tmp_path}/keys.json\n"
    )
    temporary = {
        "AWS_ACCESS_KEY_ID": "",
        "AWS_SECRET_ACCESS_KEY": "",
        "AWS_CONFIG_FILE": str(tmp_path / "aws-config"),
    }

    as_json = p.run("results", JOB, "--presign", "12h", "--json", keys=temporary)
    text = p.run("results", JOB, "--presign", "12h", keys=temporary).stdout

    assert json.loads(as_json.stdout)["expires"] == pytest.approx(ends.timestamp(), abs=2)
    assert text.splitlines()[-1].endswith(", when the keys end that signed them")


def test_o6_files_of_the_store_have_links_when_nothing_was_published(published: Published) -> None:
    p = published
    root = p.sessions.started(p.sessions.submitted({"in": b"in"}))
    write_files(root, {"renders/1": b"one"})
    p.sessions.finish()

    [link] = p.results("--presign", "1h")["Results"]

    assert link["Path"] == "renders/1"
    assert read(link["Params"]["PreSignedURL"]) == b"one"


def test_o6_there_are_no_links_to_a_directory_and_no_odd_durations(sessions: Sessions) -> None:
    write_files(sessions.started(sessions.submitted()), {"renders/1": b"one"})
    sessions.finish()
    where = ["--store", sessions.host.store_url, "--farm-id", FARM, "--queue-id", QUEUE]

    refused = sessions.host.run("results", JOB, *where, "--presign", "1h")
    odd = sessions.host.run("results", JOB, *where, "--presign", "8d")

    assert (refused.returncode, refused.stdout) == (67, "")
    assert "there are no links to its files" in refused.stderr
    assert odd.returncode == 2
    assert "not between 1s and 7d" in odd.stderr
