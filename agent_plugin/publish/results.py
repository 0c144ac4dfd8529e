"""What a job's executions left behind: which there are, and which files each of them has.

An execution is one run of a task, or of a chunk of tasks; the session action's id is its name. It
is found by the manifests of its outputs, which there are with and without a publisher. Of a task
the last run counts, as for everybody who reads outputs (session/manifests.py).
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

from agent_plugin.content.digest import hash_name
from agent_plugin.content.errors import JobInvalidError, ResultClashError
from agent_plugin.content.manifest import FileEntry
from agent_plugin.content.safe_path import split
from agent_plugin.content.store import DocumentInfo
from agent_plugin.publish.result_documents import RESULTS, ResultsDocument, find_results
from agent_plugin.session.manifests import OutputManifest, find_outputs, merge_by_root
from agent_plugin.session.roots import session_directory_name
from agent_plugin.transfer.asking import Asking

# A shorter beginning would list a good part of a queue's manifests.
LEAST_DIGITS: Final = 4

_JOB: Final = re.compile(r"job-[0-9a-f]{32}")
_JOB_BEGINNING: Final = re.compile(rf"job-[0-9a-f]{{{LEAST_DIGITS},31}}")
_SHOWN_JOBS: Final = 5
# An execution's name becomes a directory's.
_SAFE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


@dataclass(frozen=True, slots=True)
class JobExecution:
    """One run of a task, or of a chunk of tasks, and what it left.

    Attributes:
        id: The session action's id; one component of a path, whatever the store's keys are.
        step: The step's id.
        task: The task's id, empty for a chunk.
        started: When it began, as its keys have it.
        manifests: Of its outputs, ascending by the store's time.
    """

    id: str
    step: str
    task: str
    started: str
    manifests: tuple[OutputManifest, ...]


def find_job(asking: Asking, farm: str, queue: str, text: str) -> str:
    """Return the id of the job that is meant.

    Args:
        asking: Of the job's store.
        farm: The farm's id.
        queue: The queue's id.
        text: The job's id, which is taken as it is, or the beginning of one with outputs.

    Raises:
        JobInvalidError: It is neither, or several jobs begin so.
        StoreAccessError, StoreUnavailableError: The store can not be asked.
    """
    if _JOB.fullmatch(text):
        return text
    if not _JOB_BEGINNING.fullmatch(text):
        raise JobInvalidError(
            f"{text!r} is not a job id, nor the beginning of one",
            hint=f"a job id is `job-` and 32 hexadecimal digits in lower case; {LEAST_DIGITS} of"
            " them are enough where no other job begins so",
        )
    prefix = f"{farm}/{queue}/"
    jobs = sorted(
        {
            info.key.removeprefix(above).partition("/")[0]
            # Manifests may have been removed by a rule for old ones, and results not.
            for above in (prefix, f"{prefix}{RESULTS}/")
            for info in _listed(asking, above + text)
        }
    )
    jobs = [job for job in jobs if _JOB.fullmatch(job)]
    if not jobs:
        raise JobInvalidError(
            f"no job with outputs begins with {text}",
            hint="see that store, farm and queue are the job's, and that a task has finished",
        )
    if len(jobs) > 1:
        shown = ", ".join(jobs[:_SHOWN_JOBS])
        more = f" and {len(jobs) - _SHOWN_JOBS} more" if len(jobs) > _SHOWN_JOBS else ""
        raise JobInvalidError(
            f"{len(jobs)} jobs begin with {text}: {shown}{more}", hint="give more digits"
        )
    return jobs[0]


def find_executions(
    asking: Asking,
    job: tuple[str, str, str],
    *,
    step_id: str | None = None,
    task_id: str | None = None,
) -> list[JobExecution]:
    """Return a job's executions that have outputs, ascending by when they began.

    Args:
        asking: Of the job's store.
        job: Its farm id, queue id and job id.
        step_id: Only of this step.
        task_id: Only of this task; needs the step.

    Raises:
        ManifestInvalidError: A manifest breaks a rule.
        StoreAccessError, StoreUnavailableError: They can not be had.
    """
    runs: dict[str, list[OutputManifest]] = {}
    for output in find_outputs(asking, job, step_id=step_id, task_id=task_id):
        runs.setdefault(output.key.rpartition("/")[0], []).append(output)
    named: dict[str, JobExecution] = {}
    for folder, manifests in runs.items():
        execution = _execution(folder, manifests)
        if execution.id in named:
            # No two have one id, but keys can say anything.
            execution = replace(execution, id=_made_up(folder))
        named[execution.id] = execution
    return sorted(named.values(), key=lambda each: (each.started, each.id))


def check_only(
    job_id: str, there: Collection[str], only: Collection[str], *, published: bool
) -> None:
    """Do nothing if all executions that were asked for are there.

    Args:
        job_id: The job.
        there: Those that there are.
        only: Those that were asked for.
        published: Whether those that published something are there as well.

    Raises:
        JobInvalidError: One is not.
    """
    if missing := set(only) - set(there):
        last = "of a task only its last run counts; what earlier ones published --published brings"
        raise JobInvalidError(
            f"{job_id} has no execution {min(missing)[:200]} with results",
            hint="`propmaster results JOB` lists them" + ("" if published else f"; {last}"),
        )


def find_either(
    asking: Asking,
    job: tuple[str, str, str],
    *,
    published: bool,
    step_id: str | None = None,
    task_id: str | None = None,
) -> tuple[list[JobExecution], dict[str, ResultsDocument]]:
    """Return a job's executions in the store, or what publishers made of them; one is empty.

    What publishers made is taken if that is wished, or if the store has no outputs of the job.

    Args:
        asking: Of the job's store.
        job: Its farm id, queue id and job id.
        published: What publishers made is wished.
        step_id: Only of this step.
        task_id: Only of this task; needs the step.

    Raises:
        ManifestInvalidError, StoreAccessError, StoreUnavailableError: As for `find_executions`.
    """
    if not published:
        executions = find_executions(asking, job, step_id=step_id, task_id=task_id)
        if executions:
            return executions, {}
    return [], find_documents(asking, job, step_id=step_id, task_id=task_id)


def find_documents(
    asking: Asking,
    job: tuple[str, str, str],
    *,
    step_id: str | None = None,
    task_id: str | None = None,
) -> dict[str, ResultsDocument]:
    """Return what was published of a job by execution, in the order of publishing.

    Args:
        asking: Of the job's store.
        job: Its farm id, queue id and job id.
        step_id: Only of this step.
        task_id: Only of this task; needs the step.

    Raises:
        StoreAccessError, StoreUnavailableError: It can not be had.
    """
    found = find_results(asking, job, step_id=step_id, task_id=task_id)
    # The documents say so themselves, and the name becomes a directory's.
    return {
        document.execution_id
        if _SAFE_NAME.fullmatch(document.execution_id)
        else _made_up(document.key): document
        for document in found
    }


def _listed(asking: Asking, prefix: str) -> list[DocumentInfo]:
    return asking.ask(lambda store: list(store.list_documents(prefix)))


def _execution(folder: str, manifests: Sequence[OutputManifest]) -> JobExecution:
    """Return the execution whose manifests are in one folder, below the job's."""
    parts = folder.split("/")
    started, _, action = parts[-1].partition("_")
    return JobExecution(
        id=action if _SAFE_NAME.fullmatch(action) else _made_up(folder),
        step=next((part for part in parts if part.startswith("step-")), ""),
        task=next((part for part in parts[:-1] if part.startswith("task-")), ""),
        started=started,
        manifests=tuple(manifests),
    )


def _made_up(folder: str) -> str:
    return f"execution-{hash_name(folder)}"


def files_of(
    execution: JobExecution, path: str = "", *, by_root: bool = False
) -> dict[str, FileEntry]:
    """Return the files that an execution left, by their path in its results.

    Args:
        execution: The execution.
        path: Only this file, or those in this directory; empty for all.
        by_root: Whether each root's files are in a directory of its own, `assetroot-…`.

    Raises:
        UnsafePathError: The path leaves the results.
        ResultClashError: Two roots of the execution have a file of one path, and differ in it.
    """
    wanted = "/".join(split(path))
    found: dict[str, FileEntry] = {}
    roots: dict[str, str] = {}
    for (location, root), manifest in merge_by_root(execution.manifests).items():
        shown = f"{location or ''}{root}"
        above = f"{session_directory_name(shown)}/" if by_root else ""
        for entry in manifest.entries:
            at = above + entry.path
            if wanted and at != wanted and not at.startswith(f"{wanted}/"):
                continue
            if at in found and found[at].digest != entry.digest:
                raise ResultClashError(
                    f"{at} is an output of {roots[at]} and of {shown} in {execution.id}",
                    hint="give each root a directory of its own: --by-root",
                )
            found[at] = entry
            roots[at] = shown
    return found
