"""Before the engine starts: what is to be scored, whether it can be, and what is already there.

prepare ──> Job    dataset, encoder, image settings and the manifest that they and the teacher add up to
Job.check(i)       one sample encoded, everything about it checked that costs no decoding
Job.load(i)        the same with its images decoded
"""

import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from common.encoding import Encoded, Encoder
from common.errors import DataError, ModelError
from common.images import ImageSpec, load_image, require_image
from common.manifest import (
    CaptureSettings,
    DatasetIdentity,
    ImageIdentity,
    Manifest,
    Skipped,
    TokenizerIdentity,
    read_receipt,
    receipt_path,
    shard_path,
)
from common.samples import Dataset, Sample
from precompute.config import PrecomputeConfig
from precompute.identity import ModelFacts, engine_identity, teacher_identity
from precompute.scoring import ScoringPlan

logger = logging.getLogger(__name__)

_LISTED_PROBLEMS = 20


@dataclass(frozen=True)
class PreparedSample:
    """A sample whose images are decoded. `encoded` has an entry a conversation; all share `images`."""

    index: int
    sample: Sample
    encoded: tuple[Encoded, ...]
    images: tuple[Image.Image, ...]
    num_tokens: int


@dataclass(frozen=True)
class Job:
    """All that is known before the teacher starts. `max_tokens` is the configured limit or the teacher's, if less."""

    config: PrecomputeConfig
    dataset: Dataset
    encoder: Encoder
    image_spec: ImageSpec | None
    manifest: Manifest
    max_tokens: int
    # Fast tokenizers may not be called from two threads at once.
    _encoding: threading.Lock = field(default_factory=threading.Lock)

    @property
    def scoring_plan(self) -> ScoringPlan:
        """What the teacher must know."""
        spec = self.image_spec
        return ScoringPlan(
            model_dir=self.config.teacher,
            engine=self.config.engine,
            max_tokens=self.max_tokens,
            max_images=0 if spec is None else max(1, self.max_tokens // spec.tokens_per_image),
            top_k=self.manifest.capture.top_k,
            vocab_size=self.manifest.tokenizer.vocab_size,
            output_vocab_size=self.manifest.teacher.vocab_size,
        )

    def where(self, index: int) -> str:
        """How messages name a sample."""
        return f"{self.dataset.path}: sample {self.dataset.ids[index]!r}"

    def check(self, index: int) -> tuple[Sample, tuple[Encoded, ...], int]:
        """The sample, its encoded conversations, and the tokens that the teacher reads for them.

        Raises:
            DataError: malformed, nothing to score, too long, or an image that is not there.
        """
        sample = self.dataset[index]
        where = self.where(index)
        if sample.images and self.image_spec is None:
            raise DataError(f"{where}: has {len(sample.images)} image(s), but the teacher has no vision tower")
        for image in sample.images:
            require_image(image, self.config.image_root, where)
        with self._encoding:
            encoded = self.encoder.encode_sample(sample)
        added = 0 if self.image_spec is None else len(sample.images) * (self.image_spec.tokens_per_image - 1)
        lengths = [len(conversation.input_ids) + added for conversation in encoded]
        if max(lengths) > self.max_tokens:
            raise DataError(
                f"{where}: is {max(lengths):,} tokens long, images expanded; the limit is {self.max_tokens:,}; "
                'shorten it, raise max_tokens as far as the teacher allows, or set on_bad_sample = "skip"'
            )
        return sample, encoded, sum(lengths)

    def load(self, index: int) -> PreparedSample | Skipped:
        """A sample with its images decoded, or why it is left out, if the configuration allows that.

        Raises:
            DataError: the sample cannot be used and on_bad_sample is "stop".
        """
        try:
            sample, encoded, num_tokens = self.check(index)
            mean_rgb = (0, 0, 0) if self.image_spec is None else self.image_spec.mean_rgb
            images = tuple(
                load_image(image, self.config.image_root, self.config.image_aspect_ratio, mean_rgb, self.where(index))
                for image in sample.images
            )
        except DataError as error:
            if self.config.on_bad_sample == "stop":
                raise
            return Skipped(index=index, id=self.dataset.ids[index], reason=str(error))
        return PreparedSample(index, sample, encoded, images, num_tokens)


def prepare(config: PrecomputeConfig) -> Job:
    """Opens everything that a run needs but the engine, and takes the fingerprints.

    Raises:
        DataError: the dataset is unreadable, broken, empty or has duplicate ids.
        ModelError: the teacher's directory is not complete.
    """
    dataset = Dataset.open(config.dataset, config.kind)
    encoder = Encoder.load(config.teacher, config.chat_template, config.score)
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
            score=config.score,
            max_tokens=config.max_tokens,
            on_bad_sample=config.on_bad_sample,
        ),
        engine=engine_identity(config.engine.dtype),
        samples_per_shard=config.samples_per_shard,
    )
    # One token of the teacher's context goes to the one that the engine generates.
    limit = config.max_tokens if facts.context_tokens is None else min(config.max_tokens, facts.context_tokens - 1)
    return Job(config, dataset, encoder, image_spec, manifest, limit)


def is_complete(output: Path, number: int, manifest: Manifest) -> bool:
    """Whether a shard is published. One whose file is gone, or is not of the size that was written, is not.

    Raises:
        ShardError: its receipt is damaged.
    """
    if not receipt_path(output, number).exists():
        return False
    path = shard_path(output, number)
    size = read_receipt(output, number, manifest).num_bytes
    return path.is_file() and path.stat().st_size == size


def missing_shards(job: Job) -> list[int]:
    """Numbers of the shards that this process is to write, ascending."""
    config = job.config
    mine = range(config.node, job.manifest.num_shards, config.num_nodes)
    return [number for number in mine if not is_complete(config.output, number, job.manifest)]


def require_usable(job: Job, indices: Iterable[int]) -> None:
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
    raise DataError(_listing(problems))


def _listing(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    more = len(problems) - _LISTED_PROBLEMS
    lines = [f"  {problem}" for problem in problems[:_LISTED_PROBLEMS]] + [f"  and {more} more"] * (more > 0)
    return f"{len(problems)} samples cannot be used\n" + "\n".join(lines)
