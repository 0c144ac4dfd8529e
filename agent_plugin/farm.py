"""The Deadline Cloud API, for commands of a user's host: where outputs are, and where they belong.

Asked only for what no store can tell: a queue's bucket, the keys of its role, and the storage
profiles by which paths of a submitter's host are mapped to paths of this one.

Calls are made by a thread that nobody has to wait for, one at a time.

Source: https://docs.aws.amazon.com/deadline-cloud/latest/APIReference/ (2023-10-12)
"""

from collections.abc import Mapping
from typing import Any, Final, TypeVar

import msgspec

from agent_plugin import schema
from agent_plugin.content.errors import (
    JobInvalidError,
    SettingsInvalidError,
    StoreAccessError,
    StoreProtocolError,
)
from agent_plugin.content.flight import Lanes
from agent_plugin.content.s3_environment import Credentials, boto_errors, region_of
from agent_plugin.content.store import Cancellation
from agent_plugin.session.job import JobAttachmentSettings, PathMappingRule
from agent_plugin.session.path_rules import JobRules, PathRules, checked_rules

_T = TypeVar("_T", bound=msgspec.Struct)

_CONNECT_SECONDS: Final = 5.0
_READ_SECONDS: Final = 30.0
_ATTEMPTS: Final = 5
# What a profile, or the environment, says of another identity than the queue's.
_IDENTITY: Final = (
    *("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_CREDENTIAL_EXPIRATION"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
)


class _Location(msgspec.Struct, frozen=True, rename="camel"):
    name: str
    path: str


class _Profile(msgspec.Struct, frozen=True, rename="camel"):
    storage_profile_id: str
    display_name: str
    os_family: str
    file_system_locations: list[_Location] = []


class _Queue(msgspec.Struct, frozen=True, rename="camel"):
    display_name: str
    job_attachment_settings: JobAttachmentSettings | None = None


class Farm:
    """One farm, as one identity sees it.

    Args:
        farm_id: Its id.
        environment: AWS variables.
        cancellation: Ends the wait for an answer.
    """

    def __init__(
        self, farm_id: str, environment: Mapping[str, str], cancellation: Cancellation
    ) -> None:
        self._farm_id = farm_id
        self._environment = environment
        self._cancellation = cancellation
        self._lanes = Lanes(1)
        self._client: Any = None
        self._profiles: dict[tuple[str, str], _Profile] = {}

    def store_url(self, queue_id: str) -> str:
        """Return the URL of a queue's store.

        Raises:
            SettingsInvalidError: The queue has no job attachments, or there is no such queue.
            StoreAccessError, StoreUnavailableError: The API can not be asked.
        """
        answer = self._call("get_queue", f"queue {queue_id}", queueId=queue_id)
        queue = _conform(answer, _Queue, f"queue {queue_id}")
        settings = queue.job_attachment_settings
        if settings is None:
            raise SettingsInvalidError(
                f"queue {queue.display_name!r} has no job attachments",
                hint="its jobs keep their outputs elsewhere; ask whoever runs the farm",
            )
        return f"s3://{settings.s3_bucket_name}/{settings.root_prefix}"

    @property
    def store_environment(self) -> dict[str, str]:
        """The environment of what uses `queue_keys`: without the user's own identity."""
        region = region_of(self._environment)
        kept = {name: v for name, v in self._environment.items() if name not in _IDENTITY}
        return {**({"AWS_REGION": region} if region else {}), **kept}

    def queue_keys(self, queue_id: str) -> dict[str, object]:
        """Return keys of a queue's role, which hold for an hour or so, as `Keys` has them.

        Raises:
            StoreAccessError: The user may not have them.
            StoreUnavailableError: The API can not be asked.
        """
        what = f"keys for queue {queue_id}"
        answer = self._call("assume_queue_role_for_user", what, queueId=queue_id)
        try:
            keys = answer["credentials"]
            return {
                "AccessKeyId": str(keys["accessKeyId"]),
                "SecretAccessKey": str(keys["secretAccessKey"]),
                "SessionToken": str(keys["sessionToken"]),
                "Expiration": keys["expiration"].isoformat(),
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise StoreProtocolError(f"{what}: the answer has no keys") from error

    def rules_for(
        self, queue_id: str, job_id: str, profile_id: str, theirs: str | None = None
    ) -> JobRules:
        """Return where a job's files belong on a host of a storage profile, or why nowhere.

        Each file system location that both profiles name is a rule; a job of the same profile has
        its files at their own paths.

        Args:
            queue_id: The job's queue.
            job_id: The job.
            profile_id: Of this host.
            theirs: The job's storage profile, if it is known: `profile` of an earlier answer.

        Raises:
            PathMappingError: The profile of this host has a location that is no absolute path.
            JobInvalidError: There is no such job or profile.
            StoreAccessError, StoreUnavailableError: The API can not be asked.
        """
        if theirs is None:
            answer = self._call("get_job", f"job {job_id}", queueId=queue_id, jobId=job_id)
            theirs = str(answer.get("storageProfileId") or "")
        if not theirs:
            reason = "the job has no storage profile, so that nobody can say where its files belong"
            return JobRules(None, reason)
        if theirs == profile_id:
            return JobRules(PathRules(None), profile=theirs)
        return self._rules(self._profile(queue_id, theirs), self._profile(queue_id, profile_id))

    def check_profile(self, queue_id: str, profile_id: str) -> None:
        """See that a storage profile is one of the queue's.

        Raises:
            JobInvalidError: It is not.
            StoreAccessError, StoreUnavailableError: The API can not be asked.
        """
        self._profile(queue_id, profile_id)

    def _rules(self, theirs: _Profile, ours: _Profile) -> JobRules:
        places = {location.name: location.path for location in ours.file_system_locations}
        rules = [
            PathMappingRule(
                "windows" if theirs.os_family.lower() == "windows" else "posix",
                location.path,
                places[location.name],
            )
            for location in theirs.file_system_locations
            if location.name in places
        ]
        if not rules:
            reason = (
                f"its storage profile {theirs.display_name!r} has no file system location in common"
                f" with {ours.display_name!r}"
            )
            return JobRules(None, reason, theirs.storage_profile_id)
        return JobRules(PathRules(checked_rules(rules)), profile=theirs.storage_profile_id)

    def _profile(self, queue_id: str, profile_id: str) -> _Profile:
        known = self._profiles.get((queue_id, profile_id))
        if known is None:
            what = f"storage profile {profile_id}"
            answer = self._call(
                "get_storage_profile_for_queue",
                what,
                queueId=queue_id,
                storageProfileId=profile_id,
            )
            known = self._profiles[queue_id, profile_id] = _conform(answer, _Profile, what)
        return known

    def _call(self, operation: str, what: str, **arguments: str) -> dict[str, Any]:
        return self._lanes.run(lambda: self._answer(operation, what, arguments), self._cancellation)

    def _answer(self, operation: str, what: str, arguments: Mapping[str, str]) -> dict[str, Any]:
        from botocore.exceptions import ClientError  # noqa: PLC0415 - 200 ms, as in s3_environment

        with boto_errors(f"ask the farm for {what}"):
            try:
                if self._client is None:
                    self._client = self._make_client()
                call = getattr(self._client, operation)
                found: dict[str, Any] = call(farmId=self._farm_id, **arguments)
            except ClientError as error:
                code = error.response.get("Error", {}).get("Code", "")
                if code in ("ResourceNotFoundException", "ValidationException"):
                    raise JobInvalidError(
                        f"the farm knows no {what}",
                        hint="check the ids, and that the profile is one of that farm",
                    ) from error
                if code == "AccessDeniedException":
                    raise StoreAccessError(
                        f"the farm refuses {what}",
                        hint="log in again, or ask whoever runs the farm for access to the queue",
                    ) from error
                raise
        return found

    def _make_client(self) -> Any:  # noqa: ANN401 - there are no types of it in boto3-stubs[s3]
        import boto3  # noqa: PLC0415 - 300 ms that most commands do not need
        from botocore.config import Config  # noqa: PLC0415 - as above

        session = boto3.session.Session(
            botocore_session=Credentials(self._environment).session(),
            region_name=region_of(self._environment),
        )
        return session.client(
            "deadline",
            config=Config(
                connect_timeout=_CONNECT_SECONDS,
                read_timeout=_READ_SECONDS,
                retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
            ),
        )


def _conform(answer: dict[str, Any], kind: type[_T], what: str) -> _T:
    known = {field.encode_name for field in msgspec.structs.fields(kind)}
    wanted = {key: value for key, value in answer.items() if key in known}
    return schema.conform(wanted, kind, source=what, failure=JobInvalidError)
