"""Tests of several sets in one run: their shares, their order, and combinations that are refused."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from common.data.chat_encoding import ChatEncoder
from common.errors import ConfigError, ProvenanceError
from tests.support.models import tiny_causal_lm, tiny_llava
from tests.support.training import LiveTeacher, stage, write_mixed_dataset
from train.config import DataConfig, SetConfig, TrainConfig
from train.data.collator import Collator, StudentInputs
from train.data.image_cache import ImageCache
from train.data.loader import MicroBatchDataset, MicroBatchLoader
from train.data.sampling import GlobalBatchSampler, SampleSet, samples_per_epoch
from train.data.sources import DatasetSource, MixtureSource, open_source
from train.run.run_record import RunRecord
from train.run.training_data import open_data_splits


def make_sets(sizes: list[int], weights: Sequence[float | None]) -> list[SampleSet]:
    """Returns sets whose positions follow each other."""
    starts = np.cumsum([0, *sizes])
    return [SampleSet(range(a, a + n), w) for a, n, w in zip(starts, sizes, weights, strict=False)]


def step_positions(sampler: GlobalBatchSampler, steps: range) -> list[list[int]]:
    """Returns the positions of each global step, micro-batch by micro-batch."""
    numbers = range(sampler.micro_batches_per_step)
    return [[int(i) for number in numbers for i in sampler.micro_batch(step, number)] for step in steps]


SIZES = st.lists(st.integers(1, 150), min_size=1, max_size=4)


@st.composite
def mixes(draw: Any) -> list[SampleSet]:
    sizes = draw(SIZES)
    weights = draw(st.lists(st.floats(0.2, 5.0), min_size=len(sizes), max_size=len(sizes)))
    is_weighted = draw(st.booleans()) and min(weights) * sum(sizes) / sum(weights) >= 1
    return make_sets(sizes, weights if is_weighted else [None] * len(sizes))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    mix=mixes(),
    seed=st.integers(0, 5),
    window=st.sampled_from([1, 7, 64, 1000]),
    micro=st.sampled_from([1, 2, 4]),
    num_ranks=st.sampled_from([1, 2, 4]),
    resumed_at=st.integers(0, 20),
    resumed_ranks=st.sampled_from([1, 2, 4]),
)
def test_the_order_depends_on_neither_ranks_nor_resuming(  # noqa: PLR0913, PLR0917 - one argument for each strategy
    mix: list[SampleSet], seed: int, window: int, micro: int, num_ranks: int, resumed_at: int, resumed_ranks: int
) -> None:
    whole = GlobalBatchSampler(mix, 16, 16, seed, window)
    expected = [Counter(step) for step in step_positions(whole, range(25))]

    def seen(sampler: GlobalBatchSampler, ranks: int, steps: range) -> list[Counter[int]]:
        """Returns the positions of each step, read in the order of each rank's loader."""
        accumulation = sampler.micro_batches_per_step // ranks
        found = [Counter[int]() for _ in steps]
        for rank in range(ranks):
            for counter, step in zip(found, steps, strict=True):
                for position in range(accumulation):
                    counter.update(int(i) for i in sampler.micro_batch(step, rank * accumulation + position))
        return found

    assert seen(GlobalBatchSampler(mix, 16, micro, seed, window), num_ranks, range(25)) == expected
    resumed = GlobalBatchSampler(mix, 16, 4, seed, window)
    assert seen(resumed, resumed_ranks, range(resumed_at, 25)) == expected[resumed_at:]


@settings(max_examples=60, deadline=None)
@given(mix=mixes(), seed=st.integers(0, 5), window=st.sampled_from([1, 64, 1000]))
def test_no_sample_is_repeated_before_all_others_of_its_set(mix: list[SampleSet], seed: int, window: int) -> None:
    sampler = GlobalBatchSampler(mix, 1, 1, seed, window)
    order = [position for (position,) in step_positions(sampler, range(3 * sampler.steps_per_epoch))]
    for each in mix:
        own = [position for position in order if position in each.positions]
        size = len(each.positions)
        for start in range(0, len(own), size):
            assert len(set(own[start : start + size])) == len(own[start : start + size])


@settings(max_examples=60, deadline=None)
@given(mix=mixes(), seed=st.integers(0, 5))
def test_every_stretch_of_training_holds_the_sets_by_their_shares(mix: list[SampleSet], seed: int) -> None:
    sampler = GlobalBatchSampler(mix, 1, 1, seed, 64)
    total = sum(len(each.positions) for each in mix)
    order = [position for (position,) in step_positions(sampler, range(total))]
    shares = [n / total for n in sampler.samples_per_epoch]
    for each, share in zip(mix, shares, strict=True):
        is_own = np.array([position in each.positions for position in order])
        off = np.cumsum(is_own) - share * np.arange(1, total + 1)
        # A set waits for at most one sample of each other set; between any two moments the bound is twice that.
        assert off.max() - off.min() <= 1 + len(mix) / 2


def test_weights_are_shares_and_an_epoch_has_as_many_samples_as_all_sets() -> None:
    assert samples_per_epoch([100, 20], [None, None]) == [100, 20]
    assert samples_per_epoch([100, 20], [3.0, 1.0]) == [90, 30]
    assert samples_per_epoch([100, 20], [30.0, 10.0]) == [90, 30]
    assert samples_per_epoch([5, 5, 5], [1.0, 1.0, 1.0]) == [5, 5, 5]
    assert samples_per_epoch([7, 7], [2.0, 1.0]) == [9, 5]
    sampler = GlobalBatchSampler(make_sets([100, 20], [3.0, 1.0]), 8, 4, 0, 64)
    for step in step_positions(sampler, range(15)):
        assert sum(position < 100 for position in step) == 6
    with pytest.raises(ConfigError, match=r"the weight 0\.001 of set 2 is less than one of the 120 samples"):
        samples_per_epoch([100, 20], [1.0, 0.001])


def test_epochs_continue_a_set_where_it_stood() -> None:
    sampler = GlobalBatchSampler(make_sets([90, 30], [1.0, 1.0]), 10, 10, 0, 64)
    assert sampler.samples_per_epoch == [60, 60]
    seen = Counter(
        position for step in step_positions(sampler, range(3 * sampler.steps_per_epoch)) for position in step
    )
    assert {seen[i] for i in range(90)} == {2}
    assert {seen[i] for i in range(90, 120)} == {6}


def test_ranks_read_their_own_part_of_a_window() -> None:
    sampler = GlobalBatchSampler([SampleSet(range(64 * 128))], 256, 8, 0, 64 * 64)
    groups = [{int(i) // 64 for step in range(16) for i in sampler.micro_batch(step, m)} for m in range(32)]
    # 16 x 8 samples, dealt at random, would touch 55 of the 64 groups.
    assert np.mean([len(each) for each in groups]) < 20


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixing")
    model = tiny_llava(root / "model", num_layers=1)
    for name, number in (("a", 30), ("b", 12)):
        dataset = write_mixed_dataset(root / name, number)
        teacher = LiveTeacher(model, root / name)
        teacher.write_output(root / f"{name}-k", dataset, "kd", top_k=4 if name == "a" else 6)
    teacher.write_output(root / "b-drawn", dataset, "kd", num_draws=9)
    other = tiny_causal_lm(root / "other", num_layers=1, image_token=False)
    text = root / "text.jsonl"
    text.write_text(
        '{"id": "t", "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}'
    )
    LiveTeacher(other, None).write_output(root / "text-k", text, "kd", top_k=3)
    return root


def config(outputs: Path, mix: list[dict[str, Any]], **data: Any) -> TrainConfig:
    settings = stage(
        outputs / "run", outputs / "model", data={"mix": mix, **data}, loss={"distillation": 1.0}, optim={"epochs": 2}
    )
    return TrainConfig.model_validate(settings)


def mix_both(outputs: Path, *weights: float) -> list[dict[str, Any]]:
    mix: list[dict[str, Any]] = [
        {"shards": str(outputs / f"{name}-k"), "image_root": str(outputs / name)} for name in ("a", "b")
    ]
    for each, weight in zip(mix, weights, strict=False):
        each["weight"] = weight
    return mix


def make_collator(outputs: Path) -> Collator:
    image_token_id = ChatEncoder.load(outputs / "model").image_token_id
    student = StudentInputs(ImageCache.load(outputs / "model", "pad"), image_token_id, pad_token_id=0)
    return Collator(student, kind="kd", image_root=None, max_tokens=2048)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_batches_of_two_outputs_with_other_k_and_other_image_roots(
    outputs: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    mix = config(outputs, mix_both(outputs, 1.0, 1.0))
    train = open_data_splits(mix, ChatEncoder.load(outputs / "model"), num_ranks=1).train
    source, sampler = train.source, train.sampler
    dataset = MicroBatchDataset(source, sampler, make_collator(outputs), 0, 1, accumulation=4)
    batches = list(MicroBatchLoader(dataset, range(8, 20), num_workers))
    assert len(batches) == 12
    widths = {batch.topk_ids.shape[1] for batch in batches if batch.topk_ids is not None}
    assert widths <= {4, 6} and 6 in widths
    positions = [sampler.micro_batch(*divmod(item, 4)) for item in range(8, 20)]
    assert [batch.sample_ids for batch in batches] == [
        tuple(source[int(i)].sample.id for i in micro) for micro in positions
    ]
    assert any(len(batch.images["pixel_values"]) > 1 for batch in batches)


@pytest.mark.slow
def test_a_fraction_of_each_set_is_held_out(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    mix = config(outputs, mix_both(outputs), validation_fraction=0.25)
    splits = open_data_splits(mix, ChatEncoder.load(outputs / "model"), num_ranks=1)
    assert splits.validation is not None
    sampler, validation = splits.train.sampler, splits.validation.sampler
    held_out = {i for step in step_positions(validation, range(validation.steps_per_epoch)) for i in step}
    assert [sum(i < 30 for i in held_out), sum(i >= 30 for i in held_out)] == [8, 3]
    trained = {i for step in step_positions(sampler, range(sampler.steps_per_epoch)) for i in step}
    assert not trained & held_out
    assert trained | held_out == set(range(42))


def test_best_and_drawn_entries_do_not_mix(outputs: Path) -> None:
    encoder = ChatEncoder.load(outputs / "model")
    sets = [SetConfig(shards=outputs / name) for name in ("a-k", "b-drawn")]
    sources = [open_source(each, "kd", encoder, DataConfig(mix=tuple(sets)), "pad") for each in sets]
    with pytest.raises(ConfigError, match=r"not of one kind \(set 1 best, set 2 drawn\)"):
        MixtureSource(sources, [None, None])


def test_a_set_of_another_tokenizer_is_named_and_refused(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    mix = [*mix_both(outputs), {"shards": str(outputs / "text-k")}]
    with pytest.raises(ProvenanceError, match=r"text-k: these scores do not fit this student"):
        open_data_splits(config(outputs, mix), ChatEncoder.load(outputs / "model"), num_ranks=1)


@pytest.mark.parametrize(
    ("mix", "match"),
    [
        ([{"shards": "a", "weight": 1.0}, {"shards": "b"}], "every set a weight, or none"),
        ([{"shards": "a"}, {"dataset": "b"}], "shards for every set, or dataset for every set"),
        ([{"shards": "a", "dataset": "b"}], "exactly one of shards and dataset"),
        ([{"shards": "a", "weight": 0.0}], "greater than 0"),
    ],
)
def test_a_contradictory_mix_is_refused(mix: list[dict[str, Any]], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        config(Path("x"), mix)


def test_shards_beside_a_mix_are_refused() -> None:
    with pytest.raises(ValidationError, match="exactly one of shards"):
        config(Path("x"), [{"shards": "a"}], shards="b")


def test_a_run_with_another_weight_or_other_sets_is_another_run(outputs: Path, tmp_path: Path) -> None:
    encoder = ChatEncoder.load(outputs / "model")
    before = config(outputs, mix_both(outputs, 2.0, 1.0)).model_copy(update={"output": tmp_path})
    sources = [open_source(each, "kd", encoder, before.data, "pad") for each in before.data.sets]
    source = MixtureSource(sources, [None, None])
    RunRecord.of(before, source).write(before.output)
    assert RunRecord.of(before, source).check_continuation(before) == []
    after = config(outputs, mix_both(outputs, 3.0, 1.0)).model_copy(update={"output": tmp_path})
    with pytest.raises(ProvenanceError, match=r"weight.*2\.0.*3\.0"):
        RunRecord.of(after, source).check_continuation(after)
    (change,) = RunRecord.of(before, MixtureSource(sources[::-1], [None, None])).check_continuation(before)
    assert "data_sha256" in change


def test_dataset_files_mix_without_a_teacher(outputs: Path) -> None:
    encoder = ChatEncoder.load(outputs / "model")
    sources = [DatasetSource(outputs / name / "kd.json", "kd", encoder) for name in ("a", "b")]
    source = MixtureSource(sources, [outputs / "a", outputs / "b"])
    assert len(source) == 42
    assert source[30].sample == sources[1][0].sample
    assert source[29].image_root == outputs / "a"
    assert source[30].image_root == outputs / "b"
    assert source[30].scores is None
