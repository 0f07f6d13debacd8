"""Before the engine starts: what is to be scored, whether it can be, and what is already there.

open_inputs ──> Inputs   dataset, encoder, image settings; weight files need not be there
Inputs.check(i)          one sample encoded, everything about it checked that costs no decoding
prepare ──> Job          the inputs, and the manifest that they and the teacher's weights add up to
Job.with_image_bytes(i, s)     the sample with its image files, if shards are to hold them
Job.decode(i, s)         a sample's images, as the teacher is to see them
"""

import logging
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from common.data.chat_encoding import ChatEncoder, EncodedChat
from common.data.images import ImageSpec, check_image_exists, load_image, read_image
from common.data.samples import Dataset, Sample, without_last_response
from common.errors import DataError, ModelError
from common.shards.manifest import (
    NUM_READERS,
    CaptureSettings,
    DatasetIdentity,
    GenerateSettings,
    ImageIdentity,
    Manifest,
    SkippedSample,
    TokenizerIdentity,
    is_complete,
    published_shards,
)
from common.shards.quantization import StoredPrecision
from precompute.config import PrecomputeConfig
from precompute.fingerprints import ModelFacts, engine_identity, teacher_identity
from precompute.scorer import ScorerSettings

logger = logging.getLogger(__name__)

_LISTED_PROBLEMS = 20


@dataclass(frozen=True)
class CaptureInputs:
    """What is to be scored. `max_tokens` is the configured limit or the teacher's, if less."""

    config: PrecomputeConfig
    dataset: Dataset
    encoder: ChatEncoder
    image_spec: ImageSpec | None
    facts: ModelFacts
    max_tokens: int
    # Fast tokenizers may not be called from two threads at once.
    _encoding: threading.Lock = field(default_factory=threading.Lock, init=False)

    def where(self, index: int) -> str:
        """How messages name a sample."""
        return f"{self.dataset.path}: sample {self.dataset.ids[index]!r}"

    def check(self, index: int) -> tuple[Sample, tuple[EncodedChat, ...], int]:
        """The sample, its encoded conversations, and the tokens that the teacher reads for them.

        Raises:
            DataError: malformed, nothing to score, too long, or an image that is not there.
        """
        sample = self.dataset[index]
        where = self.where(index)
        if sample.images and self.image_spec is None:
            raise DataError(f"{where}: has {len(sample.images)} image(s), but the teacher has no vision tower")
        for image in sample.images:
            check_image_exists(image, self.config.image_root, where)
        with self._encoding:
            encoded = self._prompt(sample) if self.config.generate else self.encoder.encode_sample(sample)
        added = 0 if self.image_spec is None else len(sample.images) * (self.image_spec.tokens_per_image - 1)
        lengths = [len(conversation.input_ids) + added for conversation in encoded]
        # A response that is still to be written needs room for a token at least.
        needed = max(lengths) + (self.config.generate is not None)
        if needed > self.max_tokens:
            raise DataError(
                f"{where}: needs {needed:,} tokens, images expanded; the limit is {self.max_tokens:,}; "
                'shorten it, raise max_tokens as far as the teacher allows, or set on_bad_sample = "skip"'
            )
        return sample, encoded, sum(lengths)

    def _prompt(self, sample: Sample) -> tuple[EncodedChat, ...]:
        """What the teacher is to answer; nothing of it is scored."""
        ids = self.encoder.encode_prompt(without_last_response(sample.conversations[0]))
        return (EncodedChat(ids, np.zeros((0, 2), np.int32), self.encoder.image_token_id),)

    def text(self, ids: npt.NDArray[np.int32]) -> str:
        """What ids say, without special tokens."""
        with self._encoding:
            return str(self.encoder.tokenizer.decode(ids, skip_special_tokens=True))


@dataclass(frozen=True)
class CaptureJob(CaptureInputs):
    """All that is known before the teacher starts."""

    manifest: Manifest

    @property
    def scorer_settings(self) -> ScorerSettings:
        """What the teacher must know."""
        spec = self.image_spec
        capture = self.manifest.capture
        return ScorerSettings(
            model_dir=self.config.teacher,
            engine=self.config.engine,
            max_tokens=self.max_tokens,
            max_images=0 if spec is None else max(1, self.max_tokens // spec.tokens_per_image),
            top_k=capture.top_k,
            top_p=capture.top_p,
            min_k=capture.min_k,
            num_draws=capture.num_draws,
            seed=capture.seed or 0,
            generate=self.config.generate,
            node_rank=self.config.node_rank,
            vocab_size=self.manifest.tokenizer.vocab_size,
            output_vocab_size=self.manifest.teacher.vocab_size,
        )

    def decode(self, index: int, sample: Sample) -> tuple[Image.Image, ...]:
        """The images of a sample as the teacher is to see them.

        Raises:
            DataError: one is unreadable or too large.
        """
        mean_rgb = (0, 0, 0) if self.image_spec is None else self.image_spec.mean_rgb
        return tuple(
            load_image(image, self.config.image_root, self.config.image_aspect_ratio, mean_rgb, self.where(index))
            for image in sample.images
        )

    def with_image_bytes(self, index: int, sample: Sample) -> Sample:
        """The sample with its image files' bytes, if shards are to hold them.

        Raises:
            DataError: one cannot be read.
        """
        if not self.config.store_images:
            return sample
        files = [read_image(image, self.config.image_root, self.where(index)) for image in sample.images]
        return replace(sample, images=tuple(files))

    def skip_or_raise(self, index: int, error: DataError) -> SkippedSample:
        """The entry of a sample that cannot be used, if the configuration allows that; else raises `error`."""
        if self.config.on_bad_sample == "stop":
            raise error
        return SkippedSample(index=index, id=self.dataset.ids[index], reason=str(error))


def open_inputs(config: PrecomputeConfig) -> CaptureInputs:
    """Opens the dataset, and of the teacher its configuration, tokenizer and image processor.

    Raises:
        DataError: the dataset is unreadable, broken, empty or has duplicate ids.
        ModelError: one of the teacher's files is missing, or they contradict each other.
    """
    dataset = Dataset.open(config.dataset, config.kind)
    encoder = ChatEncoder.load(config.teacher, config.chat_template, config.score)
    image_spec = ImageSpec.load(config.teacher)
    facts = ModelFacts.load(config.teacher)
    if facts.image_token_id is not None and facts.image_token_id != encoder.image_token_id:
        raise ModelError(
            f"{config.teacher}: config.json says image token {facts.image_token_id}, the tokenizer says "
            f"{encoder.image_token_id}; expected a llava-hf layout, in which they agree"
        )
    if encoder.vocab_size > facts.vocab_size:
        raise ModelError(
            f"{config.teacher}: the tokenizer has {encoder.vocab_size} tokens, the output layer {facts.vocab_size} rows"
        )
    # One token of the teacher's context goes to the one that the engine generates.
    limit = config.max_tokens if facts.context_tokens is None else min(config.max_tokens, facts.context_tokens - 1)
    return CaptureInputs(config, dataset, encoder, image_spec, facts, limit)


def prepare_job(config: PrecomputeConfig) -> CaptureJob:
    """Opens everything that a run needs but the engine, and takes the fingerprints.

    Raises:
        DataError: the dataset is unreadable, broken, empty or has duplicate ids.
        ModelError: the teacher's directory is not complete.
    """
    inputs = open_inputs(config)
    dataset, encoder, image_spec, facts = inputs.dataset, inputs.encoder, inputs.image_spec, inputs.facts
    logger.info("taking the fingerprint of %s", config.teacher)
    manifest = Manifest(
        kind=config.kind,
        teacher=teacher_identity(config.teacher),
        tokenizer=TokenizerIdentity(
            sha256=encoder.tokenizer_sha256, vocab_size=encoder.vocab_size, template_sha256=encoder.template_sha256
        ),
        image=None
        if image_spec is None
        else ImageIdentity(
            processor_sha256=image_spec.sha256,
            aspect_ratio=config.image_aspect_ratio,
            tokens_per_image=image_spec.tokens_per_image,
        ),
        dataset=DatasetIdentity(name=config.dataset.name, sha256=dataset.sha256, num_samples=len(dataset)),
        capture=CaptureSettings(
            top_k=facts.vocab_size if config.top_k == "all" else config.top_k,
            top_p=config.top_p,
            min_k=config.min_k,
            num_draws=config.num_draws,
            precision=stored_precision(config),
            images="bytes" if config.store_images else "path",
            seed=config.seed if config.num_draws or config.generate else None,
            generate=None if config.generate is None else GenerateSettings(**config.generate.model_dump()),
            score=config.score,
            max_tokens=config.max_tokens,
            on_bad_sample=config.on_bad_sample,
        ),
        engine=engine_identity(config.engine.dtype),
        samples_per_shard=config.samples_per_shard,
    )
    return CaptureJob(config, dataset, encoder, image_spec, facts, inputs.max_tokens, manifest)


def stored_precision(config: PrecomputeConfig) -> StoredPrecision:
    """How log-probs of kept entries are stored; None where entries are drawn."""
    return None if config.num_draws else config.precision or "q8"


def missing_shards(job: CaptureJob) -> list[int]:
    """Numbers of the shards that this process is to write, ascending."""
    config = job.config
    mine = range(config.node_rank, job.manifest.num_shards, config.num_nodes)
    there = sorted(set(mine) & set(published_shards(config.output)))
    with ThreadPoolExecutor(NUM_READERS) as pool:
        whole = pool.map(lambda number: is_complete(config.output, number, job.manifest), there)
        complete = {number for number, is_whole in zip(there, whole, strict=True) if is_whole}
    return [number for number in mine if number not in complete]


def check_samples(job: CaptureJob, indices: Iterable[int]) -> None:
    """Checks samples before hours are spent on the ones before them.

    Raises:
        DataError: naming the first samples that cannot be used, unless on_bad_sample is "skip".
    """
    problems: list[str] = []
    for index in indices:
        try:
            job.check(index)
        except DataError as error:
            problems.append(str(error))
    if not problems:
        return
    if job.config.on_bad_sample == "skip":
        logger.warning("%d sample(s) cannot be used and will be skipped", len(problems))
        return
    raise DataError(_list_problems(problems))


def _list_problems(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    more = len(problems) - _LISTED_PROBLEMS
    lines = [f"  {problem}" for problem in problems[:_LISTED_PROBLEMS]] + [f"  and {more} more"] * (more > 0)
    return f"{len(problems)} samples cannot be used\n" + "\n".join(lines)
