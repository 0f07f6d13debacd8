"""Tests of the order of training, of reading examples, and of outputs that are refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.data.chat_encoding import ChatEncoder, EncodedChat
from common.data.samples import Turn
from common.errors import ConfigError, DataError, ProvenanceError, ShardError
from common.shards.manifest import GenerateSettings, open_output, read_manifest, receipt_path, shard_path
from common.shards.score_shard import ScoredConversation, ShardFile, ShardRow, write_shard
from common.shards.scores import scores_from_topk
from tests.support.models import tiny_causal_lm, tiny_llava, tiny_tokenizer
from tests.support.outputs import flip_bit
from tests.support.training import LiveTeacher, write_mixed_dataset
from train.config import DataConfig, SetConfig
from train.data.sampling import GlobalBatchSampler, SampleSet, shuffled_order, split_validation
from train.data.sources import DatasetSource, ShardSource, open_source


@pytest.mark.parametrize(("num_samples", "window"), [(1, 8), (64, 1), (1000, 128), (1000, 10_000)])
def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch_alone(num_samples: int, window: int) -> None:
    order = shuffled_order(num_samples, 3, 5, window)
    assert sorted(order.tolist()) == list(range(num_samples))
    assert np.array_equal(order, shuffled_order(num_samples, 3, 5, window))
    if num_samples > 64:
        assert not np.array_equal(order, shuffled_order(num_samples, 3, 6, window))
        assert not np.array_equal(order, shuffled_order(num_samples, 4, 5, window))


def test_a_window_touches_few_row_groups() -> None:
    order = shuffled_order(64 * 100, 0, 0, 64 * 4)
    for start in range(0, len(order), 64 * 4):
        assert len({index // 64 for index in order[start : start + 64 * 4].tolist()}) <= 4


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_number_of_ranks_sees_each_sample_once_an_epoch_in_the_same_steps(num_ranks: int) -> None:
    sampler = GlobalBatchSampler(
        [SampleSet(range(100, 203))], global_batch_size=16, micro_batch_size=2, seed=1, window=32
    )
    assert sampler.steps_per_epoch == 7
    for epoch in range(2):
        seen: list[int] = []
        for step in range(epoch * 7, epoch * 7 + 7):
            in_step = [
                int(i)
                for rank in range(num_ranks)
                for position in range(8 // num_ranks)
                for i in sampler.micro_batch(step, position * num_ranks + rank)
            ]
            expected = [int(i) for number in range(8) for i in sampler.micro_batch(step, number)]
            assert sorted(in_step) == sorted(expected)
            seen += in_step
        assert sorted(seen) == list(range(100, 203))


def test_held_out_samples_are_not_trained_on() -> None:
    train, held_out = split_validation(103, 0.1)
    assert len(held_out) == 10
    assert sorted(train + held_out) == list(range(103))
    assert split_validation(5, 0.0) == ([0, 1, 2, 3, 4], [])


def test_a_fraction_that_rounds_to_nothing_holds_out_one_sample() -> None:
    train, held_out = split_validation(250, 0.002)
    assert (len(train), len(held_out)) == (249, 1)
    assert split_validation(2, 0.5) == ([1], [0])
    with pytest.raises(ConfigError, match=r"validation_fraction = 0.5: 1 of 1 sample\(s\) of the set would be"):
        split_validation(1, 0.5)


def test_empty_sets_and_uneven_batches_are_refused() -> None:
    with pytest.raises(DataError, match="no sample is left"):
        GlobalBatchSampler([SampleSet([])], 8, 2, 0, 8)
    with pytest.raises(ConfigError, match="not a multiple of micro_batch_size 3"):
        GlobalBatchSampler([SampleSet([1])], 8, 3, 0, 8)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stream")
    dataset = write_mixed_dataset(root / "data", 40)
    teacher = tiny_llava(root / "teacher", num_layers=1)
    return LiveTeacher(teacher, dataset.parent).write_output(root / "scores", dataset, "kd", top_k=4, shard=16)


def encoder(output: Path) -> ChatEncoder:
    return ChatEncoder.load(output.parent / "teacher")


def test_examples_are_read_in_dataset_order_with_their_scores(output: Path) -> None:
    source = ShardSource(output, encoder(output), "pad", cached_groups=1)
    assert [source[i].sample.id for i in range(len(source))] == [f"s{i}" for i in range(40)]
    example = source[33]
    assert example.scores is not None
    assert example.scores[0].num_rows == len(example.conversations[0].response_ids)
    assert set(example.scores[0].counts) == {4}


def test_more_shards_than_open_files_are_read(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.data.sources._MAX_OPEN_FILES", 1)
    closed: list[ShardFile] = []
    monkeypatch.setattr(ShardFile, "close", lambda file: closed.append(file))
    source = ShardSource(output, encoder(output), "pad", cached_groups=1)
    assert [source[i].sample.id for i in (0, 16, 32, 0)] == ["s0", "s16", "s32", "s0"]
    assert len(closed) == 3


def test_an_incomplete_output_is_refused_with_its_first_missing_shard(output: Path, tmp_path: Path) -> None:
    copy = copy_output(output, tmp_path / "copy")
    receipt_path(copy, 1).unlink()
    with pytest.raises(ShardError, match="1 of 3 shards are missing, the first is 00001"):
        ShardSource(copy, encoder(output), "pad", 1)


def test_a_damaged_shard_stops_training_and_is_named(output: Path, tmp_path: Path) -> None:
    copy = copy_output(output, tmp_path / "copy")
    damaged = copy / shard_path(copy, 2).name
    flip_bit(damaged, damaged.stat().st_size // 3)

    def read_all() -> None:
        source = ShardSource(copy, encoder(output), "pad", 1)
        for index in range(len(source)):
            source[index]

    with pytest.raises(ShardError, match="shard-00002"):
        read_all()


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("own_logprobs", r"shard-00001.*: sample 's17': 1 of \d+ own log-probs are not finite"),
        ("rest_mass", r"shard-00001.*: sample 's17': 1 of \d+ rest masses are not finite"),
        ("logprobs", r"shard-00001.*: sample 's17': 1 of \d+ kept log-probs are not finite"),
    ],
)
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_score_that_is_no_number_stops_training_under_every_loss(
    output: Path, column: str, message: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_group = ShardFile.read_group

    def read_with_damage(file: ShardFile, group: int) -> list[ShardRow]:
        rows = read_group(file, group)
        for row in rows:
            if row.sample.id == "s17":
                getattr(row.conversations[0].scores, column)[1] = value
        return rows

    monkeypatch.setattr(ShardFile, "read_group", read_with_damage)
    source = ShardSource(output, encoder(output), "pad", 1)
    assert source[15].sample.id == "s15"
    with pytest.raises(ShardError, match=message):
        source[16]


def test_another_tokenizer_and_another_image_treatment_are_refused_together(output: Path, tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path, image_token=False)
    with pytest.raises(ProvenanceError) as caught:
        ShardSource(output, ChatEncoder.load(tmp_path), "keep", 1)
    assert "tokenizer (SHA-256)" in str(caught.value)
    assert "(data.image_aspect_ratio): teacher 'pad', student 'keep'" in str(caught.value)


def test_another_chat_template_is_refused_at_the_first_response_that_differs(output: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    own = encoder(output).tokenizer.chat_template
    template.write_text(own.replace("message['content']", "message['content'] | replace('then', 'now')"))
    assert template.read_text() != own
    source = ShardSource(output, ChatEncoder.load(output.parent / "teacher", template), "pad", 1)
    with pytest.raises(ProvenanceError, match="use the chat template"):
        [source[i] for i in range(len(source))]


def test_shards_of_the_other_kind_are_refused(output: Path) -> None:
    with pytest.raises(ConfigError, match='holds shards of kind "kd", this objective needs "dpo"'):
        open_source(SetConfig(shards=output), "dpo", encoder(output), DataConfig(shards=output), "pad")


def copy_output(output: Path, to: Path) -> Path:
    to.mkdir()
    for path in output.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_a_text_student_reads_text_shards(tmp_path: Path) -> None:
    lines = '{"id": "a", "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y z"}]}\n'
    dataset = tmp_path / "d.jsonl"
    dataset.write_text(lines)
    model = tiny_causal_lm(tmp_path / "m", num_layers=1)
    scores = LiveTeacher(model, None).write_output(tmp_path / "s", dataset, "kd", top_k=3)
    source = ShardSource(scores, ChatEncoder.load(model), "pad", 1)
    assert source[0].scores is not None
    assert len(source) == 1


def write_generated(output: Path, to: Path, prefix: list[int] | None = None) -> Path:
    """Writes the output with two responses to each sample, whose tokens differ from those of their encoded text.

    `prefix` replaces the first tokens of the prompt.
    """
    before, own = read_manifest(output), encoder(output)
    generate = GenerateSettings(temperature=1.0, top_p=1.0, num_samples=2, max_new_tokens=8)
    manifest = before.model_copy(update={"capture": before.capture.model_copy(update={"generate": generate})})
    open_output(to, manifest)
    for shard in range(manifest.num_shards):
        rows = []
        for row in ShardFile(shard_path(output, shard), before, shard):
            for number, text in enumerate(("the digit", "a the")):
                turns = (*row.sample.conversations[0][:-1], Turn("assistant", text))
                sample = replace(row.sample, id=f"{row.sample.id}#{number}", conversations=(turns,))
                prompt = own.encode_prompt(turns[:-1])
                prompt[: len(prefix or [])] = prefix or []
                letters = own.tokenizer.convert_tokens_to_ids([*text.replace(" ", "\u0120"), "<|im_end|>"])
                ids = np.concatenate([prompt, letters]).astype(np.int32)
                encoded = EncodedChat(ids, np.array([[len(prompt), len(ids)]], np.int32), own.image_token_id)
                scores = scores_from_topk(
                    np.zeros(len(letters)), np.zeros((len(letters), 1), int), np.zeros((len(letters), 1))
                )
                rows.append(ShardRow(row.index, sample, (ScoredConversation(encoded, scores),)))
        write_shard(to, shard, manifest, rows, [])
    return to


def test_generated_responses_have_the_tokens_that_the_teacher_generated(output: Path, tmp_path: Path) -> None:
    source = ShardSource(write_generated(output, tmp_path / "generated"), encoder(output), "pad", 4)
    assert [source[i].sample.id for i in range(len(source))] == [f"s{i // 2}#{i % 2}" for i in range(80)]
    for index, text in ((0, "the digit"), (79, "a the")):
        example = source[index]
        response = example.conversations[0].response_ids
        assert encoder(output).tokenizer.decode(response) == text + "<|im_end|>"
        reencoded = encoder(output).encode_sample(example.sample)[0]
        assert len(response) == len(text) + 1
        assert len(example.conversations[0].input_ids) > len(reencoded.input_ids)


def test_a_generated_response_to_another_prompt_is_refused(output: Path, tmp_path: Path) -> None:
    source = ShardSource(write_generated(output, tmp_path / "generated", prefix=[1, 2]), encoder(output), "pad", 4)
    with pytest.raises(ProvenanceError, match=r"'s0#0'.* is not the one that the teacher answered; use the chat templ"):
        source[0]


def test_a_source_knows_if_its_entries_were_drawn(output: Path, tmp_path: Path) -> None:
    assert not ShardSource(output, encoder(output), "pad", 1).sampled
    dataset = output.parent / "data" / "kd.json"
    assert not DatasetSource(dataset, "kd", encoder(output)).sampled
    teacher = LiveTeacher(output.parent / "teacher", output.parent / "data")
    drawn = ShardSource(teacher.write_output(tmp_path / "drawn", dataset, "kd", num_draws=9), encoder(output), "pad", 1)
    assert drawn.sampled
    scores = drawn[3].scores
    assert scores is not None
    assert scores[0].draws is not None
    assert set(np.add.reduceat(scores[0].draws, np.cumsum(scores[0].counts) - scores[0].counts)) <= {7, 8, 9}
