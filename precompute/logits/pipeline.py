"""The loop: many missing shards through one teacher that never waits for the end of one.

    shard numbers ─> encode (threads) ─> windows, longest sample first ─> decode images (threads) ─> requests
        ─> one call of teacher.score ─> answers, collected by shard ─> writer thread: write_shard, receipt

Memory is bounded at each arrow: a window of encoded samples, a few decoded ones, the requests that the teacher holds,
the shards under way and those that wait for the writer. When the writer falls behind, the loop waits for it.
The order of the requests is a function of the dataset and the missing shards; rows stand in dataset order.
"""

import logging
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import numpy as np
from PIL import Image

from common.concurrency import BackgroundWriter, prefetch_map
from common.data.chat_encoding import EncodedChat
from common.data.samples import Sample, Turn, without_last_response
from common.errors import DataError
from common.shards.manifest import SkippedSample, is_complete
from common.shards.score_shard import ScoredConversation, ShardRow, write_shard
from common.shards.scores import TeacherScores
from common.storage.files import directory_lock
from precompute.logits.job import CaptureJob
from precompute.scorer import GeneratedResponse, RejectedRequest, Scorer, ScoreRequest, ScoringResult

logger = logging.getLogger(__name__)

# Samples that are encoded ahead and sorted by length, so that what runs together is of one length and nothing long is
# left to run alone at the end. A shard is complete a window later than in dataset order at most.
_WINDOW = 256

# Samples whose images are decoded before the teacher asks for them.
_DECODED_AHEAD = 64

# Shards that wait for the writer besides the one it writes.
_WAITING_SHARDS = 2


@dataclass
class CaptureCounter:
    """What a run has done so far. `num_tokens` are those that the teacher read, image tokens included."""

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


@dataclass(frozen=True)
class _SamplePosition:
    """Position `index` of the dataset, which belongs to shard `shard`."""

    shard: int
    index: int


@dataclass(frozen=True)
class _Candidate:
    """An encoded sample; `encoded` has an entry a conversation, `num_tokens` counts all of them, images expanded."""

    place: _SamplePosition
    sample: Sample
    encoded: tuple[EncodedChat, ...]
    num_tokens: int


@dataclass(frozen=True)
class _Loaded:
    """A sample with its images, or why it has none."""

    place: _SamplePosition
    content: tuple[_Candidate, tuple[Image.Image, ...]] | SkippedSample


@dataclass
class _OpenSample:
    """A sample that the teacher has; `answers` has a list a request, which grows to `num_answers` of each."""

    candidate: _Candidate
    num_answers: int
    answers: list[list[ScoringResult]]

    def result(self, job: CaptureJob) -> list[ShardRow] | SkippedSample | None:
        """Its rows, or why it has none; None while answers are missing."""
        index, sample = self.candidate.place.index, self.candidate.sample
        for answer in chain.from_iterable(self.answers):
            if isinstance(answer, RejectedRequest):
                return SkippedSample(index=index, id=sample.id, reason=answer.reason)
        if any(len(answers) < self.num_answers for answers in self.answers):
            return None
        generated, scored = [], []
        for encoded, answers in zip(self.candidate.encoded, self.answers, strict=True):
            generated += [answer for answer in answers if isinstance(answer, GeneratedResponse)]
            scored += [ScoredConversation(encoded, answer) for answer in answers if isinstance(answer, TeacherScores)]
        generated.sort(key=lambda answer: answer.number)
        written = [_generated_row(job, self.candidate, answer) for answer in generated]
        return written or [ShardRow(index, sample, tuple(scored))]


def _generated_row(job: CaptureJob, prompt: _Candidate, answer: GeneratedResponse) -> ShardRow:
    """The sample with a response that the teacher wrote, whose tokens are all scored."""
    (encoded,), (turns,) = prompt.encoded, prompt.sample.conversations
    input_ids = np.concatenate([encoded.input_ids, answer.response_ids])
    spans = np.array([[len(encoded.input_ids), len(input_ids)]], np.int32)
    sample = replace(
        prompt.sample,
        id=f"{prompt.sample.id}#{answer.number}",
        conversations=((*without_last_response(turns), Turn("assistant", job.text(answer.response_ids))),),
    )
    scored = ScoredConversation(EncodedChat(input_ids, spans, encoded.image_token_id), answer.scores)
    return ShardRow(prompt.place.index, sample, (scored,))


@dataclass
class _OpenShard:
    """A shard under way, of which `num_open` samples have neither a row nor a reason yet."""

    number: int
    num_open: int
    rows: list[ShardRow] = field(default_factory=list)
    skipped: list[SkippedSample] = field(default_factory=list)


def score_shards(job: CaptureJob, teacher: Scorer, numbers: Sequence[int], counter: CaptureCounter, bar: Any) -> None:
    """Scores and publishes shards, but those that another process has published when their turn comes.

    `bar` is a tqdm bar of samples. Whatever ends the loop early, an interrupt included, the shards whose samples all
    had their scores are published first.

    Raises:
        DataError: a sample cannot be used, or the teacher refuses it, and on_bad_sample is "stop".
        DecantError: what the teacher or the writer raised.
    """
    num_answers = 1 if job.config.generate is None else job.config.generate.num_samples
    shards: dict[int, _OpenShard] = {}
    samples: dict[int, _OpenSample] = {}

    def places() -> Iterator[_SamplePosition]:
        for number in numbers:
            indices = job.manifest.shard_range(number)
            # Another process on this output may have been faster.
            if is_complete(job.config.output, number, job.manifest):
                bar.update(len(indices))
                continue
            shards[number] = _OpenShard(number, len(indices))
            yield from (_SamplePosition(number, index) for index in indices)

    def requests() -> Iterator[ScoreRequest]:
        for item in loaded:
            if isinstance(item.content, SkippedSample):
                finish(item.place, item.content)
                continue
            candidate, images = item.content
            index, where = item.place.index, job.where(item.place.index)
            samples[index] = _OpenSample(candidate, num_answers, [[] for _ in candidate.encoded])
            for position, encoded in enumerate(candidate.encoded):
                yield ScoreRequest((index, position), candidate.sample.id, encoded, images, where)

    # The teacher may draw requests, and so pass over what is left out, in another thread than the one below.
    finishing = threading.Lock()

    def finish(place: _SamplePosition, result: list[ShardRow] | SkippedSample) -> None:
        with finishing:
            shard = shards[place.shard]
            if isinstance(result, SkippedSample):
                shard.skipped.append(result)
            else:
                shard.rows += result
            shard.num_open -= 1
            bar.update()
            if not shard.num_open:
                writer.put(shards.pop(place.shard))

    def write(shard: _OpenShard) -> None:
        with directory_lock(job.config.output):
            if is_complete(job.config.output, shard.number, job.manifest):
                logger.info("shard %d was written by another process meanwhile", shard.number)
                return
            rows = sorted(shard.rows, key=lambda row: row.index)
            skipped = sorted(shard.skipped, key=lambda entry: entry.index)
            receipt = write_shard(job.config.output, shard.number, job.manifest, rows, skipped)
        counter.num_shards += 1
        counter.num_rows += receipt.num_rows

    # Left from the last to the first: the teacher stops drawing requests before what it draws from is closed.
    with (
        BackgroundWriter(write, max_waiting=_WAITING_SHARDS) as writer,
        closing(_load_ahead(job, places())) as loaded,
        closing(teacher.score(requests())) as scored,
    ):
        for (index, position), answer in scored:
            writer.check()
            if isinstance(answer, RejectedRequest) and job.config.on_bad_sample == "stop":
                raise DataError(answer.reason)
            # A sample is over with its first refusal; what else was answered to it is dropped.
            sample = samples.get(index)
            if sample is None:
                continue
            sample.answers[position].append(answer)
            result = sample.result(job)
            if result is None:
                continue
            del samples[index]
            if not isinstance(result, SkippedSample):
                counter.num_tokens += sample.candidate.num_tokens
            finish(sample.candidate.place, result)
            bar.set_postfix_str(f"{counter.tokens_per_s:,.0f} tokens/s", refresh=False)
        assert not shards, f"the teacher left {len(samples)} samples unscored"


def _load_ahead(job: CaptureJob, places: Iterable[_SamplePosition]) -> Generator[_Loaded, None, None]:
    """The samples at `places` in the order in which they are to be scored, loaded ahead in threads.

    Images are decoded after sorting, so that no window of them has to fit in memory.
    """

    def encode(place: _SamplePosition) -> _Candidate | _Loaded:
        try:
            return _Candidate(place, *job.check(place.index))
        except DataError as error:
            return _Loaded(place, job.skip_or_raise(place.index, error))

    def decode(item: _Candidate | _Loaded) -> _Loaded:
        if isinstance(item, _Loaded):
            return item
        try:
            item = replace(item, sample=job.with_image_bytes(item.place.index, item.sample))
            return _Loaded(item.place, (item, job.decode(item.place.index, item.sample)))
        except DataError as error:
            return _Loaded(item.place, job.skip_or_raise(item.place.index, error))

    num_threads = job.config.num_loader_threads
    with closing(prefetch_map(encode, places, num_threads=num_threads, ahead=_WINDOW)) as encoded:
        ordered = _longest_first(encoded)
        with closing(prefetch_map(decode, ordered, num_threads=num_threads, ahead=_DECODED_AHEAD)) as decoded:
            yield from decoded


def _longest_first(items: Iterator[_Candidate | _Loaded]) -> Iterator[_Candidate | _Loaded]:
    """Windows of `items`, each sorted by length; those that are left out have none and stand last."""
    while window := list(islice(items, _WINDOW)):
        window.sort(key=lambda item: -item.num_tokens if isinstance(item, _Candidate) else 0)
        yield from window
