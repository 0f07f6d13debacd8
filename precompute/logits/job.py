"""The job of a capture before the engine starts: its inputs, its manifest, and the shards that are missing.

open_inputs ─> CaptureInputs    dataset, encoder, image settings; weight files may be missing
    .load_encoded(i)            one sample encoded and checked, except for what needs its images decoded
    .find_probes()              the first samples with images, on which the engine's reading of them is checked
prepare_job ─> CaptureJob       the inputs, and the manifest, which also needs the teacher's weights
    .with_image_bytes(i, s)     the sample with its image files, if shards are to hold them
    .load_images(i, s)          a sample's images, as the teacher is to see them
"""

import contextlib
import datetime
import logging
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from common.data.bad_samples import check_skipped_share, list_problems
from common.data.chat_encoding import ChatEncoder, EncodedChat
from common.data.chat_template import TemplateRefusalError, describe_template
from common.data.dataset import Dataset
from common.data.images import AspectRatio, load_image, read_image
from common.data.model_images import (
    LlavaImages,
    ModelImages,
    count_image_tokens,
    describe_aspect_ratio,
    find_model_images,
    find_placeholder,
)
from common.data.samples import ImageRef, Sample, without_last_response
from common.errors import ConfigError, DataError, ModelError, ShardError
from common.shards.manifest import (
    NUM_RECEIPT_READERS,
    CaptureSettings,
    DatasetIdentity,
    GenerateSettings,
    ImageIdentity,
    Manifest,
    SkippedSample,
    TokenizerIdentity,
    is_complete,
    published_shards,
    read_manifest,
    read_receipts,
)
from common.shards.quantization import StoredPrecision
from precompute.config import PrecomputeConfig
from precompute.fingerprints import ModelFacts, find_engine_identity, read_teacher_identity
from precompute.scorer import ScoreRequest, ScorerSettings

logger = logging.getLogger(__name__)

# The started teacher is checked on the first sample with one image and the first with several of so many samples.
_NUM_PROBED = 1000
_NUM_PROBES = 2


@dataclass(frozen=True)
class EncodedSample:
    """Sample `index` of the dataset in tokens.

    `encoded` has an entry for each conversation, `image_tokens` the number of tokens of each image for the teacher.
    """

    index: int
    sample: Sample
    encoded: tuple[EncodedChat, ...]
    image_tokens: tuple[int, ...]

    @property
    def lengths(self) -> list[int]:
        """Returns the number of tokens of each conversation, images expanded."""
        added = sum(self.image_tokens) - len(self.image_tokens)
        return [len(conversation.input_ids) + added for conversation in self.encoded]

    @property
    def num_tokens(self) -> int:
        """Returns the number of tokens that the teacher reads for all conversations."""
        return sum(self.lengths)


@dataclass(frozen=True)
class CaptureInputs:
    """Dataset, encoder and image treatment of a capture.

    `max_tokens` is the configured limit, or the teacher's if that is less.
    """

    config: PrecomputeConfig
    dataset: Dataset
    encoder: ChatEncoder
    images: ModelImages | None
    facts: ModelFacts
    max_tokens: int
    # Held while encoding, because fast tokenizers may not be called from two threads at once.
    _encoder_lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def where(self, index: int) -> str:
        """Returns the name of a sample for messages."""
        return self.dataset.where(index)

    @property
    def aspect_ratio(self) -> AspectRatio:
        """Returns the configured choice, or the teacher's own."""
        return self.config.image_aspect_ratio or (self.images.default_aspect_ratio if self.images else "pad")

    def load_encoded(self, index: int) -> EncodedSample:
        """Returns a sample with its encoded conversations.

        Raises:
            DataError: the sample is malformed, too long or has nothing to score, or an image is not there.
        """
        sample = self.dataset[index]
        where = self.where(index)
        image_tokens = tuple(self._count_image_tokens(image, where) for image in sample.images)
        with self._encoder_lock:
            encoded = self._encode_prompt(sample) if self.config.generate else self.encoder.encode_sample(sample)
        found = EncodedSample(index, sample, encoded, image_tokens)
        # A response that is yet to be generated needs room for at least one token.
        needed = max(found.lengths) + (self.config.generate is not None)
        if needed > self.max_tokens:
            raise DataError(
                f"{where}: needs {needed:,} tokens, images expanded; the limit is {self.max_tokens:,}; "
                'shorten it, raise max_tokens as far as the teacher allows, or set on_bad_sample = "skip"'
            )
        return found

    def _count_image_tokens(self, image: ImageRef, where: str) -> int:
        """Returns the number of tokens of an image for the teacher. Raises DataError, as `check_image`."""
        if self.images is None:
            raise DataError(f"{where}: has image {image}, but the teacher has no vision tower")
        return count_image_tokens(self.images, image, self.config.images_below, self.aspect_ratio, where)

    def _encode_prompt(self, sample: Sample) -> tuple[EncodedChat, ...]:
        """Returns the prompt that the teacher is to answer, without a scored token."""
        turns = without_last_response(sample.conversations[0])
        ids = self.encoder.encode_prompt(turns, len(sample.images), f"sample {sample.id!r}")
        return (EncodedChat(ids, np.zeros((0, 2), np.int32), self.encoder.image_token_id),)

    def decode_text(self, ids: npt.NDArray[np.int32]) -> str:
        """Decodes ids, without special tokens."""
        with self._encoder_lock:
            return str(self.encoder.tokenizer.decode(ids, skip_special_tokens=True))


@dataclass(frozen=True)
class CaptureJob(CaptureInputs):
    """Inputs of a capture with the manifest of its output: all that is known before the teacher starts."""

    manifest: Manifest

    @property
    def scorer_settings(self) -> ScorerSettings:
        """Settings that the teacher starts with."""
        capture = self.manifest.capture
        return ScorerSettings(
            model_dir=self.config.teacher,
            engine=self.config.engine,
            max_tokens=self.max_tokens,
            max_images=0 if self.images is None else max(1, self.max_tokens // self.images.min_tokens_per_image),
            top_k=capture.top_k,
            top_p=capture.top_p,
            min_k=capture.min_k,
            num_draws=capture.num_draws,
            seed=capture.seed or 0,
            generate=self.config.generate,
            node_rank=self.config.node_rank,
            vocab_size=self.manifest.tokenizer.vocab_size,
            output_vocab_size=self.manifest.teacher.vocab_size,
            probes=self.find_probes(),
        )

    def find_probes(self) -> tuple[ScoreRequest, ...]:
        """Returns the first usable conversation with one image and the first with several, of the first samples."""
        found: dict[bool, ScoreRequest] = {}
        for index in range(min(len(self.dataset), _NUM_PROBED) if self.images is not None else 0):
            with contextlib.suppress(DataError):
                sample = self.dataset[index]
                if not sample.images or (len(sample.images) > 1) in found:
                    continue
                encoded = self.load_encoded(index).encoded[0]
                images = self.load_images(index, sample)
                found[len(images) > 1] = ScoreRequest((index, 0), sample.id, encoded, images, self.where(index))
            if len(found) == _NUM_PROBES:
                break
        return tuple(found.values())

    def load_images(self, index: int, sample: Sample) -> tuple[Image.Image, ...]:
        """Returns the images of a sample as the teacher is to see them.

        Raises:
            DataError: an image is unreadable or too large.
        """
        mean_rgb = (0, 0, 0) if self.images is None else self.images.mean_rgb
        return tuple(
            load_image(image, self.config.images_below, self.aspect_ratio, mean_rgb, self.where(index))
            for image in sample.images
        )

    def with_image_bytes(self, index: int, sample: Sample) -> Sample:
        """Returns the sample, with the bytes of its image files if shards are to hold them.

        Raises:
            DataError: a file cannot be read.
        """
        if not self.config.store_images:
            return sample
        files = [read_image(image, self.config.images_below, self.where(index)) for image in sample.images]
        return replace(sample, images=tuple(files))

    def skip_or_raise(self, index: int, error: DataError) -> SkippedSample:
        """Returns the entry of a sample that cannot be used, or raises `error` if the configuration says "stop"."""
        if self.config.on_bad_sample == "stop":
            raise error
        return SkippedSample(index=index, id=self.dataset.ids[index], reason=str(error))


def open_inputs(config: PrecomputeConfig) -> CaptureInputs:
    """Opens the dataset and the teacher's configuration, tokenizer and image processor.

    Raises:
        DataError: the dataset is unreadable, broken, empty or has duplicate ids.
        ModelError: one of the teacher's files is missing, or they contradict each other.
        ConfigError: `top_k` exceeds the number of the tokenizer's ids.
    """
    dataset = Dataset.open(config.dataset, config.kind, config.ids)
    facts = ModelFacts.load(config.teacher)
    images = find_model_images(config.teacher)
    date = _template_date(config)
    encoder = ChatEncoder.load(config.teacher, config.chat_template, config.score, date, find_placeholder(images))
    ends_turns = encoder.template.ends_turns or config.generate is not None
    for line in describe_template(ends_turns, encoder.template.has_generation_prompt):
        logger.warning("%s: %s", config.chat_template or config.teacher, line)
    if isinstance(images, LlavaImages) and images.image_token_id != encoder.image_token_id:
        raise ModelError(
            f"{config.teacher}: config.json says image token {images.image_token_id}, the tokenizer says "
            f"{encoder.image_token_id}; expected a llava-hf layout, in which they agree"
        )
    if encoder.vocab_size > facts.vocab_size:
        raise ModelError(
            f"{config.teacher}: the tokenizer has {encoder.vocab_size} tokens, the output layer {facts.vocab_size} rows"
        )
    if config.top_k != "all" and config.top_k > encoder.vocab_size:
        raise ConfigError(
            f"top_k = {config.top_k} exceeds the {encoder.vocab_size} entries of the teacher's vocabulary; "
            'give "all" to keep every one'
        )
    # The engine generates at least one token, which takes one place of the teacher's context.
    limit = config.max_tokens if facts.context_tokens is None else min(config.max_tokens, facts.context_tokens - 1)
    inputs = CaptureInputs(config, dataset, encoder, images, facts, limit)
    if images is not None:
        logger.info("%s: %s", config.teacher, describe_aspect_ratio(images, inputs.aspect_ratio))
    return inputs


def _template_date(config: PrecomputeConfig) -> datetime.date | None:
    """Returns the date that the chat template is to show: the configured one, or that of the output; None for today."""
    stored = config.chat_template_date
    # A broken manifest is reported where the output is opened.
    with contextlib.suppress(ShardError):
        stored = stored or read_manifest(config.output).tokenizer.template_date
    return None if stored is None else datetime.date.fromisoformat(stored)


def prepare_job(config: PrecomputeConfig) -> CaptureJob:
    """Opens everything that a run needs except the engine, and computes the fingerprints.

    Raises:
        DataError: the dataset is unreadable, broken, empty or has duplicate ids.
        ModelError: the teacher's directory is not complete.
        ConfigError: `top_k` exceeds the number of the tokenizer's ids.
    """
    inputs = open_inputs(config)
    dataset, encoder, images = inputs.dataset, inputs.encoder, inputs.images
    logger.info("taking the fingerprint of %s", config.teacher)
    manifest = Manifest(
        kind=config.kind,
        teacher=read_teacher_identity(config.teacher),
        tokenizer=TokenizerIdentity(
            sha256=encoder.tokenizer_sha256,
            vocab_size=encoder.vocab_size,
            template_sha256=encoder.template_sha256,
            template_date=None if encoder.template.date is None else encoder.template.date.isoformat(),
            ends_turns=encoder.template.ends_turns,
            has_generation_prompt=encoder.template.has_generation_prompt,
        ),
        image=None
        if images is None
        else ImageIdentity(
            processor_sha256=images.sha256,
            aspect_ratio=inputs.aspect_ratio,
            tokens_per_image=images.tokens_per_image,
        ),
        dataset=DatasetIdentity(name=config.dataset.name, sha256=dataset.sha256, num_samples=len(dataset)),
        capture=CaptureSettings(
            top_k=encoder.vocab_size if config.top_k == "all" else config.top_k,
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
        engine=find_engine_identity(config.engine.dtype),
        samples_per_shard=config.samples_per_shard,
    )
    return CaptureJob(config, dataset, encoder, images, inputs.facts, inputs.max_tokens, manifest)


def stored_precision(config: PrecomputeConfig) -> StoredPrecision:
    """Returns the form in which log-probs of kept entries are stored; None where entries are drawn."""
    return None if config.num_draws else config.precision or "q8"


def missing_shards(job: CaptureJob) -> list[int]:
    """Returns the numbers of the shards that this process is to write, ascending."""
    config = job.config
    own = range(config.node_rank, job.manifest.num_shards, config.num_nodes)
    published = sorted(set(own) & set(published_shards(config.output)))
    with ThreadPoolExecutor(NUM_RECEIPT_READERS) as pool:
        results = pool.map(lambda number: is_complete(config.output, number, job.manifest), published)
        complete = {number for number, result in zip(published, results, strict=True) if result}
    return [number for number in own if number not in complete]


def check_samples(job: CaptureJob, indices: Iterable[int]) -> None:
    """Checks samples, so that a bad one is found before the teacher has worked for hours.

    Raises:
        ConfigError: the chat template refuses every sample of the dataset.
        DataError: names the first samples that cannot be used; if on_bad_sample is "skip", only if they and the samples
            that complete shards skip are more than `max_skipped` allows.
    """
    problems: list[str] = []
    num_refused = num_checked = 0
    for index in indices:
        num_checked += 1
        try:
            job.load_encoded(index)
        except DataError as error:
            problems.append(str(error))
            num_refused += isinstance(error, TemplateRefusalError)
    if not problems:
        return
    # The samples that a continuation still has to score may be just the few that do not fit the template.
    if num_refused == num_checked == len(job.dataset):
        raise ConfigError(f"the chat template refuses every sample, such as: {problems[0]}")
    if job.config.on_bad_sample == "skip":
        skipped = [
            entry.reason for receipt in read_receipts(job.config.output, job.manifest) for entry in receipt.skipped
        ]
        check_skipped_share([*problems, *skipped], len(job.dataset), job.config.max_skipped)
        logger.warning("%d sample(s) cannot be used and will be skipped", len(problems))
        return
    raise DataError(list_problems(problems))
