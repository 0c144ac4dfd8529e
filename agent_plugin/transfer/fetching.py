"""The blobs of a download as threads obtain them: from the store, or when they come into the cache.

A small blob travels in memory, within a budget of bytes; a large one is written into a staged file
under the root, and copied from there into the cache. While a blob is fetched its claim is held, so
that another process waits for it instead of fetching it too; whoever takes the blob gives the claim
back when it is published.

Orders are given, withdrawn and taken by one thread; what they bring is obtained by others.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from agent_plugin.content.blob_cache import Claim
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import local_write_error
from agent_plugin.content.store import WHOLE_BLOB_BYTES, Cancellation, Progress
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.download_cache import DownloadCache
from agent_plugin.transfer.engine import ByteBudget, Crew, Halts, Products
from agent_plugin.transfer.placement import Placer, StagedFile
from agent_plugin.transfer.plan import DownloadPlan
from agent_plugin.transfer.states import TaskStatus

# Large blobs are fetched in parallel parts each, so a few at once fill any link.
LARGE_AT_ONCE: Final = 3
# Users are promised an end within a second; a fetch in parts looks every 0.1 s whether to stop.
LARGE_STOP_SECONDS: Final = 0.4


@dataclass(slots=True)
class Obtained:
    """A blob that a crew thread obtained: in memory, in a staged file, or in the cache.

    Attributes:
        data: Its bytes, which count in the budget until it is given back.
        staged: The file that holds it.
        claim: The right to fetch it, which others wait for.
        fetched: Whether it came from the store.
    """

    data: bytes | None = None
    staged: StagedFile | None = None
    claim: Claim | None = None
    fetched: bool = True

    def close(self) -> None:
        """Give the file and the claim back."""
        if self.staged is not None:
            self.staged.close()
        if self.claim is not None:
            self.claim.release()


class Fetching:
    """What is obtained for one download; a context manager, whose end stops all threads.

    Args:
        plan: Where blobs come from, and where files go.
        context: The stores, and the ledger that is told what is tried.
        cache: Where others may be fetching the same, and large blobs are copied to.
        placer: Makes staged files.
        task_of: Returns the task on whose account a blob is fetched; from any thread.
        told: Returns what counts a large blob's bytes as they come, for that task.
        halt: Ends and pauses all threads.
    """

    def __init__(
        self,
        plan: DownloadPlan,
        context: TransferContext,
        cache: DownloadCache,
        placer: Placer,
        *,
        task_of: Callable[[Digest], int],
        told: Callable[[Digest, int], Progress],
        halt: Cancellation,
    ) -> None:
        self._plan = plan
        self._context = context
        self._cache = cache
        self._placer = placer
        self._task_of = task_of
        self._told = told
        self._open_origin = context.open_store if plan.origin is None else plan.origin.open
        self._budget = ByteBudget()
        self._halts: Halts[Digest] = Halts(halt)
        self._obtained: Products[Digest, Obtained] = Products(drop=Obtained.close)
        self._small = Crew(self._obtain, self._obtained, context.concurrency, halt)
        self._large = Crew(self._obtain, self._obtained, LARGE_AT_ONCE, halt)
        self._ordered: set[Digest] = set()
        # Small ones that the crew is still asked for, and that nobody waits for.
        self._left: set[Digest] = set()

    @property
    def is_awaited(self) -> bool:
        """Whether something that was ordered is still to come."""
        return bool(self._ordered)

    def order(self, digest: Digest, priority: int) -> None:
        """Have a blob obtained; higher priorities come first."""
        self._ordered.add(digest)
        self._crew(digest).order(digest, priority)

    def withdraw(self, digest: Digest, *, wanted: bool) -> bool:
        """Take an order back, if there is one, so that it can be given anew.

        Returns:
            False when the blob is being asked for: it comes if it is wanted, else it is done
            without.
        """
        if digest in self._left:
            if wanted:
                self._left.discard(digest)
                self._ordered.add(digest)
            return False
        if digest in self._ordered:
            if not self._crew(digest).withdraw(digest):
                if not wanted:
                    self._let_go(digest)
                return False
            self._ordered.discard(digest)
        return True

    def take(self, seconds: float) -> tuple[Digest, Obtained | BaseException] | None:
        """Return what has come, or why it has not; None if nothing does in so many seconds."""
        taken = self._obtained.take(seconds)
        if taken is not None:
            self._ordered.discard(taken[0])
            self._left.discard(taken[0])
            self._halts.over(taken[0])
        return taken

    def give_back(self, digest: Digest, obtained: Obtained) -> None:
        """Let go of what was taken."""
        if obtained.data is not None:
            self._budget.release(digest.size)
        obtained.close()

    def end(self) -> None:
        """Stop all threads, once the crews' halt is wished; what they bring now is dropped."""
        self._halts.end_all()
        self._cache.leave()
        self._small.close()
        self._large.close()
        # They remove what they had begun to write; a small blob's thread has nothing of the kind.
        self._large.join(LARGE_STOP_SECONDS)

    def drop(self) -> None:
        """Give back the claims and files of what the crews had ready, and nobody took."""
        self._obtained.close()

    def _let_go(self, digest: Digest) -> None:
        """Do without a blob that is being asked for."""
        self._halts.end(digest)
        if digest.size <= WHOLE_BLOB_BYTES:
            # A request that was sent can not be ended.
            self._ordered.discard(digest)
            self._left.add(digest)

    def _crew(self, digest: Digest) -> Crew[Digest, Obtained]:
        return self._small if digest.size <= WHOLE_BLOB_BYTES else self._large

    # ------------------------------------------------------------------ on the crew's threads

    def _obtain(self, digest: Digest) -> Obtained:
        task = self._task_of(digest)
        with self._context.attempt(task), self._halts.heeding(digest) as halt:
            return self._obtain_for(digest, task, halt)

    def _obtain_for(self, digest: Digest, task: int, halt: Cancellation) -> Obtained:
        # It may have been taken from the queue just before the end.
        halt.check()
        claim = self._cache.claim(digest, halt)
        try:
            if claim is None and self._cache.has(digest):
                return Obtained(fetched=False)
            self._context.ledger.note(task, TaskStatus.EXECUTING)
            if digest.size <= WHOLE_BLOB_BYTES:
                self._budget.acquire(digest.size, halt)
                try:
                    data = self._open_origin().get(digest)
                except BaseException:
                    self._budget.release(digest.size)
                    raise
                return Obtained(data=data, claim=claim)
            return self._obtain_large(digest, claim, task, halt)
        except BaseException:
            if claim is not None:
                claim.release()
            raise

    def _obtain_large(
        self, digest: Digest, claim: Claim | None, task: int, halt: Cancellation
    ) -> Obtained:
        staged: StagedFile | None = None
        try:
            staged = self._placer.stage()
            self._fetch(digest, staged, task, halt)
        except BaseException as error:
            if staged is not None:
                staged.close()
            if isinstance(error, OSError):
                raise local_write_error(error, os.fspath(self._plan.root)) from error
            raise
        return Obtained(staged=staged, claim=claim)

    def _fetch(self, digest: Digest, staged: StagedFile, task: int, halt: Cancellation) -> None:
        told = self._told(digest, task)
        with self._cache.copying(digest, staged, self._placer) as copy:
            if copy is None:
                self._open_origin().fetch(digest, staged.fd, cancellation=halt, progress=told)
            else:
                self._context.open_store().fetch(
                    digest, staged.fd, cancellation=halt, progress=told, hashed=copy.take
                )
                self._cache.publish(copy, digest)
