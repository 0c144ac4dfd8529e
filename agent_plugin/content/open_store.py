"""From a URL to the store that it names."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes, urlsplit

from agent_plugin.content.bandwidth import Bandwidth
from agent_plugin.content.directory_store import DirectoryStore
from agent_plugin.content.errors import SettingsInvalidError
from agent_plugin.content.retry import RetryPolicy

if TYPE_CHECKING:
    from agent_plugin.content.s3_environment import Keys
    from agent_plugin.content.s3_store import S3Store

_HINT = "A store is s3://bucket/prefix or file:///directory."


def build_store(
    url: str,
    *,
    environment: Mapping[str, str] = os.environ,
    policy: RetryPolicy | None = None,
    account_id: str | None = None,
    concurrency: int = 16,
    bandwidth: Bandwidth | None = None,
    keys: "Keys | None" = None,
) -> "S3Store | DirectoryStore":
    """Return the store at a URL; a directory that is missing is made by the first write.

    Args:
        url: `s3://bucket/prefix`, where everything after the bucket's slash is the prefix as it is,
            a trailing slash included; or `file:///directory`, percent-encoded.
        environment: Where AWS variables are looked up.
        policy: When requests to S3 are sent again.
        account_id: The bucket's expected owner, 12 digits, such as an earlier process's
            `S3Store.account_id`; empty if it is known to be unknown; None to find out, which may
            ask STS and take up to 4 s.
        concurrency: Threads that are expected to use the store at once, >= 1.
        bandwidth: How much may move; as much as there is by default.
        keys: What `s3_environment.keys_of` has found for this environment, to begin with; or what
            finds keys, whenever they are needed anew.

    Raises:
        SettingsInvalidError: The URL, or one of the AWS variables and files, makes no sense.
        StoreAccessError: There are no credentials, or the directory may not be used.
    """
    # urlsplit would drop line breaks and an empty query without a word.
    if not url.isprintable() or "?" in url or "#" in url:
        raise SettingsInvalidError(
            f"{url[:200]!r} has a query, a fragment or an unprintable character", hint=_HINT
        )
    parts = urlsplit(url)
    if parts.scheme == "file":
        return DirectoryStore(_directory_of(url), bandwidth=bandwidth)
    if parts.scheme != "s3" or not parts.netloc:
        raise SettingsInvalidError(f"{url[:200]!r} is not a store", hint=_HINT)
    # Imported here because a store in a directory needs no network library.
    from agent_plugin.content.s3_access import Access  # noqa: PLC0415 - see above
    from agent_plugin.content.s3_store import S3Store  # noqa: PLC0415 - see above

    policy = policy or RetryPolicy()
    access = Access(
        parts.netloc,
        parts.path.removeprefix("/"),
        environment=environment,
        policy=policy,
        account_id=account_id,
        keys=keys,
    )
    return S3Store(access, policy=policy, concurrency=concurrency, bandwidth=bandwidth)


def refuse_missing_store(url: str) -> None:
    """Refuse a store that is not there, as far as that is known without asking a network.

    Raises:
        SettingsInvalidError: The URL makes no sense.
        StoreAccessError, UnsafePathError: The directory is missing, or may not be used.
    """
    if urlsplit(url).scheme != "s3":
        store = build_store(url)
        assert isinstance(store, DirectoryStore)  # noqa: S101 - the other kind is S3's
        store.see_that_it_is_there()


def _directory_of(url: str) -> Path:
    parts = urlsplit(url)
    path = os.fsdecode(unquote_to_bytes(parts.path))
    if parts.netloc not in ("", "localhost") or not path.startswith("/") or "\0" in path:
        raise SettingsInvalidError(f"{url[:200]!r} is not an absolute directory", hint=_HINT)
    return Path(path)
