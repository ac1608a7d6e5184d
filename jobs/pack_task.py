"""Several queries as one task: they come aboard a pack one by one, train together, and leave when they are done.

As many are aboard as fill a step. Each is read when there is room for it and written when it is over, so memory is
that of a few queries however many there are, and what is done when the process is killed stays done. A query that
fails leaves the others as they are. If a step fails as a whole, its queries are mapped one by one, to see whose fault
it was.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from scarcade.dataloaders.counts import Csr
from scarcade.dataloaders.query_counts import keep_for_mapping
from scarcade.dataloaders.schema import Query
from scarcade.dataloaders.scratch import Scratch
from scarcade.engine.pack import Member, Pack
from scarcade.jobs.fetched import fetched
from scarcade.jobs.one_query import Prepared, finished, member_of, prepared, train_alone
from scarcade.jobs.queries import Task
from scarcade.jobs.query_task import Job, Told, committed, failed, read_task
from scarcade.jobs.results import Record
from scarcade.models.packed import Packed, put_rows

ABOARD = 1024  # cells of a step: enough that its price is shared, few enough that it stays in the cache
MOST = 64  # queries aboard


def map_tasks(
    job: Job,
    tasks: Sequence[Task] | deque[Task],
    keys: Mapping[str, str],
    say: Told,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[str, Record]]:
    """Map `tasks` and commit their results: (name, record) of each query as it is done, also if it failed.

    Args:
        tasks: a deque may be shared with others, who take from it too.
        keys: name of a query -> its key (`query_task.key_of`).
        say: is told of each epoch of a query.
        stopped: asked between steps; once it says True, what is aboard is left as it never was.
    """
    waiting = tasks if isinstance(tasks, deque) else deque(tasks)
    voyage = _Voyage(job, keys, say)
    try:
        while not stopped():
            while voyage.has_room and (task := _next(waiting)) is not None:
                record = voyage.begin(task)
                if record is not None:
                    yield record["name"], record
                if stopped():
                    return
            if not voyage.aboard:
                return
            try:
                over = voyage.step()
            except Exception as error:  # noqa: BLE001  (whose fault it is shows when each is alone)
                stranded = voyage.abandon()
                if len(stranded) == 1:
                    record = voyage.fail(stranded[0], error, 0.0)
                    yield record["name"], record
                    continue
                for task in stranded:
                    yield from map_tasks(job, [task], keys, say)
                continue
            for record in over:
                yield record["name"], record
    finally:
        voyage.abandon()


def _next(waiting: deque[Task]) -> Task | None:
    try:
        return waiting.popleft()
    except IndexError:  # another may have taken the last one
        return None


class _Passage:
    """A query that is aboard."""

    def __init__(
        self, task: Task, here: Task, one: Prepared, member: Member, seconds: float, scratch: ExitStack
    ) -> None:
        self.task, self.here, self.one, self.member = task, here, one, member  # here: as it lies on this machine
        self.scratch = scratch
        counts = one.query.counts
        self.n_bytes = sum(part.nbytes for part in counts) if isinstance(counts, Csr) else 0
        self.seconds, self.seconds_training = seconds, 0.0  # its share of a step's time by its cells


class _Voyage:
    """What is aboard, and what became of it."""

    def __init__(self, job: Job, keys: Mapping[str, str], say: Told) -> None:
        self._job, self._keys, self._say = job, keys, say
        self._pack: Pack | None = None
        self.aboard: dict[Member, _Passage] = {}

    @property
    def has_room(self) -> bool:
        """Whether another query of whole batches fits into a step, and into the memory that there is for counts."""
        if self._pack is None or not self.aboard:
            return True
        data = self._job.config.data
        fits = self._pack.n_cells + data.batch_size <= ABOARD
        return fits and len(self.aboard) < MOST and sum(p.n_bytes for p in self.aboard.values()) < data.memory

    def begin(self, task: Task) -> Record | None:
        """Read a query and take it aboard; its record, if it is over already."""
        config, began = self._job.config, time.monotonic()
        scratch = ExitStack()
        try:
            here = scratch.enter_context(fetched(task, self._job.results.out))
            large = Scratch(self._job.results.out, task.name)
            scratch.callback(large.remove)
            keep = keep_for_mapping(large, limit=config.data.stream_above, seed=config.seed)
            query = read_task(self._job, here, keep)
            one = prepared(self._job.reference, query, config.surgery, seed=config.seed)
            told = self._told(task)
            member = member_of(one, data=config.data, surgery=config.surgery, seed=config.seed, progress=told)
            if member is None:
                with scratch:
                    return self._alone(here, query, one, began)
            if self._pack is None:
                self._pack = Pack(Packed(self._job.reference.model, one.grown), config.optim)
            self._pack.board(member)
            self.aboard[member] = _Passage(task, here, one, member, time.monotonic() - began, scratch)
        except Exception as error:  # noqa: BLE001  (one query's failure is told and never stops the others)
            scratch.close()
            return self.fail(task, error, time.monotonic() - began)
        return None

    def _told(self, task: Task) -> Any:
        return lambda line: self._say(task.name, line)

    def _alone(self, task: Task, query: Query, one: Prepared, began: float) -> Record:
        """A query that trains on a model of its own, or not at all."""
        config = self._job.config
        history, steps = [], 0
        if one.trains:
            result = train_alone(
                one,
                optim=config.optim,
                data=config.data,
                surgery=config.surgery,
                seed=config.seed,
                progress=self._told(task),
            )
            history, steps = result.history, result.steps
        trained = time.monotonic() - began
        mapped = finished(self._job.reference, one, data=config.data, history=history, steps=steps)
        return committed(
            self._job,
            task,
            self._keys[task.name],
            query,
            mapped,
            seconds_training=trained,
            seconds=lambda: time.monotonic() - began,
        )

    def step(self) -> list[Record]:
        """Train everyone aboard by one batch; the records of those that are over."""
        assert self._pack is not None
        began, cells = time.monotonic(), self._pack.n_cells
        sizes = {member: self._pack.cells_of(member) for member in self.aboard}
        over = self._pack.step()
        passed = time.monotonic() - began
        for member, passage in self.aboard.items():
            share = passed * sizes[member] / cells
            passage.seconds += share
            passage.seconds_training += share
        return [self._land(self.aboard.pop(member)) for member in over]

    def _land(self, passage: _Passage) -> Record:
        """Embed and write a query that is over."""
        began, task, member, one = time.monotonic(), passage.task, passage.member, passage.one
        try:
            if member.error is not None:
                raise member.error
            put_rows(one.grown, member.rows)
            state = member.state
            data = self._job.config.data
            mapped = finished(self._job.reference, one, data=data, history=state.history, steps=state.step)
            return committed(
                self._job,
                passage.here,
                self._keys[task.name],
                one.query,
                mapped,
                seconds_training=passage.seconds_training,
                seconds=lambda: passage.seconds + time.monotonic() - began,
            )
        except Exception as error:  # noqa: BLE001  (one query's failure is told and never stops the others)
            return self.fail(task, error, passage.seconds + time.monotonic() - began)
        finally:
            passage.scratch.close()

    def fail(self, task: Task, error: Exception, seconds: float) -> Record:
        """The record of a query that could not be mapped, which is written."""
        record = failed(task, self._job.reference.schema, error, seconds)
        self._job.results.write_record(record)
        return record

    def abandon(self) -> list[Task]:
        """Put everyone off as if they had never come aboard; their tasks."""
        tasks = [passage.task for passage in self.aboard.values()]
        for member, passage in self.aboard.items():
            member.close()
            passage.scratch.close()
        self.aboard, self._pack = {}, None
        return tasks
