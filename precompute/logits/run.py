"""`precompute-logits`: from a dataset to shards.

    prepare ─> open_output ─> missing shards ─> preflight ─> start the teacher ─> score_shards ─> summary

The loop itself is in pipeline.py, its form on a Ray cluster in ray_backend.py. Until its receipt is published a shard
does not exist: a run that is stopped loses only the shards under way.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from tqdm import tqdm

from common.config import digest
from common.console import plain_text
from common.data.bad_samples import check_skipped_share
from common.errors import ConfigError, DataError
from common.shards.manifest import SkippedSample, open_output, read_receipts
from common.shards.output_files import output_kind
from common.storage.files import Location, directory_lock, publish, remove_partials
from common.storage.output_check import check_output
from precompute.config import PrecomputeConfig
from precompute.dataset_card import write_card_if_complete
from precompute.logits.job import CaptureJob, check_samples, missing_shards, prepare_job
from precompute.logits.pipeline import CaptureCounter, score_shards
from precompute.scorer import Scorer, ScorerSettings

CONFIG_NAME = "config.json"

_SHOWN_SKIPPED = 20

EngineName = Literal["local", "ray"]


@dataclass(frozen=True)
class CaptureSummary:
    """Counts of an output after a run, and of what the run added.

    The fields up to `skipped` count the whole output; `num_samples` is the size of the dataset. `num_own_shards` are
    those that this node was to write, `num_own_missing` those of them that are missing. `num_new_tokens` are those that
    the teacher read in this run, image tokens included; `scoring_s` is the time from the teacher's first request (on
    Ray, from the start of the actors) to the last shard.
    """

    output: Location
    num_samples: int
    num_shards: int
    num_complete_shards: int
    num_rows: int
    num_scored_tokens: int
    num_bytes: int
    skipped: tuple[SkippedSample, ...]
    num_own_shards: int
    num_own_missing: int
    num_new_shards: int
    num_new_rows: int
    num_new_tokens: int
    scoring_s: float
    interrupted: bool

    @property
    def complete(self) -> bool:
        """True if every shard is published."""
        return self.num_complete_shards == self.num_shards

    def check_skipped(self, max_skipped: float) -> None:
        """Raises DataError if the whole output skips a larger share of the samples than `max_skipped`."""
        if self.complete:
            check_skipped_share([entry.reason for entry in self.skipped], self.num_samples, max_skipped)

    @property
    def new_tokens_per_s(self) -> float:
        """Teacher's speed in this run; 0 if it was not started."""
        return self.num_new_tokens / self.scoring_s if self.scoring_s else 0.0

    @property
    def message(self) -> str:
        """Outcome in one line."""
        if not self.complete and not self.interrupted and not self.num_own_missing:
            return (
                f"this node's {self.num_own_shards} shards are complete; "
                f"{self.num_shards - self.num_complete_shards} of {self.num_shards} are left to the other nodes"
            )
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
        """Returns the totals, the samples that were left out and the outcome for the terminal."""
        table = Table(show_header=False, box=None)
        table.add_row("output", plain_text(self.output))
        table.add_row("shards", f"{self.num_complete_shards:,} of {self.num_shards:,}, {self.num_new_shards:,} new")
        table.add_row("rows", f"{self.num_rows:,}, {self.num_new_rows:,} new")
        table.add_row("scored tokens", f"{self.num_scored_tokens:,} in {self.num_bytes:,} bytes")
        if self.num_new_tokens:
            speed = f"{self.num_new_tokens:,} tokens in {self.scoring_s:,.0f} s, {self.new_tokens_per_s:,.0f} tokens/s"
            table.add_row("teacher read", speed)
        lines = [plain_text(f"skipped {skipped.id!r}: {skipped.reason}") for skipped in self.skipped[:_SHOWN_SKIPPED]]
        if more := len(self.skipped) - len(lines):
            lines.append(plain_text(f"and {more:,} more, listed in the receipts beside the shards"))
        return Group(table, *lines, plain_text(self.message))


def run_capture(
    config: PrecomputeConfig,
    *,
    progress: bool = True,
    start_teacher: Callable[[ScorerSettings], Scorer] | None = None,
    engine: EngineName = "local",
) -> CaptureSummary:
    """Scores every sample that has no shard yet. Ctrl-C ends the run early with `interrupted` set.

    `start_teacher` replaces vLLM by another scorer; it is called only when something is missing. `engine` "ray" calls
    it in the actors of a Ray cluster instead of in this process.

    Raises:
        ConfigError: the output holds what this command did not write; `engine` is "ray" and there is no Ray, or no
            cluster at the address; or `num_nodes` is not `data_parallel_size`.
        DataError: a sample cannot be used and on_bad_sample is "stop"; complete shards stay.
        ProvenanceError: another teacher, dataset or setting began this output; every difference is listed.
        ModelError, StorageError: the teacher or the disk failed; complete shards stay.
    """
    num_replicas = config.engine.data_parallel_size
    if num_replicas > 1 and (config.num_nodes != num_replicas or engine == "ray"):
        raise ConfigError(
            f"engine.data_parallel_size = {num_replicas} wants {num_replicas} processes that work in step, found "
            f"{config.num_nodes} node(s){' and --engine ray' if engine == 'ray' else ''}; give --num-nodes "
            f"{num_replicas} and each its --node-rank, or leave data_parallel_size at 1"
        )
    inputs = {"teacher": config.teacher, "dataset": config.dataset, "chat_template": config.chat_template}
    check_output(config.output, output_kind("precompute-logits"), inputs)
    job = prepare_job(config)
    with directory_lock(config.output):
        open_output(config.output, job.manifest)
    remove_partials(config.output)
    body = config.model_dump_json(indent=1)
    publish(config.output / CONFIG_NAME, f'{{"sha256": "{digest(config)}", "config": {body}}}\n'.encode())
    counter = CaptureCounter()
    interrupted = False
    try:
        if missing := missing_shards(job):
            score = _select_backend(engine, start_teacher or _start_vllm)
            _score_missing(job, missing, counter, score, progress)
    except KeyboardInterrupt:
        interrupted = True
    return _summarise(job, counter, interrupted)


def _start_vllm(settings: ScorerSettings) -> Scorer:
    # Imported here, because loading vLLM takes seconds, which a run with nothing to do should not spend.
    from precompute.engine.teacher import Teacher
    from precompute.logits.self_check import check_expansion, check_scores

    check_expansion(settings)
    # The teacher's own settings are without the probes, whose images would stay in memory.
    teacher = Teacher(replace(settings, probes=()))
    try:
        check_scores(teacher, settings)
    except BaseException:
        teacher.close()
        raise
    return teacher


# Scores and publishes shards of a job, counts them, and moves a tqdm bar of samples.
_ScoreFunction = Callable[[CaptureJob, list[int], CaptureCounter, Any], None]


def _select_backend(engine: EngineName, start_teacher: Callable[[ScorerSettings], Scorer]) -> _ScoreFunction:
    """Returns the function that scores shards in this process or on a Ray cluster, whose package only that needs."""
    if engine == "ray":
        from precompute.logits.ray_backend import score_on_ray

        return partial(score_on_ray, start_teacher=start_teacher)
    return partial(_score_here, start_teacher=start_teacher)


def _score_missing(
    job: CaptureJob, missing: list[int], counter: CaptureCounter, score: _ScoreFunction, progress: bool
) -> None:
    """Checks the samples of the missing shards, if the configuration wants it, and scores them.

    Raises:
        DataError: a sample cannot be used; says how many shards this run wrote before.
    """
    indices = list(chain.from_iterable(job.manifest.shard_range(number) for number in missing))
    if job.config.preflight:
        with tqdm(indices, desc="checking", unit=" samples", disable=not progress) as checked:
            check_samples(job, checked)
    try:
        with tqdm(total=len(indices), desc="scoring", unit=" rows", disable=not progress) as bar:
            score(job, missing, counter, bar)
    except DataError as error:
        raise DataError(
            f"{error}\n{counter.num_shards} shard(s) were written in this run and are safe; correct the sample and "
            'run the same command again to continue, or begin another output with on_bad_sample = "skip"'
        ) from error


def _score_here(
    job: CaptureJob,
    missing: list[int],
    counter: CaptureCounter,
    bar: Any,
    start_teacher: Callable[[ScorerSettings], Scorer],
) -> None:
    """Scores the missing shards in this process."""
    teacher = start_teacher(job.scorer_settings)
    counter.started_s = time.monotonic()
    try:
        score_shards(job, teacher, missing, counter, bar)
    finally:
        teacher.close()


def _summarise(job: CaptureJob, counter: CaptureCounter, interrupted: bool) -> CaptureSummary:
    output = job.config.output
    receipts = read_receipts(output, job.manifest)
    write_card_if_complete(output, job.manifest, receipts)
    own = range(job.config.node_rank, job.manifest.num_shards, job.config.num_nodes)
    return CaptureSummary(
        output=output,
        num_samples=len(job.dataset),
        num_shards=job.manifest.num_shards,
        num_complete_shards=len(receipts),
        num_rows=sum(receipt.num_rows for receipt in receipts),
        num_scored_tokens=sum(receipt.num_scored_tokens for receipt in receipts),
        num_bytes=sum(receipt.num_bytes for receipt in receipts),
        skipped=tuple(chain.from_iterable(receipt.skipped for receipt in receipts)),
        num_own_shards=len(own),
        num_own_missing=len(set(own) - {receipt.shard for receipt in receipts}),
        num_new_shards=counter.num_shards,
        num_new_rows=counter.num_rows,
        num_new_tokens=counter.num_tokens,
        scoring_s=counter.elapsed_s,
        interrupted=interrupted,
    )
