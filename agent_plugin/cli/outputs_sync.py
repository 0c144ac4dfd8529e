"""`propmaster outputs sync`: a queue's new outputs come to this host, each once."""

import math
import os
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

import click

from agent_plugin.cli.options import common_options, farm_option, print_json, queue_option, say
from agent_plugin.cli.signals import cancel_on_signals
from agent_plugin.content.errors import JobInvalidError, LocalReadError
from agent_plugin.content.named_file import open_named
from agent_plugin.content.s3_environment import Keys
from agent_plugin.farm import Farm
from agent_plugin.services import open_services, state_directory
from agent_plugin.session.job import check_id
from agent_plugin.session.path_rules import MAX_RULES_BYTES, JobRules, PathRules, read_rules
from agent_plugin.session.sync import RulesFor, SyncedJob, SyncRequest, SyncResult, sync
from agent_plugin.session.sync_checkpoint import VERSION, Header, open_checkpoint
from agent_plugin.settings import load
from agent_plugin.transfer.conflicts import Conflict
from agent_plugin.transfer.progress import format_bytes

P = ParamSpec("P")
R = TypeVar("R")

# The host's clock is compared with the store's times; as much as the Deadline client allows for.
SKEW_SECONDS: Final = 120.0

_PROFILE: Final = re.compile(r"sp-[0-9a-f]{32}")
_OWN: Final = "own"
_RULES: Final = "rules"


def conflict_option(default: Conflict) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Give a command --conflict-resolution, as `conflict_resolution`."""
    return click.option(
        "--conflict-resolution",
        type=click.Choice([each.value for each in Conflict], case_sensitive=False),
        default=default.value,
        show_default=True,
        help="What becomes of a file of other content that stands in the way.",
    )


@click.command(name="sync")
@click.argument("job_ids", metavar="[JOB]...", nargs=-1)
@click.option(
    "--store",
    "store_url",
    metavar="URL",
    help="The content store; otherwise the queue's, by the Deadline API, with the queue's keys.",
)
@farm_option
@queue_option
@click.option(
    "--storage-profile-id",
    metavar="ID",
    help="This host's storage profile: paths of jobs are mapped by the Deadline API.",
)
@click.option(
    "--path-mapping-rules",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Map paths by the rules of this file (Open Job Description's form).",
)
@click.option(
    "--ignore-storage-profiles",
    is_flag=True,
    help="Download to the jobs' own root paths; so it is unless rules or a profile are given.",
)
@click.option(
    "--bootstrap-lookback-minutes",
    type=float,
    help="For the first sync: outputs this old are wanted, too; inf for all.  [default: 0]",
)
@click.option("--force-bootstrap", is_flag=True, help="Forget what was brought; begin anew.")
@click.option(
    "--checkpoint-dir",
    type=click.Path(path_type=Path, file_okay=False, resolve_path=True),
    help="Where it is noted what was brought; otherwise `sync` in the state directory.",
)
@conflict_option(Conflict.OVERWRITE)
@click.option("--dry-run", is_flag=True, help="Only tell what would be brought.")
@common_options
def sync_command(
    job_ids: tuple[str, ...],
    store_url: str | None,
    farm_id: str,
    queue_id: str,
    storage_profile_id: str | None,
    path_mapping_rules: Path | None,
    ignore_storage_profiles: bool,
    bootstrap_lookback_minutes: float | None,
    force_bootstrap: bool,
    checkpoint_dir: Path | None,
    conflict_resolution: str,
    dry_run: bool,
    as_json: bool,
    config: Path | None,
) -> None:
    """Download what tasks of a queue have left since the last sync, verified, each once.

    With JOBs, all of their outputs that were not brought. May be killed at any moment, and goes on
    where it was.
    """
    since = _since(bootstrap_lookback_minutes or 0.0)
    _check_ids(farm_id, queue_id, job_ids, storage_profile_id)
    if sum(map(bool, (storage_profile_id, path_mapping_rules, ignore_storage_profiles))) > 1:
        raise click.UsageError(
            "give one of --storage-profile-id, --path-mapping-rules, --ignore-storage-profiles"
        )
    settings = load(config)
    with cancel_on_signals() as cancellation:
        farm = Farm(farm_id, os.environ, cancellation)
        rules_for = _rules_for(farm, queue_id, storage_profile_id, path_mapping_rules)
        environment: Mapping[str, str] = os.environ
        keys: Keys | None = None
        if store_url is None:
            store_url = farm.store_url(queue_id)
            environment, keys = farm.store_environment, partial(farm.queue_keys, queue_id)
        scope = storage_profile_id or (_RULES if path_mapping_rules else _OWN)
        directory = checkpoint_dir or state_directory(settings) / "sync"
        path = directory / f"{queue_id}_{scope}.jsonl"
        header = Header(VERSION, store_url, farm_id, queue_id, scope, since)
        request = SyncRequest(
            farm_id=farm_id,
            queue_id=queue_id,
            rules_for=rules_for,
            job_ids=job_ids,
            conflict=Conflict(conflict_resolution.lower()),
            dry_run=dry_run,
        )
        with (
            open_checkpoint(path, header, anew=force_bootstrap, keep=dry_run) as checkpoint,
            open_services(
                settings,
                store_url,
                cancellation=cancellation,
                queue_id=queue_id,
                environment=environment,
                keys=keys,
            ) as context,
        ):
            result, failures = sync(context, checkpoint, request, path)
    if as_json:
        print_json(result)
    else:
        _show(result, named=bool(job_ids))
    if bootstrap_lookback_minutes is not None and not result.first:
        say(
            "--bootstrap-lookback-minutes counts for the first sync only; with --force-bootstrap"
            " this would be one",
            err=True,
        )
    if failures:
        # The others were brought; the result tells of each.
        raise failures[0]


def _since(minutes: float) -> float:
    if math.isnan(minutes) or minutes < 0:
        raise click.UsageError("--bootstrap-lookback-minutes is a number from 0, or inf")
    # Whole seconds, since the times of S3 are.
    return max(0.0, float(int(time.time())) - minutes * 60 - SKEW_SECONDS)


def _check_ids(farm_id: str, queue_id: str, job_ids: tuple[str, ...], profile: str | None) -> None:
    check_id(farm_id, "farm")
    check_id(queue_id, "queue")
    for job_id in job_ids:
        check_id(job_id, "job")
    if profile is not None and not _PROFILE.fullmatch(profile):
        raise JobInvalidError(
            f"{profile!r} is not the id of a storage profile",
            hint="its form is `sp-` and 32 hexadecimal digits in lower case",
        )


def _rules_for(farm: Farm, queue_id: str, profile_id: str | None, file: Path | None) -> RulesFor:
    if profile_id is not None:
        profile = profile_id
        farm.check_profile(queue_id, profile)
        return lambda job_id, known: farm.rules_for(queue_id, job_id, profile, known)
    rules = PathRules(None if file is None else read_rules(_read(file), os.fspath(file)))
    return lambda _job_id, _known: JobRules(rules)


def _read(path: Path) -> bytes:
    try:
        with open_named(path) as file:
            return file.read(MAX_RULES_BYTES + 1)
    except OSError as error:
        raise LocalReadError(f"{path}: {error.strerror}") from error


def _show(result: SyncResult, *, named: bool) -> None:
    if result.first and not named:
        _show_beginning(result.since)
    for job in result.jobs:
        _show_job(job, dry_run=result.dry_run)
    if not result.jobs:
        say("nothing new of what was named" if named else "nothing new")
    elif result.dry_run:
        say(f"{result.files} files would be in place, {format_bytes(result.bytes)}")
    else:
        say(
            f"{result.files} files in place, {format_bytes(result.bytes)},"
            f" {format_bytes(result.bytes_fetched)} fetched, {result.seconds} s"
        )


def _show_beginning(since: float) -> None:
    if not since:
        say("first sync: all outputs")
        return
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))
    say(f"first sync: outputs since {when}; --bootstrap-lookback-minutes takes earlier ones")


def _show_job(job: SyncedJob, *, dry_run: bool) -> None:
    reason = f": {job.reason}" if job.reason else ""
    state = "would be synced" if dry_run and job.state == "synced" else job.state
    say(f"job {job.job_id}: {state}, {job.files} files{reason}")
    for root in job.roots:
        say(f"  below {root}")
    if job.left:
        say(f"  {job.left} files left out: something stands at their path")
    for copy in job.copies:
        say(f"  copy {copy}")
    if job.unmapped_files:
        say(
            f"  {job.unmapped_files} files have no place on this host until rules or a storage"
            f" profile give them one, such as {job.unmapped[0]}"
        )
    if job.given_up:
        say(f"  {job.given_up} manifests were given up; name the job to try them again")
