"""`precompute-logits`: the visible loop from a dataset to shards.

    prepare ─> open_output ─> missing shards ─> preflight ─> start the teacher
        for each missing shard:  load ahead in threads ─> score ─> write_shard ─> receipt

A shard is scored by itself, its requests in dataset order, so that it comes out the same whichever run writes it.
Until its receipt is published it does not exist: a run that is stopped at any moment loses the shard under way.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from common.config import digest
from common.errors import DataError
from common.manifest import Skipped, open_output, published_shards, read_receipt
from common.scores import TeacherScores
from common.shards import ScoredConversation, ShardRow, write_shard
from common.storage import exclusive, publish, remove_partials
from precompute.config import PrecomputeConfig
from precompute.plan import Job, PreparedSample, is_complete, missing_shards, prepare, require_usable
from precompute.scoring import Key, Scorer, ScoreRequest, ScoringPlan

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.json"

# Samples whose images are decoded before the engine asks for them.
_LOADED_AHEAD = 64

_SHOWN_SKIPPED = 20

T = TypeVar("T")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Summary:
    """What an output holds after a run, and what the run added.

    The first group counts the whole output, `skipped` included. `num_new_tokens` are those that the teacher read
    in this run, image tokens included; `scoring_s` is the time from the teacher's first request to the last shard.
    """

    output: Path
    num_shards: int
    num_complete_shards: int
    num_rows: int
    num_scored_tokens: int
    num_bytes: int
    skipped: tuple[Skipped, ...]
    num_new_shards: int
    num_new_rows: int
    num_new_tokens: int
    scoring_s: float
    interrupted: bool

    @property
    def complete(self) -> bool:
        """Whether every shard is there."""
        return self.num_complete_shards == self.num_shards

    @property
    def new_tokens_per_s(self) -> float:
        """The teacher's speed in this run; 0 if it was not started."""
        return self.num_new_tokens / self.scoring_s if self.scoring_s else 0.0

    @property
    def message(self) -> str:
        """The outcome in one line."""
        if not self.complete:
            state = "interrupted: " if self.interrupted else ""
            return (
                f"{state}{self.num_complete_shards} of {self.num_shards} shards are complete; "
                "run the same command again to continue"
            )
        if not self.num_new_shards:
            return f"all {self.num_shards} shards are complete; nothing was left to do"
        return f"all {self.num_shards} shards are complete"

    def render(self) -> RenderableType:
        """The outcome, the totals and the samples that were left out."""
        table = Table(show_header=False, box=None)
        table.add_row("output", str(self.output))
        table.add_row("shards", f"{self.num_complete_shards:,} of {self.num_shards:,}, {self.num_new_shards:,} new")
        table.add_row("rows", f"{self.num_rows:,}, {self.num_new_rows:,} new")
        table.add_row("scored tokens", f"{self.num_scored_tokens:,} in {self.num_bytes:,} bytes")
        if self.num_new_tokens:
            speed = f"{self.num_new_tokens:,} tokens in {self.scoring_s:,.0f} s, {self.new_tokens_per_s:,.0f} tokens/s"
            table.add_row("teacher read", speed)
        lines = [Text(f"skipped {skipped.id!r}: {skipped.reason}") for skipped in self.skipped[:_SHOWN_SKIPPED]]
        if more := len(self.skipped) - len(lines):
            lines.append(Text(f"and {more:,} more, listed in the receipts beside the shards"))
        return Group(table, *lines, Text(self.message))


def run(
    config: PrecomputeConfig,
    *,
    progress: bool = True,
    start_teacher: Callable[[ScoringPlan], Scorer] | None = None,
) -> Summary:
    """Scores every sample that has no shard yet. Ctrl-C ends it early with `interrupted` set.

    `start_teacher` replaces vLLM by another scorer; it is called only when something is missing.

    Raises:
        DataError: a sample cannot be used and on_bad_sample is "stop"; complete shards stay.
        ProvenanceError: another teacher, dataset or setting began this output; every difference is listed.
        ModelError, StorageError: the teacher or the disk failed; complete shards stay.
    """
    job = prepare(config)
    with exclusive(config.output):
        open_output(config.output, job.manifest)
    remove_partials(config.output)
    body = config.model_dump_json(indent=1)
    publish(config.output / CONFIG_NAME, f'{{"sha256": "{digest(config)}", "config": {body}}}\n'.encode())
    counter = _Counter()
    interrupted = False
    try:
        if missing := missing_shards(job):
            _score_missing(job, missing, counter, progress, start_teacher or _start_vllm)
    except KeyboardInterrupt:
        interrupted = True
    return _summarise(job, counter, interrupted)


def _start_vllm(plan: ScoringPlan) -> Scorer:
    # Imported here because loading vLLM takes seconds, which a run with nothing to do should not spend.
    from precompute.teacher import Teacher

    return Teacher(plan)


@dataclass
class _Counter:
    """What this run has done so far."""

    num_shards: int = 0
    num_rows: int = 0
    num_tokens: int = 0
    started_s: float | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds since the teacher was ready, 0 before that."""
        return 0.0 if self.started_s is None else time.monotonic() - self.started_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens the teacher read a second."""
        return self.num_tokens / self.elapsed_s if self.started_s is not None else 0.0


def _score_missing(
    job: Job, missing: list[int], counter: _Counter, progress: bool, start_teacher: Callable[[ScoringPlan], Scorer]
) -> None:
    indices = list(chain.from_iterable(job.manifest.shard_range(number) for number in missing))
    if job.config.preflight:
        with tqdm(indices, desc="checking", unit=" samples", disable=not progress) as checked:
            require_usable(job, checked)
    teacher = start_teacher(job.scoring_plan)
    counter.started_s = time.monotonic()
    try:
        with tqdm(total=len(indices), desc="scoring", unit=" rows", disable=not progress) as bar:
            _score_shards(job, teacher, missing, counter, bar)
    except DataError as error:
        raise DataError(
            f"{error}\n{counter.num_shards} shard(s) were written in this run and are safe; correct the sample and "
            'run the same command again to continue, or begin another output with on_bad_sample = "skip"'
        ) from error
    finally:
        teacher.close()


def _score_shards(job: Job, teacher: Scorer, missing: list[int], counter: _Counter, bar: Any) -> None:
    def place_in_shard() -> Iterator[tuple[int, int]]:
        for number in missing:
            # Another process on this output may have been faster.
            if is_complete(job.config.output, number, job.manifest):
                bar.update(len(job.manifest.shard_range(number)))
            else:
                yield from ((number, index) for index in job.manifest.shard_range(number))

    def load(place: tuple[int, int]) -> tuple[int, PreparedSample | Skipped]:
        number, index = place
        return number, job.load(index)

    ahead = in_threads(load, place_in_shard(), num_threads=job.config.num_loader_threads, ahead=_LOADED_AHEAD)
    with closing(ahead) as loaded:
        for number, samples in groupby(loaded, key=lambda pair: pair[0]):
            rows, skipped = _score_shard(job, teacher, (sample for _, sample in samples), counter, bar)
            with exclusive(job.config.output):
                if is_complete(job.config.output, number, job.manifest):
                    logger.info("shard %d was written by another process meanwhile", number)
                    continue
                receipt = write_shard(job.config.output, number, job.manifest, rows, skipped)
            counter.num_shards += 1
            counter.num_rows += receipt.num_rows


def _score_shard(
    job: Job, teacher: Scorer, samples: Iterable[PreparedSample | Skipped], counter: _Counter, bar: Any
) -> tuple[list[ShardRow], list[Skipped]]:
    """Rows of one shard in dataset order, and the samples that were left out."""
    waiting: dict[int, PreparedSample] = {}
    rows: list[ShardRow] = []
    skipped: list[Skipped] = []
    scores: dict[Key, TeacherScores] = {}

    def requests() -> Iterator[ScoreRequest]:
        for sample in samples:
            if isinstance(sample, Skipped):
                skipped.append(sample)
                bar.update()
                continue
            waiting[sample.index] = sample
            for position, encoded in enumerate(sample.encoded):
                yield ScoreRequest((sample.index, position), encoded, sample.images, job.where(sample.index))

    for (index, position), scored in teacher.score(requests()):
        scores[index, position] = scored
        sample = waiting[index]
        keys = [(index, number) for number in range(len(sample.encoded))]
        if not all(key in scores for key in keys):
            continue
        # The images go as soon as they are no longer needed; a shard of them would not fit in memory.
        del waiting[index]
        conversations = tuple(map(ScoredConversation, sample.encoded, (scores.pop(key) for key in keys)))
        rows.append(ShardRow(index, sample.sample, conversations))
        counter.num_tokens += sample.num_tokens
        bar.update()
        bar.set_postfix_str(f"{counter.tokens_per_s:,.0f} tokens/s", refresh=False)
    assert not waiting, f"the teacher left {len(waiting)} samples unscored"
    return sorted(rows, key=lambda row: row.index), skipped


def in_threads(
    function: Callable[[T], ResultT], items: Iterable[T], *, num_threads: int, ahead: int
) -> Generator[ResultT, None, None]:
    """`function` of each item, in order, computed in threads up to `ahead` items before it is asked for.

    What `function` raises is raised here, at its item's turn.
    """
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="load")
    pending: deque[Future[ResultT]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _summarise(job: Job, counter: _Counter, interrupted: bool) -> Summary:
    output = job.config.output
    receipts = [read_receipt(output, number, job.manifest) for number in published_shards(output)]
    return Summary(
        output=output,
        num_shards=job.manifest.num_shards,
        num_complete_shards=len(receipts),
        num_rows=sum(receipt.num_rows for receipt in receipts),
        num_scored_tokens=sum(receipt.num_scored_tokens for receipt in receipts),
        num_bytes=sum(receipt.num_bytes for receipt in receipts),
        skipped=tuple(chain.from_iterable(receipt.skipped for receipt in receipts)),
        num_new_shards=counter.num_shards,
        num_new_rows=counter.num_rows,
        num_new_tokens=counter.num_tokens,
        scoring_s=counter.elapsed_s,
        interrupted=interrupted,
    )
