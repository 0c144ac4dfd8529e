"""What bringing inputs in came to: printed by `session start` and `session sync-step`."""

from typing import Final

import msgspec

from agent_plugin.content.manifest import Manifest
from agent_plugin.session.input_sources import SourceResult
from agent_plugin.session.job import PathMappingRule
from agent_plugin.session.state import RootState
from agent_plugin.transfer.download import TransferResult

# Of a mounted root: its bytes come when they are read.
NOTHING_MOVED: Final = TransferResult(files=0, bytes=0, bytes_fetched=0, bytes_reused=0, seconds=0)


class RootResult(msgspec.Struct, rename="camel"):
    """What start did for one local root; sizes in bytes.

    Attributes:
        reason: Why the file system is not the one that was wished, or why AUTO chose it.
    """

    root_path: str
    local_root: str
    file_system: str
    files: int
    bytes: int
    bytes_fetched: int
    bytes_reused: int
    reason: str = ""


class StartResult(msgspec.Struct, rename="camel"):
    """What start did; printed by `session start --json`."""

    roots: list[RootResult]
    path_mapping_rules: list[PathMappingRule]
    seconds: float
    sources: list[SourceResult] = []


def root_result(
    root: RootState, manifest: Manifest | None, done: TransferResult, reason: str = ""
) -> RootResult:
    """Return what is in place: the manifest, placed or kept, but for what people took out."""
    return RootResult(
        root_path=root.root_path,
        local_root=root.local_root,
        file_system=root.file_system,
        files=len(manifest) - len(done.excluded) if manifest is not None else 0,
        bytes=(
            manifest.total_bytes - sum(entry.size for entry in done.excluded)
            if manifest is not None
            else 0
        ),
        bytes_fetched=done.bytes_fetched,
        bytes_reused=done.bytes_reused,
        reason=reason,
    )
