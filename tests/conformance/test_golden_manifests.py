"""Manifests that the real library encoded, and the real library itself, byte for byte.

golden/ holds what `deadline` made of small trees: `<name>.manifest` are its bytes, vectors.json
says what is in them.
"""

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import xxhash

from agent_plugin.content import manifest as manifests
from agent_plugin.content.digest import EMPTY_HASH, Digest, hash_name
from agent_plugin.content.errors import ManifestInvalidError
from agent_plugin.content.manifest import FileEntry, Manifest
from agent_plugin.content.manifest_rules import path_defect
from tests.servers.deadline_peers import CLIENT_PYTHON

GOLDEN = Path(__file__).with_name("golden")
VECTORS: dict[str, Any] = json.loads((GOLDEN / "vectors.json").read_bytes())
# The library's decoder takes it; we refuse it. It is in no other test.
REFUSED = "synthetic_extremes"
NAMES = sorted(VECTORS["manifests"].keys() - {REFUSED})


def golden(name: str) -> bytes:
    return (GOLDEN / f"{name}.manifest").read_bytes()


def test_every_golden_manifest_is_described() -> None:
    assert sorted(path.stem for path in GOLDEN.glob("*.manifest")) == sorted(VECTORS["manifests"])


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_manifest_is_encoded_again_byte_for_byte(name: str) -> None:
    data = golden(name)

    manifest = manifests.decode(data, source=name)

    assert manifests.encode(manifest) == data


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_manifest_holds_what_the_library_says(name: str) -> None:
    said = VECTORS["manifests"][name]

    manifest = manifests.decode(golden(name), source=name, expected_hash=said["xxh128_of_bytes"])

    assert [entry.path for entry in manifest.entries] == said["order"]
    assert manifest.total_bytes == said["totalSize"]
    keys = sorted({f"Data/{entry.digest.hex}.xxh128" for entry in manifest.entries})
    assert keys == said["data_keys"]


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_entries_does_not_depend_on_how_they_come(name: str) -> None:
    manifest = manifests.decode(golden(name), source=name)
    shuffled = list(manifest.entries)
    random.Random(name).shuffle(shuffled)

    assert manifests.encode(Manifest.of(shuffled)) == golden(name)


@pytest.mark.parametrize("name", sorted(VECTORS["manifests"]))
def test_the_hash_of_a_golden_manifest_is_the_library_s(name: str) -> None:
    said = VECTORS["manifests"][name]

    assert Digest.of(golden(name)) == Digest(said["xxh128_of_bytes"], said["bytes"])


def test_what_the_library_would_read_but_leaves_the_root_is_refused() -> None:
    with pytest.raises(ManifestInvalidError, match=r"entry 0 \('/abs'\): path is absolute"):
        manifests.decode(golden(REFUSED), source=REFUSED)


@pytest.mark.parametrize("text", ["empty", "a", "hello world"])
def test_hashes_are_the_library_s(text: str) -> None:
    data = b"" if text == "empty" else text.encode()

    assert Digest.of(data).hex == VECTORS["hashes"][text]


@pytest.mark.parametrize("root", sorted(VECTORS["names"]["roots"]))
def test_the_names_of_manifests_are_the_library_s(root: str) -> None:
    names = VECTORS["names"]["roots"][root]

    assert f"{hash_name(root)}_input" == names["input_manifest_name"]
    assert f"{hash_name(root)}_output" == names["output_manifest_name[fsl=None]"]
    assert f"{hash_name('Projects' + root)}_output" == names["output_manifest_name[fsl=Projects]"]


# Run by the client's Python: entries in, what the library makes of them out; then documents in,
# what it reads from them and writes again out.
PEER = """
import json, sys
from deadline.job_attachments.asset_manifests import HashAlgorithm
from deadline.job_attachments.asset_manifests.decode import decode_manifest
from deadline.job_attachments.asset_manifests.v2023_03_03 import AssetManifest, ManifestPath

def written(entries):
    paths = [ManifestPath(**entry) for entry in entries]
    total = sum(entry["size"] for entry in entries)
    return AssetManifest(hash_alg=HashAlgorithm.XXH128, paths=paths, total_size=total).encode()

def read(document):
    manifest = decode_manifest(document)
    return [manifest.encode(), [[p.hash, p.mtime, p.path, p.size] for p in manifest.paths]]

request = json.load(sys.stdin)
answer = [[written(entries), read(ours)] for entries, ours in request]
json.dump(answer, sys.stdout)
"""

ROUNDS = 300
NAME_PARTS = [
    *'abzAZ09._-~ !"\\\t\n\b\f\r\x01\x1f\x7f\x80\xa0\xad\u00e9\u0301\u2028\u65e5\ufeff\ufffd\uffff',
    "\ue000",
    "\uf8ff",
    "\ud7ff",
    "\U00010000",
    "\U0001f600",
    "\U0010ffff",
    "\U0010fffd",
    "\udc80",
    "\udce9",
    "\udcff",
    "0000",
]


def random_entries(source: random.Random) -> list[dict[str, object]]:
    """Return entries of one to thirty files, in any order, that we accept."""
    entries: dict[str, dict[str, object]] = {}
    for _ in range(source.randint(1, 30)):
        path = "/".join(
            "".join(source.choices(NAME_PARTS, k=source.randint(1, 8)))
            for _ in range(source.randint(1, 4))
        )
        if path_defect(path) is None and not any(
            path.startswith(f"{other}/") or other.startswith(f"{path}/") for other in entries
        ):
            size = source.choice([0, 1, source.getrandbits(40)])
            random_hash = xxhash.xxh3_128_hexdigest(source.randbytes(8))
            entries[path] = {
                "path": path,
                "hash": random_hash if size else EMPTY_HASH,
                "size": size,
                "mtime": source.choice([-1, 0, source.getrandbits(50), -source.getrandbits(50)]),
            }
    return list(entries.values())


@pytest.mark.peers
def test_the_real_library_writes_and_reads_the_same_bytes() -> None:
    source = random.Random(20230303)
    asked = [entries for _ in range(ROUNDS) if (entries := random_entries(source))]
    ours = [
        manifests.encode(Manifest.of(FileEntry(**entry) for entry in entries))  # type: ignore[arg-type]  # values of several types
        for entries in asked
    ]

    completed = subprocess.run(
        [CLIENT_PYTHON, "-c", PEER],
        input=json.dumps([[e, data.decode()] for e, data in zip(asked, ours, strict=True)]),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert completed.returncode == 0, completed.stderr
    answers = json.loads(completed.stdout)
    assert len(answers) == len(ours) > ROUNDS * 0.9
    for data, (written, (rewritten, read)) in zip(ours, answers, strict=True):
        manifest = manifests.decode(written.encode(), source="the library's")
        assert data == written.encode() == rewritten.encode()
        assert read == [[e.hash, e.mtime, e.path, e.size] for e in manifest.entries]
