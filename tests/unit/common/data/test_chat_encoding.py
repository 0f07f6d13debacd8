import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from common.data.chat_encoding import ChatEncoder, EncodedChat, expand_placeholders, predicting_positions
from common.data.samples import IMAGE_MARKER, ImageRef, Sample, Turn
from common.errors import ConfigError, DataError, ModelError
from tests.support.models import CHAT_TEMPLATE, tiny_tokenizer

# ChatML with transformers' own markers of the assistant's text.
MARKED_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PARTS_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The form of llava-hf's 1.5 checkpoints: images first, every turn followed by a space, no end of turn.
VICUNA = (
    "{% for message in messages %}{{ message['role'] | upper + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# The form of LLaMA-2: bos before each question, eos after each answer.
LLAMA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only users and assistants') }}{% endif %}{% endfor %}"
)

CONVERSATION = (
    Turn("system", "Be brief."),
    Turn("user", "<image>\nWhat is this?"),
    Turn("assistant", "A 🐈."),
    Turn("user", "Sure?"),
    Turn("assistant", "Yes\n"),
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def encoder(model_dir: Path) -> ChatEncoder:
    return ChatEncoder.load(model_dir)


def with_template(model_dir: Path, tmp_path: Path, template: str, score: Any = "response") -> ChatEncoder:
    path = tmp_path / "template.jinja"
    path.write_text(template, "utf-8")
    return ChatEncoder.load(model_dir, path, score)


def scored_texts(encoder: ChatEncoder, encoded: EncodedChat) -> list[str]:
    return [encoder.tokenizer.decode(encoded.input_ids[start:stop]) for start, stop in encoded.spans]


def test_every_assistant_turn_is_scored_with_its_end_token_and_without_the_line_break(encoder: ChatEncoder) -> None:
    encoded = encoder.encode(CONVERSATION, 1, "here")
    assert scored_texts(encoder, encoded) == ["A 🐈.<|im_end|>", "Yes\n<|im_end|>"]
    assert encoded.input_ids.dtype == encoded.spans.dtype == encoded.response_ids.dtype == np.int32
    assert encoded.response_positions.dtype == np.int64
    assert encoded.num_images == 1
    whole = "".join(f"<|im_start|>{turn.role}\n{turn.content}<|im_end|>\n" for turn in CONVERSATION)
    assert encoder.tokenizer.decode(encoded.input_ids) == whole


def test_the_row_of_the_first_response_token_is_the_last_of_the_generation_prompt(encoder: ChatEncoder) -> None:
    encoded = encoder.encode(CONVERSATION, 1, "here")
    for start, _ in encoded.spans:
        row = int(predicting_positions(np.array([start]))[0])
        assert encoder.tokenizer.decode(encoded.input_ids[: row + 1]).endswith("<|im_start|>assistant\n")
        assert encoder.tokenizer.decode(encoded.input_ids[row + 1 :]).startswith(("A", "Yes"))
    expected = [p for start, stop in encoded.spans.tolist() for p in range(start, stop)]
    assert encoded.response_positions.tolist() == expected
    assert encoded.response_ids.tolist() == [int(encoded.input_ids[p]) for p in expected]


@st.composite
def conversations(draw: st.DrawFn) -> list[Turn]:
    """Draws one to three rounds of any text, with or without a system turn and images."""
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda s: "<" not in s)
    turns = [Turn("system", draw(text))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        question = draw(st.lists(text, min_size=1, max_size=3).map(IMAGE_MARKER.join))
        turns += [Turn("user", question), Turn("assistant", draw(text))]
    return turns


@settings(deadline=None)
@given(conversations())
def test_decoding_the_scored_ids_gives_exactly_the_assistants_texts(encoder: ChatEncoder, turns: list[Turn]) -> None:
    num_images = sum(turn.content.count(IMAGE_MARKER) for turn in turns)
    encoded = encoder.encode(turns, num_images, "here")
    answers = [turn.content + "<|im_end|>" for turn in turns if turn.role == "assistant"]
    assert scored_texts(encoder, encoded) == answers
    assert encoded.num_images == num_images


@settings(deadline=None)
@given(conversations())
def test_the_scored_tokens_are_those_that_transformers_marks(model_dir: Path, turns: list[Turn]) -> None:
    encoder = ChatEncoder.load(model_dir)
    encoder = ChatEncoder(encoder.tokenizer, "response", MARKED_CHATML)
    found = encoder.encode(turns, sum(turn.content.count(IMAGE_MARKER) for turn in turns), "here")
    truth = encoder.tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in turns],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert found.input_ids.tolist() == truth["input_ids"]
    scored = np.zeros(len(found.input_ids), int)
    scored[found.response_positions] = 1
    assert scored.tolist() == truth["assistant_masks"]


def test_all_scores_everything_but_the_first_token_and_images(model_dir: Path) -> None:
    encoded = ChatEncoder.load(model_dir, score="all").encode(CONVERSATION, 1, "here")
    expected = [p for p, i in enumerate(encoded.input_ids.tolist()) if p > 0 and i != encoded.image_token_id]
    assert encoded.response_positions.tolist() == expected
    assert len(encoded.spans) == 2


@pytest.mark.parametrize("score", ["response", "all"])
def test_of_a_pair_only_the_last_turns_are_scored(model_dir: Path, score: Any) -> None:
    encoder = ChatEncoder.load(model_dir, score=score)
    pair = (CONVERSATION, (*CONVERSATION[:-1], Turn("assistant", "No")))
    sample = Sample("p", "dpo", (ImageRef("i.png"),), pair)
    chosen, rejected = encoder.encode_sample(sample)
    assert scored_texts(encoder, chosen) == ["Yes\n<|im_end|>"]
    assert scored_texts(encoder, rejected) == ["No<|im_end|>"]
    start = chosen.spans[0, 0]
    assert chosen.input_ids[:start].tolist() == rejected.input_ids[:start].tolist()


def test_a_template_of_parts_and_one_of_strings_give_the_same_ids(
    encoder: ChatEncoder, model_dir: Path, tmp_path: Path
) -> None:
    parts = with_template(model_dir, tmp_path, PARTS_CHATML).encode(CONVERSATION, 1, "here")
    strings = encoder.encode(CONVERSATION, 1, "here")
    assert parts.input_ids.tolist() == strings.input_ids.tolist()
    assert parts.spans.tolist() == strings.spans.tolist()


def words_tokenizer(corpus: str) -> PreTrainedTokenizerFast:
    """Trains a tokenizer whose words include the space before them, as LLaMA's: "answer USER" has a token " USER"."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    backend.train_from_iterator([corpus] * 9, trainer)
    backend.add_special_tokens([AddedToken("<image>", normalized=False), AddedToken("<|end|>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_llava_hf_turns_end_before_the_token_that_begins_the_next_speaker() -> None:
    tokenizer = words_tokenizer("USER: \n what is it ASSISTANT: a cat USER: why ASSISTANT: because it is ")
    encoder = ChatEncoder(tokenizer, "response", VICUNA)
    turns = (
        Turn("user", "<image>\nwhat is it"),
        Turn("assistant", "a cat"),
        Turn("user", "why"),
        Turn("assistant", "because it is"),
    )
    encoded = encoder.encode(turns, 1, "here")
    tokens = [tokenizer.convert_ids_to_tokens(encoded.input_ids[a:b].tolist()) for a, b in encoded.spans]
    assert tokens == [["▁a", "▁cat"], ["▁because", "▁it", "▁is", "▁"]]
    text = tokenizer.decode(encoded.input_ids)
    assert text == "USER: <image>\nwhat is it ASSISTANT: a cat USER: why ASSISTANT: because it is "


def test_llama_turns_end_with_eos_and_bos_is_not_added_twice() -> None:
    tokenizer = words_tokenizer("[INST] what is it [/INST] a cat [INST] why [/INST] because it is ")
    encoder = ChatEncoder(tokenizer, "response", LLAMA)
    turns = (Turn("user", "what"), Turn("assistant", "a cat"), Turn("user", "why"), Turn("assistant", "it is"))
    encoded = encoder.encode(turns, 0, "here")
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist())
    assert tokens.count("<s>") == 2
    scored = [tokens[a:b] for a, b in encoded.spans]
    assert scored == [["▁a", "▁cat", "▁", "</s>"], ["▁it", "▁is", "▁", "</s>"]]
    with pytest.raises(DataError, match="only users and assistants"):
        encoder.encode(CONVERSATION[:3], 1, "here")


def test_an_end_token_that_the_tokenizer_does_not_name_ends_the_turn_too() -> None:
    tokenizer = words_tokenizer("what is it\n a cat user assistant ")
    template = (
        "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    encoder = ChatEncoder(tokenizer, "response", template)
    encoded = encoder.encode((Turn("user", "what"), Turn("assistant", "a cat")), 0, "here")
    assert tokenizer.convert_ids_to_tokens(encoded.response_ids.tolist()) == ["▁a", "▁cat", "<|end|>"]


@pytest.mark.parametrize("kept", ["loop.last", "loop.last or message['role'] != 'assistant'"])
def test_a_template_that_rewrites_every_prompt_leaves_nothing_to_score(
    model_dir: Path, tmp_path: Path, kept: str
) -> None:
    forgetful = CHAT_TEMPLATE.replace("message['content']", f"(message['content'] if {kept} else '…')")
    encoder = with_template(model_dir, tmp_path, forgetful)
    turns = tuple(Turn(turn.role, turn.content.replace(IMAGE_MARKER, "")) for turn in CONVERSATION)
    if "user" in kept or "assistant" in kept:
        # Only earlier responses are rewritten, so the last one is scored as it would be answered.
        assert scored_texts(encoder, encoder.encode(turns, 0, "here")) == ["Yes\n<|im_end|>"]
    else:
        with pytest.raises(DataError, match=r"here: there is nothing to score: .*rewritten by the chat template"):
            encoder.encode(turns, 0, "here")


@pytest.mark.parametrize(
    ("turns", "num_images", "found"),
    [
        (CONVERSATION, 2, "2 image.*1 image token"),
        ((Turn("user", "<image><image>"), Turn("assistant", "x")), 1, "holds 2 image token"),
        ((Turn("assistant", "Hello"), Turn("user", "Hi")), 0, "begins with an assistant turn"),
    ],
)
def test_what_cannot_be_scored_is_refused(encoder: ChatEncoder, turns: Any, num_images: int, found: str) -> None:
    with pytest.raises(DataError, match=f"sample 'x': .*{found}"):
        encoder.encode(turns, num_images, "sample 'x'")


def test_a_turn_of_which_the_template_writes_nothing_leaves_nothing_to_score(model_dir: Path, tmp_path: Path) -> None:
    bare = with_template(model_dir, tmp_path, "{% for message in messages %}{{ message['content'] }}{% endfor %}")
    with pytest.raises(DataError, match="nothing to score"):
        bare.encode((Turn("user", "Hi"), Turn("assistant", "")), 0, "here")


def test_images_need_an_image_token(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path, image_token=False)
    encoder = ChatEncoder.load(tmp_path)
    with pytest.raises(DataError, match="no <image> token"):
        encoder.encode(CONVERSATION, 1, "here")
    encoded = encoder.encode((Turn("user", "Hi"), Turn("assistant", "x")), 0, "here")
    assert encoded.image_token_id is None
    assert encoded.num_images == 0


@given(st.lists(st.integers(0, 4), max_size=20), st.sampled_from([None, 0, 3]), st.data())
def test_placeholders_expand_as_in_a_plain_loop(ids: list[int], image_id: int | None, data: st.DataObject) -> None:
    count = ids.count(-1 if image_id is None else image_id)
    images = data.draw(st.lists(st.lists(st.integers(5, 9), min_size=1, max_size=6), min_size=count, max_size=count))
    left = iter(images)
    expanded: list[int] = []
    positions, types = [], []
    for token in ids:
        new = next(left) if token == image_id else [token]
        expanded += new
        types += [each % 2 if token == image_id else 0 for each in new]
        positions.append(len(expanded) - 1)
    found = expand_placeholders(np.array(ids, np.int32), image_id, [np.array(image) for image in images])
    assert found.ids.dtype == np.int32
    assert found.positions.dtype == np.int64
    assert (found.ids.tolist(), found.positions.tolist()) == (expanded, positions)
    assert found.is_image.sum() == sum(map(len, images))
    assert found.place_types([np.array(image) % 2 for image in images]).tolist() == types
    assert not found.place_types([None] * len(images)).any()


def test_fingerprints_tell_tokenizers_and_templates_apart(model_dir: Path, tmp_path: Path) -> None:
    same = tmp_path / "same"
    tiny_tokenizer(same)
    other = tmp_path / "other"
    tiny_tokenizer(other, image_token=False)
    encoders = [ChatEncoder.load(directory) for directory in (model_dir, same, other)]
    assert encoders[0].tokenizer_sha256 == encoders[1].tokenizer_sha256 != encoders[2].tokenizer_sha256
    assert encoders[0].vocab_size == len(encoders[0].tokenizer) == encoders[2].vocab_size + 1
    templated = with_template(model_dir, tmp_path, PARTS_CHATML)
    assert templated.tokenizer_sha256 == encoders[0].tokenizer_sha256
    assert templated.template_sha256 != encoders[0].template_sha256


def test_encoding_leaves_the_fingerprint_as_it_was(model_dir: Path) -> None:
    encoder = ChatEncoder.load(model_dir)
    encoder.encode(CONVERSATION, 1, "here")
    assert ChatEncoder(encoder.tokenizer, "response", CHAT_TEMPLATE).tokenizer_sha256 == encoder.tokenizer_sha256


def test_the_template_may_stand_beside_the_tokenizer(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model_dir / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes((model_dir / "tokenizer_config.json").read_bytes())
    with pytest.raises(ConfigError, match="no chat template"):
        ChatEncoder.load(tmp_path)
    beside = tmp_path / "chat_template.json"
    beside.write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    assert ChatEncoder.load(tmp_path).template_sha256 == ChatEncoder.load(model_dir).template_sha256
    beside.write_text("{")
    with pytest.raises(ModelError, match="chat_template"):
        ChatEncoder.load(tmp_path)


def test_a_model_or_template_that_is_not_there_is_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model directory"):
        ChatEncoder.load(tmp_path / "none")
    with pytest.raises(ModelError, match=str(tmp_path)):
        ChatEncoder.load(tmp_path)
    with pytest.raises(ConfigError, match="template cannot be read"):
        ChatEncoder.load(model_dir, tmp_path / "none.jinja")


def test_a_prompt_ends_with_the_generation_prompt(encoder: ChatEncoder) -> None:
    prompt = encoder.encode_prompt(CONVERSATION[:4])
    assert prompt.dtype == np.int32
    whole = encoder.encode(CONVERSATION, 1, "here")
    assert prompt.tolist() == whole.input_ids[: whole.spans[-1, 0]].tolist()


def test_an_image_in_an_answer_is_refused(encoder: ChatEncoder) -> None:
    turns = (Turn("user", "Draw one."), Turn("assistant", "Here: <image>"))
    with pytest.raises(DataError, match="here: an assistant turn holds an <image>"):
        encoder.encode(turns, 1, "here")


def test_a_slow_tokenizer_is_refused(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.is_fast", False)
    with pytest.raises(ModelError, match=r"has no fast tokenizer \(tokenizer\.json\)"):
        ChatEncoder.load(model_dir)


def test_missing_transformers_are_named(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match="needs transformers, which is not installed"):
        ChatEncoder.load(model_dir)
