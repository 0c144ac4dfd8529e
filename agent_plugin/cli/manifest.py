"""`propmaster manifest`: show, check, compare and make manifests."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import click
import msgspec

from agent_plugin.cli.options import common_options, open_document, print_json, say
from agent_plugin.cli.signals import cancel_on_signals
from agent_plugin.content.digest import Digest, hash_fd
from agent_plugin.content.errors import (
    LocalReadError,
    LocalWriteError,
    ManifestInvalidError,
    UnsafePathError,
    local_write_error,
)
from agent_plugin.content.local_index import LocalIndex
from agent_plugin.content.manifest import (
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    decode,
    diff,
    encode,
)
from agent_plugin.content.safe_path import Root
from agent_plugin.content.snapshot import hash_files, walk
from agent_plugin.content.store import Cancellation
from agent_plugin.services import ask_store, state_directory
from agent_plugin.settings import load
from agent_plugin.transfer.asking import Asking
from agent_plugin.transfer.progress import format_bytes

_HASH: Final = re.compile("[0-9a-f]{32}")

_file_argument = click.Path(path_type=Path, dir_okay=False, allow_dash=True)


class ShowResult(msgspec.Struct):
    """What `manifest show` prints; `hash` is the xxh128 of the document, `bytes` of the files."""

    files: int
    bytes: int
    hash: str
    paths: list[FileEntry]


class Difference(msgspec.Struct):
    """A file that is not what the manifest says; `where` is `root` or `store`."""

    path: str
    where: str
    reason: str


class VerifyResult(msgspec.Struct):
    """What `manifest verify` prints; `checked` lists what was looked at besides the format."""

    files: int
    bytes: int
    hash: str
    checked: list[str]
    differences: list[Difference]


class DiffResult(msgspec.Struct):
    """What `manifest diff` prints; entries as in manifests, of `deleted` those of A, else of B."""

    new: Sequence[FileEntry]
    changed: Sequence[FileEntry]
    deleted: Sequence[FileEntry]
    touched: Sequence[FileEntry]


class SnapshotResult(msgspec.Struct):
    """What `manifest snapshot --output` prints."""

    output: str
    files: int
    bytes: int
    hash: str


@dataclass(frozen=True, slots=True)
class _Document:
    manifest: Manifest
    hash: str


def _hash(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    if value is None or _HASH.fullmatch(value):
        return value
    raise click.BadParameter(f"{value!r} is no xxh128: 32 hexadecimal digits, lower case")


@click.group(name="manifest")
def command() -> None:
    """Show, check, compare and make manifests: which files, with which content, are below a root.

    FILE is a manifest on this host; - reads standard input.
    """


@command.command(name="show")
@click.argument("file", type=_file_argument)
@click.option("--limit", type=click.IntRange(min=0), help="List at most this many files.")
@common_options
def show_command(file: Path, limit: int | None, as_json: bool, config: Path | None) -> None:
    """Print how many files and bytes FILE names, and each file's size, time, hash and path."""
    load(config)
    document = _read(file)
    manifest = document.manifest
    shown = list(islice(manifest.entries, limit))
    if as_json:
        print_json(ShowResult(len(manifest), manifest.total_bytes, document.hash, shown))
        return
    say(f"{len(manifest)} files, {manifest.total_bytes} bytes, xxh128 {document.hash}")
    say(f"{'bytes':>14} {'modified (us)':>17} {'xxh128':<32} path")
    for entry in shown:
        say(f"{entry.size:>14} {entry.mtime:>17} {entry.hash} {entry.path}")
    if len(shown) < len(manifest):
        say(f"{len(manifest) - len(shown)} more files; leave out --limit to see them")


@command.command(name="verify")
@click.argument("file", type=_file_argument)
@click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Check that each file is below this directory, with these bytes and this time.",
)
@click.option(
    "--store", "store_url", metavar="URL", help="Check that the store has each file's content."
)
@click.option(
    "--expected-hash",
    callback=_hash,
    metavar="XXH128",
    help="What the manifest itself has to hash to.",
)
@common_options
def verify_command(
    file: Path,
    root: Path | None,
    store_url: str | None,
    expected_hash: str | None,
    as_json: bool,
    config: Path | None,
) -> None:
    """Check FILE against the format's rules and, if asked, against a directory or a store.

    Exits with 1 if a file differs, and names each one; with 65 if FILE itself breaks a rule. Every
    byte below --root is read; of the blobs in --store, only that they are there and their size.
    """
    settings = load(config)
    document = _read(file, expected_hash=expected_hash)
    manifest = document.manifest
    result = VerifyResult(len(manifest), manifest.total_bytes, document.hash, [], [])
    with cancel_on_signals() as cancellation:
        if root is not None:
            result.checked.append("root")
            result.differences.extend(_below(root, manifest, cancellation))
        if store_url is not None:
            result.checked.append("store")
            asking = ask_store(settings, store_url, cancellation=cancellation)
            result.differences.extend(_lacking(asking, manifest))
    if as_json:
        print_json(result)
    else:
        _print_verified(result)
    if result.differences:
        raise click.exceptions.Exit(1)


@command.command(name="diff")
@click.argument("before", metavar="A", type=_file_argument)
@click.argument("after", metavar="B", type=_file_argument)
@common_options
def diff_command(before: Path, after: Path, as_json: bool, config: Path | None) -> None:
    """Print what became of the files of A in B: new, changed, deleted, or only touched.

    A touched file has the same content and another time. Exits with 0 either way.
    """
    load(config)
    if os.fspath(before) == os.fspath(after) == "-":
        raise click.UsageError("A and B can not both be standard input")
    found = diff(_read(before).manifest, _read(after).manifest)
    result = DiffResult(found.new, found.changed, found.deleted, found.touched)
    if as_json:
        print_json(result)
        return
    for kind in result.__struct_fields__:
        for entry in getattr(result, kind):
            say(f"{kind:<8} {entry.path}")
    say(
        f"{len(result.new)} new, {len(result.changed)} changed, {len(result.deleted)} deleted,"
        f" {len(result.touched)} touched"
    )


@command.command(name="snapshot")
@click.argument(
    "directory", metavar="DIR", type=click.Path(path_type=Path, file_okay=False, exists=True)
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where the manifest goes; otherwise to standard output.",
)
@click.option(
    "--include-dir",
    "include_dirs",
    multiple=True,
    metavar="REL",
    help="Only this directory below DIR; may be given more than once.",
)
@common_options
def snapshot_command(
    directory: Path,
    output: Path | None,
    include_dirs: tuple[str, ...],
    as_json: bool,
    config: Path | None,
) -> None:
    """Hash the files of DIR and write their manifest, in its canonical bytes.

    Files that have not changed since they were last hashed are not read again. A link counts as
    the file it leads to; each one that leads out of DIR, or nowhere, is skipped with a
    `file.skipped` event on standard error. Without --output, standard output is the manifest.
    """
    for name in include_dirs:
        if not (directory / name).is_dir():
            raise click.BadParameter(f"there is no directory {name!r} below {directory}")
    with (
        cancel_on_signals() as cancellation,
        LocalIndex.open(state_directory(load(config)) / "index.db") as index,
    ):
        manifest = _snapshot(directory, include_dirs or (".",), index, cancellation)
    data = encode(manifest)
    if output is None:
        sys.stdout.buffer.write(data)
        return
    _write(output, data)
    result = SnapshotResult(
        os.fspath(output), len(manifest), manifest.total_bytes, Digest.of(data).hex
    )
    if as_json:
        print_json(result)
        return
    say(f"{output}: {result.files} files, {format_bytes(result.bytes)}, xxh128 {result.hash}")


def _read(file: Path, *, expected_hash: str | None = None) -> _Document:
    source = "standard input" if os.fspath(file) == "-" else os.fspath(file)
    try:
        with open_document(file) as opened:
            data = opened.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise LocalReadError(
            f"{source}: {error.strerror}", hint="give the path of a manifest on this host"
        ) from error
    manifest = decode(data, source=source, expected_hash=expected_hash)
    return _Document(manifest, Digest.of(data).hex)


def _below(root: Path, manifest: Manifest, cancellation: Cancellation) -> Iterator[Difference]:
    with Root(root) as opened:
        for entry in manifest.entries:
            cancellation.check()
            reason = _difference(opened, entry, cancellation)
            if reason:
                yield Difference(entry.path, "root", reason)


def _lacking(asking: Asking, manifest: Manifest) -> Iterator[Difference]:
    digests = {entry.digest for entry in manifest.entries}
    missing = asking.ask(lambda store: store.find_missing(digests))
    for entry in manifest.entries:
        if entry.digest in missing:
            yield Difference(entry.path, "store", f"the store lacks {entry.digest}")


def _difference(root: Root, entry: FileEntry, cancellation: Cancellation) -> str:
    """Return how a file differs from its entry, empty when it does not; reads all of it."""
    try:
        fd = root.open_file(entry.path)
    except FileNotFoundError:
        return "it is not there"
    except (LocalReadError, UnsafePathError) as error:
        return error.message
    try:
        status = os.fstat(fd)
        if status.st_size != entry.size:
            return f"it has {status.st_size} bytes, not {entry.size}"
        found = hash_fd(fd, cancellation=cancellation)
    except OSError as error:
        return f"it can not be read: {error.strerror}"
    finally:
        os.close(fd)
    if found != entry.digest:
        return f"its content is {found}, not {entry.digest}"
    mtime = status.st_mtime_ns // 1000
    return "" if mtime == entry.mtime else f"its time is {mtime} us, not {entry.mtime}"


def _print_verified(result: VerifyResult) -> None:
    for difference in result.differences:
        say(f"{difference.where:<5} {difference.path}: {difference.reason}")
    checked = " and ".join(["the format's rules", *(f"the {what}" for what in result.checked)])
    say(
        f"{result.files} files, {format_bytes(result.bytes)}, checked against {checked}:"
        f" {len(result.differences)} differences"
    )


def _snapshot(
    directory: Path, include_dirs: Sequence[str], index: LocalIndex, cancellation: Cancellation
) -> Manifest:
    found_files = walk(directory, include_dirs, cancellation=cancellation)
    with Root(directory) as root:
        entries = [
            FileEntry(hash=digest.hex, mtime=found.mtime_us, path=found.path, size=digest.size)
            for found, digest in hash_files(root, found_files, index, cancellation=cancellation)
        ]
    if not entries:
        raise ManifestInvalidError(
            f"{directory} has no files there, and a root without files has no manifest",
            hint="give a directory with files; links that lead out of it count as none",
        )
    return Manifest(entries, source=os.fspath(directory))


def _write(output: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, 0600.

    Raises:
        NoSpaceError, LocalWriteError: It could not be written, or is something like a device.
    """
    if output.exists() and not output.is_file():
        raise LocalWriteError(f"{output} is no regular file", hint="give another --output")
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with open(fd, "wb") as file:  # noqa: PTH123 - a descriptor, not a path
                file.write(data)
            partial.replace(output)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise local_write_error(error, os.fspath(output)) from error
