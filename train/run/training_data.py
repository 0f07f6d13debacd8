"""Opens the samples that a configuration names, and builds the collator that makes batches of them."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from common.data.chat_encoding import ChatEncoder
from common.data.images import AspectRatio
from common.data.model_images import ModelImages, find_model_images
from common.errors import ConfigError, DataError
from common.storage.files import Location
from train.config import DataConfig, LossConfig, SetConfig, TrainConfig
from train.data.collator import Collator, StudentInputs
from train.data.feature_source import FeatureSource
from train.data.image_cache import ImageCache
from train.data.sampling import GlobalBatchSampler, SampleSet, split_validation
from train.data.sources import ExampleSource, MixtureSource, ShardSource, open_source


@dataclass(frozen=True)
class DataSplit:
    """A source of examples, and the sampler that deals its positions to micro-batches."""

    source: ExampleSource
    sampler: GlobalBatchSampler


@dataclass(frozen=True)
class DataSplits:
    """The samples that are trained on, and the held-out ones, if any."""

    train: DataSplit
    validation: DataSplit | None


def open_data_splits(
    config: TrainConfig,
    encoder: ChatEncoder,
    num_ranks: int,
    find_skipped: Callable[[ExampleSource], frozenset[int]] = lambda _: frozenset(),
    aspect_ratio: AspectRatio | None = None,
) -> DataSplits:
    """Opens the training sets and the validation samples; `find_skipped` gives the positions that are left out.

    `aspect_ratio` is what becomes of the student's images, None if it takes none.

    Raises:
        ConfigError, DataError, ProvenanceError, ShardError, StorageError: a set cannot be read, or does not fit the
            student or the other sets.
    """
    data, optim = config.data, config.optim
    sources = [open_source(member, config.loss.sample_kind, encoder, data, aspect_ratio) for member in data.sets]
    source = MixtureSource(sources, data.images_below[:-1]) if data.mix else sources[0]
    sample_sets, held_out = _hold_out_validation(data, sources, find_skipped(source))
    sampler = GlobalBatchSampler(
        sample_sets,
        optim.global_batch_size,
        optim.micro_batch_size,
        config.seed,
        data.shuffle_window,
        _length_function(config, source),
    )
    for set_source, window in zip(sources, sampler.windows, strict=True):
        if isinstance(set_source, ShardSource):
            set_source.set_cache_window(window)
    validation = None
    if data.validation is not None:
        location = SetConfig(shards=data.validation) if data.has_scores else SetConfig(dataset=data.validation)
        validation_source = open_source(location, config.loss.sample_kind, encoder, data, aspect_ratio)
        _check_not_empty(validation_source, location.location)
        skipped = find_skipped(validation_source)
        positions = [position for position in range(len(validation_source)) if position not in skipped]
        sampler_of_all = _validation_sampler(positions, config, num_ranks)
        validation = DataSplit(validation_source, sampler_of_all)
    elif held_out:
        validation = DataSplit(source, _validation_sampler(held_out, config, num_ranks))
    return DataSplits(DataSplit(source, sampler), validation)


def choose_tail(config: TrainConfig, splits: DataSplits) -> LossConfig:
    """Returns the loss with its tail set: the configured one, or the default for the teacher's entries.

    Raises:
        ConfigError: a tail or a divergence that would bias the loss on drawn entries.
    """
    loss, data = config.loss, config.data
    if not loss.distillation:
        return loss
    train = splits.train.source
    validation = splits.validation.source if splits.validation else train
    tail = loss.tail or ("ignore" if train.sampled else "bucket")
    for sampled, name, path in (
        (train.sampled, "data.mix" if data.mix else "data.shards", data.sets[0].location),
        (validation.sampled, "data.validation", data.validation),
    ):
        if sampled and tail != "ignore":
            raise ConfigError(
                f'{path}: {name} holds ids drawn from the teacher\'s distribution, which loss.tail "{tail}" does not '
                "fit: they are not its best ones, so a bucket has no rest, and dividing by their mass would bias "
                'the loss; use tail = "ignore", whose gradient is right on average, or leave the key out'
            )
        if sampled and loss.divergence != "forward_kl":
            raise ConfigError(
                f"{path}: {name} holds ids drawn from the teacher's distribution, which give an unbiased gradient for "
                f'the forward KL alone, found loss.divergence "{loss.divergence}"; use "forward_kl"'
            )
    return loss.model_copy(update={"tail": tail})


def build_collator(
    config: TrainConfig, encoder: ChatEncoder, images: ModelImages | None, features: FeatureSource | None
) -> Collator:
    """Builds the collator of a stage, with cached features in place of images if there are any."""
    data = config.data
    source = features or (None if images is None else ImageCache(images, data.image_aspect_ratio))
    return Collator(
        StudentInputs(source, encoder.image_token_id, encoder.tokenizer.pad_token_id or 0),
        kind=config.loss.sample_kind,
        image_root=data.images_below[-1],
        max_tokens=data.max_tokens,
        packed=data.batching == "packed",
    )


def _hold_out_validation(
    data: DataConfig, sources: Sequence[ExampleSource], skipped: frozenset[int]
) -> tuple[list[SampleSet], list[int]]:
    """Returns the training samples of each set, and the held-out samples of all, as positions in the joint source.

    The `skipped` ones are in neither.
    """
    sample_sets: list[SampleSet] = []
    held_out: list[int] = []
    offset = 0
    for member, source in zip(data.sets, sources, strict=True):
        _check_not_empty(source, member.location)
        trained, validated = split_validation(len(source), data.validation_fraction, str(member.location))
        positions = [offset + position for position in trained if offset + position not in skipped]
        sample_sets.append(SampleSet(np.array(positions, np.int64), member.weight))
        held_out += [offset + position for position in validated if offset + position not in skipped]
        offset += len(source)
    return sample_sets, held_out


def _check_not_empty(source: ExampleSource, location: Location) -> None:
    if not len(source):
        raise DataError(
            f"{location}: holds no sample, expected at least one; if all were skipped, its receipts say why"
        )


def _length_function(config: TrainConfig, source: ExampleSource) -> Callable[[int], int] | None:
    """Returns the length of a sample in the student's tokens as a function of its position, if lengths are needed."""
    if not config.data.group_by_length:
        return None
    images = find_model_images(config.model.path)
    # Where the number varies, that of a small image is taken: no image is opened to sort samples by length.
    return functools.partial(source.length, tokens_per_image=1 if images is None else images.min_tokens_per_image)


def _validation_sampler(positions: list[int], config: TrainConfig, num_ranks: int) -> GlobalBatchSampler:
    micro_batch_size = config.optim.micro_batch_size
    # With a window of 1, runs of neighbours are shuffled but each is read in its order on disk.
    return GlobalBatchSampler([SampleSet(positions)], micro_batch_size * num_ranks, micro_batch_size, 0, window=1)
