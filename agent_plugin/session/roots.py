"""Where a job's asset roots are on this host, and what the store calls their manifests.

Pure: nothing here looks at a disk or a store. The names are a contract with the Deadline Cloud
client and worker agent; tests compare them with values the real packages computed.

A root with a file system location that the queue maps is at the rule's destination, a directory
that exists independently of the session. Every other root is a directory of the session, whose name
follows from the root's path alone.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from agent_plugin.content.digest import hash_name
from agent_plugin.content.errors import ManifestInvalidError, PathMappingError
from agent_plugin.session.job import JobDocument, ManifestProperties, PathMappingRule

SESSION_DIRECTORY_PREFIX: Final = "assetroot-"
ASSET_ROOT: Final = "asset-root"
ASSET_ROOT_JSON: Final = "asset-root-json"
LOCATION: Final = "file-system-location-name"
# Ours; other readers do not look for a location by its name.
LOCATION_JSON: Final = "file-system-location-name-json"

# 9999-12-31T23:59:59Z; a later year has five digits and would sort before all others.
LAST_SECOND: Final = 253402300799


@dataclass(frozen=True, slots=True)
class LocalRoot:
    """A directory of this host that holds one or more of the job's asset roots.

    Attributes:
        path: The directory, absolute.
        manifests: Indexes into the job's manifests, ascending; later ones win where they overlap.
        mapped: Whether a rule of the queue led here; if not, it is a directory of the session.
        inside: The nearest other local root that this one is inside of. Both then see the same
            files, so a file below both output directories is uploaded for each; tell the user.
    """

    path: Path
    manifests: tuple[int, ...]
    mapped: bool
    inside: Path | None = None


def session_directory_name(root_path: str) -> str:
    """Return the name of the session's directory for a root: `assetroot-` and 20 hex digits."""
    digits = hashlib.shake_256(os.fsencode(root_path)).hexdigest(10)
    return f"{SESSION_DIRECTORY_PREFIX}{digits}"


def choose_local_roots(job: JobDocument, session_dir: Path) -> list[LocalRoot]:
    """Return the directories that the job's asset roots have on this host, without repetition.

    Args:
        job: The job; path rules are applied only to manifests with a file system location, and only
            when a rule's source path is exactly the manifest's root path.
        session_dir: The session's directory, absolute.

    Raises:
        PathMappingError: There are rules, but none for a root with a file system location; or a
            rule leads to something that is not an absolute path of this host, or to a directory
            that holds the session directory.
    """
    chosen: dict[Path, LocalRoot] = {}
    for index, manifest in enumerate(job.attachments.manifests):
        rule = _rule_for(manifest, job.path_mapping_rules)
        if rule is None:
            path = session_dir / session_directory_name(manifest.root_path)
        else:
            path = _destination(rule, session_dir)
        known = chosen.get(path, LocalRoot(path, (), mapped=False))
        chosen[path] = LocalRoot(path, (*known.manifests, index), known.mapped or rule is not None)
    return [
        LocalRoot(root.path, root.manifests, root.mapped, _nearest_above(root.path, chosen))
        for root in chosen.values()
    ]


def path_mapping_rules(job: JobDocument, session_dir: Path) -> list[PathMappingRule]:
    """Return the session's rules: the queue's, then one for each root in the session directory.

    `msgspec.to_builtins` makes the job document's shape of them.

    Raises:
        PathMappingError: As for `choose_local_roots`.
    """
    appended: dict[str, PathMappingRule] = {}
    for manifest in job.attachments.manifests:
        if _rule_for(manifest, job.path_mapping_rules) is None:
            directory = session_dir / session_directory_name(manifest.root_path)
            appended[manifest.root_path] = PathMappingRule(
                manifest.root_path_format, manifest.root_path, str(directory)
            )
    return [*job.path_mapping_rules, *appended.values()]


def is_below(path: str, directories: Iterable[str]) -> bool:
    """Tell whether a path is in one of the directories; all relative to one root, `.` is it."""
    return any(PurePosixPath(path).is_relative_to(directory) for directory in directories)


def timestamp(seconds: float) -> str:
    """Return a time as keys of outputs carry it: UTC, microseconds cut off, `…T15:35:12.000000Z`.

    The arithmetic is the worker agent's, down to its rounding: 1719848112.000001 is a little less
    as a binary fraction, so it gives .000000. Readers take the last name, so order is by time.

    Args:
        seconds: Since the epoch, 0 to the end of the year 9999.

    Raises:
        ValueError: `seconds` is not in that range.
    """
    if not 0 <= seconds <= LAST_SECOND:
        raise ValueError(f"no time of an output: {seconds}")
    whole = int(seconds)
    microseconds = int((seconds - whole) * 1_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{microseconds:06}Z"


def input_manifest_key(farm: str, queue: str, guid: str, root: str) -> str:
    """Return the key below `Manifests/` of a root's input manifest.

    Args:
        farm: Id of the farm.
        queue: Id of the queue.
        guid: 32 hex digits, one for each root of a submission.
        root: The submitter's directory on this host; a trailing slash makes no difference.
    """
    return f"{farm}/{queue}/Inputs/{guid}/{hash_name(str(PurePosixPath(root)))}_input"


def output_manifest_prefix(farm: str, queue: str, job: str, step: str, task: str | None) -> str:
    """Return what the keys of a task's output manifests begin with, ending in a slash.

    Without a task it is the step's: a chunk's manifests are there directly, all tasks' below it.
    """
    return "/".join([farm, queue, job, step, *([task] if task else []), ""])


def output_manifest_key(
    farm: str,
    queue: str,
    job: str,
    step: str,
    task: str | None,
    started_at: float,
    session_action: str,
    manifest: ManifestProperties,
) -> str:
    """Return the key below `Manifests/` of the output manifest of one root.

    Args:
        farm: Id of the farm.
        queue: Id of the queue.
        job: Id of the job.
        step: Id of the step.
        task: Id of the task; None for a chunk of tasks.
        started_at: When the session action started, seconds since the epoch.
        session_action: Id of the session action.
        manifest: The root; its path counts as it is spelled.

    Raises:
        ValueError: As for `timestamp`.
    """
    prefix = output_manifest_prefix(farm, queue, job, step, task)
    name = hash_name((manifest.file_system_location_name or "") + manifest.root_path)
    return f"{prefix}{timestamp(started_at)}_{session_action}/{name}_output"


def output_metadata(root_path: str, location: str | None) -> dict[str, str]:
    """Return the metadata of a root's output manifest, by which readers know the root; all ASCII.

    A root that a header can not carry as it is (not ASCII; control characters; white space at an
    end, which S3 cuts off) is given as JSON as well, which readers prefer. So is a location, of
    which the service's own agent leaves what S3 leaves of it.
    """
    metadata = {ASSET_ROOT: root_path}
    if not root_path.isascii() or not root_path.isprintable() or root_path != root_path.strip():
        metadata[ASSET_ROOT] = metadata[ASSET_ROOT_JSON] = json.dumps(root_path)
    if location and (kept := location.strip()):
        metadata[LOCATION] = kept
    if location and location != location.strip():
        metadata[LOCATION_JSON] = json.dumps(location)
    return metadata


def root_from_metadata(metadata: Mapping[str, str]) -> str:
    """Return the root path that an output manifest belongs to.

    Raises:
        ManifestInvalidError: The metadata names no root; no reader can place such a manifest.
    """
    if ASSET_ROOT_JSON in metadata:
        return _from_json(metadata, ASSET_ROOT_JSON)
    if (plain := metadata.get(ASSET_ROOT)) is None:
        raise ManifestInvalidError(
            f"the manifest's metadata has neither {ASSET_ROOT} nor {ASSET_ROOT_JSON}",
            hint="it was copied without its metadata, or is not an output manifest",
        )
    return plain


def location_from_metadata(metadata: Mapping[str, str]) -> str | None:
    """Return the name of the file system location of an output manifest's root, if it has one.

    Raises:
        ManifestInvalidError: It is given as JSON, and is none.
    """
    if LOCATION_JSON in metadata:
        return _from_json(metadata, LOCATION_JSON)
    return metadata.get(LOCATION)


def _from_json(metadata: Mapping[str, str], name: str) -> str:
    try:
        decoded = json.loads(metadata[name])
    except (ValueError, RecursionError) as error:
        raise ManifestInvalidError(f"{name} is not JSON: {metadata[name]!r}") from error
    if not isinstance(decoded, str):
        raise ManifestInvalidError(f"{name} is not a string: {metadata[name]!r}")
    try:
        is_name = b"\0" not in os.fsencode(decoded)
    except UnicodeEncodeError:
        # Half a character, which JSON can spell, and which stands for no byte.
        is_name = False
    if not is_name:
        raise ManifestInvalidError(f"{name} is nothing that a path can be: {metadata[name]!r}")
    return decoded


def _rule_for(
    manifest: ManifestProperties, rules: Sequence[PathMappingRule]
) -> PathMappingRule | None:
    if manifest.file_system_location_name is None or not rules:
        return None
    for rule in rules:
        # The first of several, as Open Job Description does when it maps the job's parameters.
        if rule.source_path == manifest.root_path:
            return rule
    known = ", ".join(rule.source_path for rule in rules)
    raise PathMappingError(
        f"no path mapping rule has the source path {manifest.root_path!r}, the root of file system"
        f" location {manifest.file_system_location_name!r}",
        hint=f"the rules' source paths are: {known}; one must be exactly the root: add it to the"
        " storage profile of the queue's fleet",
    )


def _destination(rule: PathMappingRule, session_dir: Path) -> Path:
    path = Path(rule.destination_path)
    if not path.is_absolute() or ".." in path.parts:
        raise PathMappingError(
            f"the path mapping rule for {rule.source_path!r} leads to {rule.destination_path!r},"
            " which is not an absolute path of this host",
            hint="correct the storage profile of the queue's fleet",
        )
    if session_dir.is_relative_to(path):
        raise PathMappingError(
            f"the path mapping rule for {rule.source_path!r} leads to {path}, which holds the"
            f" session directory {session_dir}",
            hint="keep session directories outside of what the job's roots are mapped to",
        )
    return path


def _nearest_above(path: Path, roots: Mapping[Path, LocalRoot]) -> Path | None:
    return next((above for above in path.parents if above in roots), None)
