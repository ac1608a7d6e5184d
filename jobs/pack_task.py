"""Several queries as one task: they come aboard a pack one by one, train together, and leave when they are done.

As many are aboard as fill a step. Each is read when there is room for it and written when it is over, so memory is
that of a few queries however many there are, and what is done when the process is killed stays done. A query that
fails leaves the others as they are. If a step fails as a whole, its queries are mapped one by one, to see whose fault
it was; one that did not find memory among others is tried again alone.

Raised out of here is what is no query's fault: that results cannot be written.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from scarcade.dataloaders.counts import Csr
from scarcade.dataloaders.query_counts import keep_for_mapping
from scarcade.dataloaders.scratch import Scratch
from scarcade.engine.memory import ran_out
from scarcade.engine.pack import Member, Pack
from scarcade.jobs.fetched import fetched
from scarcade.jobs.one_query import Prepared, finished, member_of, prepared, train_alone
from scarcade.jobs.queries import Task
from scarcade.jobs.query_task import Job, Told, committed, failed, read_task
from scarcade.jobs.results import Record
from scarcade.models.packed import Packed, put_rows

ABOARD = 1024  # cells of a step: enough that its price is shared, few enough that it stays in the cache
MOST = 64  # queries aboard
Stopped = Callable[[], bool]


def map_tasks(
    job: Job,
    tasks: Sequence[Task] | deque[Task],
    keys: Mapping[str, str],
    say: Told,
    *,
    stopped: Stopped = lambda: False,
) -> Iterator[tuple[str, Record]]:
    """Map `tasks` and commit their results: (name, record) of each query as it is done, also if it failed.

    Args:
        tasks: a deque may be shared with others, who take from it too.
        keys: name of a query -> its key (`query_task.key_of`).
        say: is told of each epoch of a query.
        stopped: asked between steps; once it says True, what is aboard is left as it never was.

    Raises:
        StorageError: nothing can be written to the folder of the results any more.
    """
    waiting = tasks if isinstance(tasks, deque) else deque(tasks)
    voyage = _Voyage(job, keys, say, stopped)
    try:
        for record in voyage.sail(waiting):
            yield record["name"], record
    finally:
        voyage.abandon()
    for task in voyage.alone:
        # in a pack of its own it has no company that could be at fault
        lonely = _Voyage(job, keys, say, stopped, company=False)
        try:
            for record in lonely.sail(deque([task])):
                yield record["name"], record
        finally:
            lonely.abandon()


class _Passage:
    """A query that is aboard, or on its way."""

    def __init__(self, task: Task, here: Task, one: Prepared, member: Member | None, scratch: ExitStack) -> None:
        self.task, self.here, self.one, self.scratch = task, here, one, scratch  # here: as it lies on this machine
        self.member = member  # None: it cannot train among others
        self.seconds = self.seconds_training = 0.0  # its share of a step's time by its cells
        counts = one.query.counts
        self.streamed = not isinstance(counts, Csr)
        held = sum(part.nbytes for part in counts) if isinstance(counts, Csr) else 0
        known = () if member is None else member.known.values()
        self.n_bytes = held + sum(value.nbytes for value in known)


class _Voyage:
    """What is aboard, and what became of it; `alone` are the tasks that are to be tried again without company."""

    def __init__(self, job: Job, keys: Mapping[str, str], say: Told, stopped: Stopped, *, company: bool = True) -> None:
        self._job, self._keys, self._say, self._stopped, self._company = job, keys, say, stopped, company
        self._pack: Pack | None = None
        self.aboard: dict[Member, _Passage] = {}
        self.alone: list[Task] = []

    def sail(self, waiting: deque[Task]) -> Iterator[Record]:
        """The records of the queries, as they are over."""
        while not self._stopped():
            while self._has_room and (task := _next(waiting)) is not None:
                record = self._begin(task)
                if record is not None:
                    yield record
                if self._stopped():
                    return
            if not self.aboard:
                return
            over = self._step()
            for passage in over:
                if (record := self._landed(passage)) is not None:
                    yield record
                    del record

    @property
    def _has_room(self) -> bool:
        """Whether another query of whole batches fits into a step, and into the memory that there is for counts."""
        if self._pack is None or not self.aboard:
            return True
        data = self._job.config.data
        fits = self._pack.n_cells + data.batch_size <= ABOARD
        return fits and len(self.aboard) < MOST and sum(p.n_bytes for p in self.aboard.values()) < data.memory

    def _begin(self, task: Task) -> Record | None:
        """Read a query and take it aboard; its record, if it is over already."""
        began = time.monotonic()
        try:
            with ExitStack() as scratch:
                passage = self._read(task, scratch)
                passage.seconds = time.monotonic() - began
                if passage.member is None:
                    return self._by_itself(passage, began)
                if self._needs_a_pack_of_its_own(passage):
                    return self._in_its_own_pack(passage)
                if self._pack is None:
                    self._pack = self._new_pack(passage)
                self._pack.board(passage.member)
                self.aboard[passage.member] = passage
                passage.scratch = scratch.pop_all()
        except Exception as error:  # noqa: BLE001  (one query's failure is told and never stops the others)
            return self._fail(task, error, time.monotonic() - began)
        return None

    def _read(self, task: Task, scratch: ExitStack) -> _Passage:
        """The query of a task, and its reference grown; what it needs on the disk goes with `scratch`."""
        config, out = self._job.config, self._job.results.out
        here = scratch.enter_context(fetched(task, out))
        large = Scratch(out, task.name)
        scratch.callback(large.remove)
        keep = keep_for_mapping(large, limit=config.data.stream_above, seed=config.seed)
        query = read_task(self._job, here, keep)
        one = prepared(self._job.reference, query, config.surgery, seed=config.seed)
        told = self._told(task)
        parts = config.optim.accumulate
        member = member_of(one, data=config.data, surgery=config.surgery, seed=config.seed, parts=parts, progress=told)
        return _Passage(task, here, one, member, scratch)

    def _told(self, task: Task) -> Any:
        return lambda line: self._say(task.name, line)

    def _new_pack(self, passage: _Passage) -> Pack:
        return Pack(Packed(self._job.reference.model, passage.one.grown), self._job.config.optim)

    def _needs_a_pack_of_its_own(self, passage: _Passage) -> bool:
        """Its windows and constants are not small; or it has no constants where others have."""
        assert passage.member is not None
        differs = any(member.known.keys() != passage.member.known.keys() for member in self.aboard)
        return passage.streamed or differs

    def _in_its_own_pack(self, passage: _Passage) -> Record | None:
        """Train a query while the others wait."""
        assert passage.member is not None
        pack, began = self._new_pack(passage), time.monotonic()
        pack.board(passage.member)
        try:
            while pack.members:
                if self._stopped():
                    return None
                pack.step()
        finally:
            passage.member.close()
        passage.seconds_training = time.monotonic() - began
        passage.seconds += passage.seconds_training
        return self._landed(passage)

    def _by_itself(self, passage: _Passage, began: float) -> Record | None:
        """A query that trains on a model of its own, or not at all."""
        config, one = self._job.config, passage.one
        history, steps = [], 0
        if one.trains:
            result = train_alone(
                one,
                optim=config.optim,
                data=config.data,
                surgery=config.surgery,
                seed=config.seed,
                progress=self._told(passage.task),
                stop=self._stopped,
            )
            if result.stopped == "interrupted":
                return None
            history, steps = result.history, result.steps
        passage.seconds_training = time.monotonic() - began
        mapped = finished(self._job.reference, one, data=config.data, history=history, steps=steps)
        return self._committed(passage, mapped, lambda: time.monotonic() - began)

    def _step(self) -> list[_Passage]:
        """Train everyone aboard by one batch; those that are over. Who was aboard a step that failed is in `alone`."""
        assert self._pack is not None
        began, cells = time.monotonic(), self._pack.n_cells
        sizes = {member: self._pack.cells_of(member) for member in self.aboard}
        try:
            over = self._pack.step()
        except Exception as error:  # noqa: BLE001  (whose fault it is shows when each is alone)
            stranded = list(self.aboard.values())
            if self._company:
                self.alone += [passage.task for passage in stranded]
                self.abandon()
                return []
            for passage in stranded:
                assert passage.member is not None
                passage.member.error = error
            return [self.aboard.pop(member) for member in list(self.aboard)]
        passed = time.monotonic() - began
        for member, passage in self.aboard.items():
            share = passed * sizes[member] / cells
            passage.seconds += share
            passage.seconds_training += share
        return [self.aboard.pop(member) for member in over]

    def _landed(self, passage: _Passage) -> Record | None:
        """Embed and write a query that is over; None if it is to be tried again."""
        began, member, one = time.monotonic(), passage.member, passage.one
        assert member is not None
        passage.member = None  # what it trained on is not wanted any more
        try:
            with passage.scratch:
                if member.error is not None:
                    raise member.error
                put_rows(one.grown, member.rows)
                state, data = member.state, self._job.config.data
                del member
                mapped = finished(self._job.reference, one, data=data, history=state.history, steps=state.step)
                return self._committed(passage, mapped, lambda: passage.seconds + time.monotonic() - began)
        except Exception as error:  # noqa: BLE001  (one query's failure is told and never stops the others)
            return self._fail(passage.task, error, passage.seconds + time.monotonic() - began)

    def _committed(self, passage: _Passage, mapped: Any, seconds: Callable[[], float]) -> Record:
        key, query = self._keys[passage.task.name], passage.one.query
        training = passage.seconds_training
        return committed(self._job, passage.here, key, query, mapped, seconds_training=training, seconds=seconds)

    def _fail(self, task: Task, error: Exception, seconds: float) -> Record | None:
        """The record of a query that could not be mapped, which is written; None if it is to be tried again alone."""
        if self._company and ran_out(error):
            self.alone.append(task)
            return None
        record = failed(task, self._job.reference.schema, error, seconds)
        self._job.results.write_record(record)
        return record

    def abandon(self) -> None:
        """Put everyone off as if they had never come aboard."""
        for member, passage in self.aboard.items():
            member.close()
            passage.scratch.close()
        self.aboard, self._pack = {}, None


def _next(waiting: deque[Task]) -> Task | None:
    try:
        return waiting.popleft()
    except IndexError:  # another may have taken the last one
        return None
