"""The loop of the capture: all missing shards through one call of the teacher, so that it never waits between shards.

    shard numbers ─> encode (threads) ─> windows, longest sample first ─> decode images (threads) ─> requests
        ─> one call of teacher.score ─> results, collected by shard ─> writer's thread: write_shard, receipt

Memory is bounded at each arrow: a window of encoded samples, a few decoded ones, the requests that the teacher holds,
the shards under way and those that wait for the writer. When the writer falls behind, the loop waits for it.
The order of the requests is a function of the dataset and the missing shards; the rows of a shard are in dataset order.
"""

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
from PIL import Image

from common.concurrency import prefetch_map
from common.data.chat_encoding import EncodedChat
from common.data.samples import Turn, without_last_response
from common.errors import DataError
from common.shards.manifest import SkippedSample
from common.shards.score_shard import ScoredConversation, ShardRow, write_shard
from common.shards.scores import TeacherScores
from precompute.logits.job import CaptureJob, EncodedSample
from precompute.scorer import GeneratedResponse, RejectedRequest, Scorer, ScoreRequest, ScoringResult
from precompute.shard_writer import ShardWriter

# Samples that are encoded ahead and sorted by length, so that samples of one length run together and no long one is
# left to run alone at the end. A shard is complete at most a window later than in dataset order.
_WINDOW = 256

# Samples whose images are decoded before the teacher takes them.
_DECODED_AHEAD = 64

# Shards that wait for the writer besides the one it writes.
_WAITING_SHARDS = 2


@dataclass
class CaptureCounter:
    """Counts of a run so far. `num_tokens` are those that the teacher read, image tokens included."""

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
        """Tokens that the teacher read a second."""
        return self.num_tokens / self.elapsed_s if self.started_s is not None else 0.0


@dataclass(frozen=True)
class _LoadedSample:
    """An encoded sample with its decoded images."""

    sample: EncodedSample
    images: tuple[Image.Image, ...]


@dataclass
class _OpenSample:
    """A sample that the teacher works on. `results` has a list for each conversation, up to `num_expected` long."""

    encoded_sample: EncodedSample
    num_expected: int
    results: list[list[ScoringResult]]

    def finish(self, job: CaptureJob) -> list[ShardRow] | SkippedSample | None:
        """Returns the sample's rows, or why it has none; None while results are missing."""
        index, sample = self.encoded_sample.index, self.encoded_sample.sample
        for result in chain.from_iterable(self.results):
            if isinstance(result, RejectedRequest):
                return SkippedSample(index=index, id=sample.id, reason=result.reason)
        if any(len(results) < self.num_expected for results in self.results):
            return None
        generated, scored = [], []
        for encoded, results in zip(self.encoded_sample.encoded, self.results, strict=True):
            generated += [result for result in results if isinstance(result, GeneratedResponse)]
            scored += [ScoredConversation(encoded, result) for result in results if isinstance(result, TeacherScores)]
        generated.sort(key=lambda response: response.number)
        rows = [_generated_row(job, self.encoded_sample, response) for response in generated]
        return rows or [ShardRow(index, sample, tuple(scored))]


def _generated_row(job: CaptureJob, prompt: EncodedSample, response: GeneratedResponse) -> ShardRow:
    """Returns the sample with a response that the teacher wrote, whose tokens are all scored."""
    (encoded,), (turns,) = prompt.encoded, prompt.sample.conversations
    input_ids = np.concatenate([encoded.input_ids, response.response_ids])
    spans = np.array([[len(encoded.input_ids), len(input_ids)]], np.int32)
    sample = replace(
        prompt.sample,
        id=f"{prompt.sample.id}#{response.number}",
        conversations=((*without_last_response(turns), Turn("assistant", job.decode_text(response.response_ids))),),
    )
    scored = ScoredConversation(EncodedChat(input_ids, spans, encoded.image_token_id), response.scores)
    return ShardRow(prompt.index, sample, (scored,))


# A sample's rows, or why it has none.
_SampleResult = list[ShardRow] | SkippedSample


def score_shards(job: CaptureJob, teacher: Scorer, numbers: Sequence[int], counter: CaptureCounter, bar: Any) -> None:
    """Scores and publishes shards, except those that another process has published when their turn comes.

    `bar` is a tqdm bar of samples. If the loop ends early, by an error or an interrupt, the shards whose samples all
    have their scores are published first.

    Raises:
        DataError: a sample cannot be used, or the teacher refuses it, and on_bad_sample is "stop".
        DecantError: what the teacher or the writer raised.
    """
    output, manifest = job.config.output, job.manifest
    write = partial(_write_shard, job, counter)
    open_samples: dict[int, _OpenSample] = {}
    # Contexts are left in reverse order, so that the teacher takes no more requests when their source is closed.
    with (
        ShardWriter[_SampleResult](output, manifest, write, bar, max_waiting=_WAITING_SHARDS) as writer,
        closing(_load_ahead(job, _begin_shards(job, numbers, writer))) as loaded,
        closing(teacher.score(_make_requests(job, loaded, open_samples, writer))) as scored,
    ):
        for (index, conversation), result in scored:
            writer.check()
            if isinstance(result, RejectedRequest) and job.config.on_bad_sample == "stop":
                raise DataError(result.reason)
            # A sample ends with its first rejection; its later results are dropped.
            sample = open_samples.get(index)
            if sample is None:
                continue
            sample.results[conversation].append(result)
            finished = sample.finish(job)
            if finished is None:
                continue
            del open_samples[index]
            if not isinstance(finished, SkippedSample):
                counter.num_tokens += sample.encoded_sample.num_tokens
            writer.add(index, finished)
            bar.set_postfix_str(f"{counter.tokens_per_s:,.0f} tokens/s", refresh=False)
        assert not writer.num_open, f"the teacher left {len(open_samples)} samples unscored"


def _write_shard(job: CaptureJob, counter: CaptureCounter, number: int, results: Sequence[_SampleResult]) -> None:
    """Publishes a shard, rows and skipped samples in dataset order, and counts it."""
    skipped = [result for result in results if isinstance(result, SkippedSample)]
    rows = [row for result in results if not isinstance(result, SkippedSample) for row in result]
    rows.sort(key=lambda row: row.index)
    skipped.sort(key=lambda entry: entry.index)
    receipt = write_shard(job.config.output, number, job.manifest, rows, skipped)
    counter.num_shards += 1
    counter.num_rows += receipt.num_rows


def _begin_shards(job: CaptureJob, numbers: Iterable[int], writer: ShardWriter[_SampleResult]) -> Iterator[int]:
    """Begins the shards one after the other and yields the positions of their samples in the dataset."""
    for number in numbers:
        if writer.begin(number):
            yield from job.manifest.shard_range(number)


def _make_requests(
    job: CaptureJob,
    loaded: Iterable[_LoadedSample | SkippedSample],
    open_samples: dict[int, _OpenSample],
    writer: ShardWriter[_SampleResult],
) -> Iterator[ScoreRequest]:
    """Yields a request for each conversation and enters its sample into `open_samples`; skipped ones have none.

    The teacher may iterate over them in a thread of its own.
    """
    num_expected = 1 if job.config.generate is None else job.config.generate.num_samples
    for item in loaded:
        if isinstance(item, SkippedSample):
            writer.add(item.index, item)
            continue
        sample, where = item.sample, job.where(item.sample.index)
        open_samples[sample.index] = _OpenSample(sample, num_expected, [[] for _ in sample.encoded])
        for conversation, encoded in enumerate(sample.encoded):
            yield ScoreRequest((sample.index, conversation), sample.sample.id, encoded, item.images, where)


def _load_ahead(job: CaptureJob, indices: Iterable[int]) -> Generator[_LoadedSample | SkippedSample, None, None]:
    """Yields the samples in the order in which they are to be scored, loaded ahead in threads.

    Images are decoded after sorting, so that no window of them has to fit in memory.
    """

    def encode(index: int) -> EncodedSample | SkippedSample:
        try:
            return job.load_encoded(index)
        except DataError as error:
            return job.skip_or_raise(index, error)

    def load(item: EncodedSample | SkippedSample) -> _LoadedSample | SkippedSample:
        if isinstance(item, SkippedSample):
            return item
        try:
            sample = job.with_image_bytes(item.index, item.sample)
            return _LoadedSample(replace(item, sample=sample), job.load_images(item.index, sample))
        except DataError as error:
            return job.skip_or_raise(item.index, error)

    num_threads = job.config.num_loader_threads
    with closing(prefetch_map(encode, indices, num_threads=num_threads, ahead=_WINDOW)) as encoded:
        ordered = _longest_first(encoded)
        with closing(prefetch_map(load, ordered, num_threads=num_threads, ahead=_DECODED_AHEAD)) as loaded:
            yield from loaded


def _longest_first(items: Iterator[EncodedSample | SkippedSample]) -> Iterator[EncodedSample | SkippedSample]:
    """Yields windows of `items`, each sorted by length, longest first; skipped samples come last."""
    while window := list(islice(items, _WINDOW)):
        window.sort(key=lambda item: -item.num_tokens if isinstance(item, EncodedSample) else 0)
        yield from window
