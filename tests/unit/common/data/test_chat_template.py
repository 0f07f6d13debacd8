"""Chat templates of the kinds that models ship: what is scored under each, and which are warned of or refused."""

import datetime
import logging
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders
from transformers.utils.chat_template_utils import render_jinja_template

from common.data import chat_template
from common.data.chat_encoding import ChatEncoder, EncodedChat, tokenizer_sha256
from common.data.chat_template import ChatTemplate, Span, describe_template
from common.data.samples import IMAGE_MARKER, Turn
from common.errors import ConfigError, DataError
from tests.support.models import tiny_tokenizer

CHATML_TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PARTS = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role.upper() + ': ' }}{% endif %}"
    "{% for c in m.content %}{% if c.type == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text END }}{% endif %}{% endfor %}ENDTURN{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML_TURNS,
    "begin of text": "{{ '<|endoftext|>' }}" + CHATML_TURNS,
    "date": "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHATML_TURNS,
    "default system": (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
        + CHATML_TURNS
    ),
    "generation marks": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llava 1.5": PARTS.replace("END }}", "+ ' ' }}").replace("ENDTURN", ""),
    "llava 1.5 with eos": PARTS.replace("END }}", "}}").replace(
        "ENDTURN", "{% if m.role == 'assistant' %}{{ eos_token }}{% else %}{{ ' ' }}{% endif %}"
    ),
    "no generation prompt": CHATML_TURNS.partition("{% if add_generation_prompt")[0],
    "plain": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<image>' }}{% else %}{{ m.content + '\n' }}{% endif %}"
        "{% endfor %}"
    ),
    "plain with eos": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<image>' }}{% else %}{{ m.content + '<|im_end|>' }}"
        "{% endif %}{% endfor %}"
    ),
    "end of turn but the last": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% if not loop.last %}"
        "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_end|>\n<|im_start|>assistant\n' }}{% endif %}"
    ),
    # As Qwen3's: reasoning stays in the last response alone, which has an empty block where it has none.
    "reasoning is removed": (
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% set c = m.content %}"
        "{% set r = '' %}{% if m.role == 'assistant' and '</think>' in c %}"
        "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or r) %}"
        "{{ '<|im_start|>assistant\n<think>\n' + r + '\n</think>\n\n' + c + '<|im_end|>\n' }}{% else %}"
        "{{ '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "numbered": (
        "{% for m in messages %}{{ loop.index ~ ' <|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ (messages|length + 1) ~ ' <|im_start|>assistant\n' }}{% endif %}"
    ),
}
END = "<|im_end|>"
TURNS = (
    Turn("user", "<image>\nc?"),
    Turn("assistant", "Red."),
    Turn("user", "sure?"),
    Turn("assistant", "<think>\nhm\n</think>\n\nYes."),
)
SCORED = {
    "llava 1.5": [" Red. ", " <think>\nhm\n</think>\n\nYes. "],
    "llava 1.5 with eos": [f" Red.{END}", f" <think>\nhm\n</think>\n\nYes.{END}"],
    "no generation prompt": [
        f"<|im_start|>assistant\nRed.{END}",
        f"<|im_start|>assistant\n<think>\nhm\n</think>\n\nYes.{END}",
    ],
    "plain": ["Red.\n", "<think>\nhm\n</think>\n\nYes.\n"],
    "end of turn but the last": ["Red.", "<think>\nhm\n</think>\n\nYes."],
    "reasoning is removed": [f"<think>\nhm\n</think>\n\nYes.{END}"],
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    found = ChatEncoder.load(model_dir).tokenizer
    found.eos_token = END
    return found


def scored_texts(encoder: ChatEncoder, encoded: EncodedChat) -> list[str]:
    return [encoder.tokenizer.decode(encoded.input_ids[start:stop]) for start, stop in encoded.spans]


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_scored(tokenizer: Any, name: str) -> None:
    encoder = ChatEncoder(tokenizer, "response", TEMPLATES[name])
    turns = TURNS if name not in ("plain", "plain with eos") else TURNS[:2]
    expected = SCORED.get(name, [f"Red.{END}", f"<think>\nhm\n</think>\n\nYes.{END}"])[: len(turns)]
    encoded = encoder.encode(turns, 1, "here")
    assert scored_texts(encoder, encoded) == expected[: 1 if len(turns) == 2 else 2]
    # Each scored token follows what the model sees when it answers.
    for start, _ in encoded.spans.tolist():
        before = encoder.tokenizer.decode(encoded.input_ids[:start])
        prompts = [encoder.template.render(turns[:n], "here", generation_prompt=True) for n in (1, 3)]
        assert before in prompts


def test_a_template_that_drops_images_refuses_samples_with_images(tokenizer: Any) -> None:
    encoder = ChatEncoder(tokenizer, "response", CHATML_TURNS.replace("m.content", "m.content.replace('<image>','')"))
    with pytest.raises(DataError, match=r"1 image.*0 image token.*the chat template drops or repeats some"):
        encoder.encode(TURNS, 1, "here")


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_last_response_alone_is_scored_where_that_is_asked_for(tokenizer: Any, name: str) -> None:
    turns = TURNS if name not in ("plain", "plain with eos") else TURNS[:2]
    every, last = (ChatEncoder(tokenizer, score, TEMPLATES[name]) for score in ("response", "last"))
    expected = scored_texts(every, every.encode(turns, 1, "here"))[-1:]
    assert scored_texts(last, last.encode(turns, 1, "here")) == expected
    with pytest.raises(DataError, match="there is nothing to score"):
        last.encode((*turns[:-1], Turn("assistant", "Yes.", scored=False)), 1, "here")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_turn_that_is_flagged_is_read_and_not_scored(tokenizer: Any, name: str) -> None:
    if name in ("plain", "plain with eos"):
        return
    flagged = (TURNS[0], Turn("assistant", "Red.", scored=False), *TURNS[2:])
    encoder = ChatEncoder(tokenizer, "response", TEMPLATES[name])
    plain, found = encoder.encode(TURNS, 1, "here"), encoder.encode(flagged, 1, "here")
    assert found.input_ids.tolist() == plain.input_ids.tolist()
    assert found.spans.tolist() == plain.spans.tolist()[-1:]
    everything = ChatEncoder(tokenizer, "all", TEMPLATES[name])
    if name == "reasoning is removed":
        with pytest.raises(DataError, match="rewrites an assistant turn that is flagged as not scored"):
            everything.encode(flagged, 1, "here")
        return
    left_out = set(everything.encode(TURNS, 1, "here").response_positions.tolist())
    left_out -= set(everything.encode(flagged, 1, "here").response_positions.tolist())
    assert left_out == set(range(*plain.spans[0].tolist()))


def test_responses_that_are_left_out_are_said_once(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    encoder = ChatEncoder(tokenizer, "response", TEMPLATES["reasoning is removed"])
    with caplog.at_level(logging.INFO, "common"):
        for _ in range(3):
            encoder.encode(TURNS, 1, "here")
    assert [message.partition(";")[0] for message in caplog.messages] == [
        "the chat template rewrites earlier turns when later ones are added"
    ]


def test_a_date_is_the_one_that_is_given(tokenizer: Any) -> None:
    encoder = ChatEncoder(tokenizer, "response", TEMPLATES["date"], datetime.date(2024, 7, 26))
    assert "Today is 26 Jul 2024" in encoder.template.render(TURNS, "here")
    assert encoder.with_date(None) is encoder.with_date(datetime.date(2024, 7, 26)) is encoder
    other = encoder.with_date(datetime.date(2025, 1, 2))
    assert "Today is 02 Jan 2025" in other.template.render(TURNS, "here")
    assert other.template_sha256 == encoder.template_sha256
    assert "Today is 26 Jul 2024" in encoder.template.render(TURNS, "here")
    today = ChatTemplate(tokenizer, TEMPLATES["date"]).date
    assert today is not None
    assert abs((today - datetime.datetime.now(datetime.UTC).date()).days) <= 1
    assert ChatTemplate(tokenizer, TEMPLATES["chatml"], datetime.date(2024, 7, 26)).date is None


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_without_an_end_or_a_beginning_are_known(tokenizer: Any, name: str) -> None:
    template = ChatTemplate(tokenizer, TEMPLATES[name])
    assert template.ends_turns == (name not in ("llava 1.5", "plain", "end of turn but the last"))
    # The plain ones write nothing before a response that could be scored with it.
    assert template.has_generation_prompt == (name != "no generation prompt")
    found = describe_template(template.ends_turns, template.has_generation_prompt)
    assert any("does not learn to stop" in line for line in found) != template.ends_turns
    assert any("learns to write that too" in line for line in found) != template.has_generation_prompt


def test_what_a_template_does_not_mark_ends_no_turn(tokenizer: Any) -> None:
    marks = TEMPLATES["generation marks"]
    unmarked = marks.replace(" + '<|im_end|>' }}{% endgeneration %}", " }}{% endgeneration %}{{ '<|im_end|>' }}")
    encoder = ChatEncoder(tokenizer, "response", unmarked)
    assert scored_texts(encoder, encoder.encode(TURNS[:2], 1, "here")) == ["Red."]
    assert (encoder.template.ends_turns, ChatTemplate(tokenizer, marks).ends_turns) == (False, True)


def test_marks_are_those_of_transformers_and_refused_where_transformers_misplaces_them(tokenizer: Any) -> None:
    marks = TEMPLATES["generation marks"]
    turns = [
        Turn("user", "a"),
        Turn("assistant", END),
        Turn("assistant", ""),
        Turn("user", "b"),
        Turn("assistant", "c"),
    ]
    text, spans = ChatTemplate(tokenizer, marks).find_responses(turns, "here")
    (truth,), (truth_spans,) = render_jinja_template(
        [[{"role": turn.role, "content": turn.content} for turn in turns]],
        chat_template=marks,
        return_assistant_tokens_mask=True,
    )
    assert (text, spans) == (truth, truth_spans)
    start, stop = "{% for m in messages %}", "{% endfor %}"
    body = marks.partition(start)[2].partition(stop)[0]
    macro = f"{{% macro say(m) %}}{body}{{% endmacro %}}{start}{{{{ say(m) }}}}{stop}"
    with pytest.raises(DataError, match="here: the chat template marks responses inside a macro"):
        ChatTemplate(tokenizer, macro).find_responses(turns, "here")


def test_flags_decide_also_where_a_conversation_begins_with_an_answer(tokenizer: Any) -> None:
    turns = (Turn("assistant", "Hello", scored=False), Turn("user", "Hi"), Turn("assistant", "Yes."))
    for score in ("response", "last", "all"):
        encoder = ChatEncoder(tokenizer, score, CHATML_TURNS)
        found = scored_texts(encoder, encoder.encode(turns, 0, "here"))
        assert not any("Hello" in text for text in found)
        assert found[-1].startswith("Yes." if score != "all" else "\n<|im_start|>user")
        unscored = (turns[0], turns[1], Turn("assistant", "Yes.", scored=False))
        with pytest.raises(DataError, match="here: there is nothing to score: every assistant turn is flagged"):
            encoder.encode(unscored, 0, "here")


def test_a_prompt_has_its_images_and_errors_its_sample(tokenizer: Any) -> None:
    encoder = ChatEncoder(tokenizer, "response", CHATML_TURNS.replace("m.content", "m.content.replace('<image>','')"))
    assert len(encoder.encode_prompt(TURNS[:1]))
    with pytest.raises(DataError, match=r"here: 1 image.*0 image token.*the chat template drops or repeats some"):
        encoder.encode_prompt(TURNS[:1], 1, "here")
    with pytest.raises(DataError, match="here: the chat template refuses this conversation"):
        ChatEncoder(tokenizer, "response", "{{ raise_exception('no') }}").encode_prompt(TURNS[:1], 1, "here")


def test_a_template_in_another_encoding_is_refused(model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_bytes("é".encode("utf-16"))
    with pytest.raises(ConfigError, match="the chat template is not UTF-8"):
        ChatEncoder.load(model_dir, path)


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor", r"cannot be compiled \(line 1: unexpected"),
        ("\n{{ 'a' + }}", r"cannot be compiled \(line 2: "),
        ("{% endgeneration %}", "cannot be compiled"),
    ],
)
def test_a_template_that_cannot_be_compiled_is_refused_with_its_file(
    model_dir: Path, tmp_path: Path, template: str, found: str
) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(template)
    with pytest.raises(ConfigError, match=f"{path}: the chat template {found}"):
        ChatEncoder.load(model_dir, path)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content.nothing() }}", "has no attribute 'nothing'"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_whatever_a_template_raises_refuses_the_conversation(tokenizer: Any, body: str, found: str) -> None:
    encoder = ChatEncoder(tokenizer, "response", CHATML_TURNS + body)
    with pytest.raises(DataError, match=f"here: the chat template refuses this conversation .*{found}"):
        encoder.encode(TURNS, 1, "here")


_PIECES = (
    "",
    " ",
    "\n",
    "a",
    "Red.",
    END,
    "<|im_start|>assistant\n",
    "ASSISTANT:",
    "<think>\nx\n</think>\n\n",
    "🐈 é",
    "{{ x }}",
)


@st.composite
def conversations(draw: st.DrawFn) -> list[Turn]:
    """Draws conversations whose texts hold pieces of templates, with one or several turns of a speaker in a row."""
    text = st.lists(st.sampled_from(_PIECES), max_size=3).map("".join)
    turns = [Turn("system", draw(text))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(2, 5))):
        turns += [Turn("user", draw(text)) for _ in range(draw(st.integers(1, 2)))]
        turns += [Turn("assistant", draw(text)) for _ in range(draw(st.integers(1, 2)))]
    return turns + [Turn("user", draw(text))] * draw(st.integers(0, 1))


@pytest.mark.parametrize("name", [name for name in TEMPLATES if "generation marks" not in name])
@settings(deadline=None, max_examples=12)
@given(turns=conversations())
def test_long_conversations_have_the_same_responses_as_by_whole_renderings(
    tokenizer: Any, name: str, turns: list[Turn]
) -> None:
    template = ChatTemplate(tokenizer, TEMPLATES[name])

    def find(limit: int) -> list[Span | None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chat_template, "_MAX_WHOLE_RENDERINGS", limit)
            return template.find_responses(turns, "here")[1]

    assert find(0) == find(1000)


@pytest.mark.parametrize(
    ("name", "score", "num_spans"), [("chatml", "response", 2000), ("reasoning is removed", "last", 1)]
)
def test_thousands_of_turns_take_time_in_proportion(tokenizer: Any, name: str, score: Any, num_spans: int) -> None:
    encoder = ChatEncoder(tokenizer, score, TEMPLATES[name])
    turns = [Turn("user", "Why?"), Turn("assistant", "So.")] * 2000
    renderings = 0
    apply = tokenizer.apply_chat_template

    def count(messages: list[Any], **options: Any) -> str:
        nonlocal renderings
        renderings += len(messages)
        return str(apply(messages, **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "apply_chat_template", count, raising=False)
        start = time.process_time()
        encoded = encoder.encode(turns, 0, "here")
    assert len(encoded.spans) == num_spans
    # Before, 8 million messages were rendered.
    assert renderings < 10 * len(turns)
    assert time.process_time() - start < 5


def test_the_fingerprint_covers_what_changes_ids(model_dir: Path, tmp_path: Path) -> None:
    encoder = ChatEncoder.load(model_dir)
    used, digest = encoder.tokenizer, encoder.tokenizer_sha256
    used(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_sha256(used) == digest
    used.save_pretrained(tmp_path)
    assert ChatEncoder.load(tmp_path).tokenizer_sha256 == digest
    from tokenizers.processors import TemplateProcessing

    used.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert tokenizer_sha256(used) == digest
    used.backend_tokenizer.decoder = decoders.Fuse()
    used.add_tokens([AddedToken("<|im_end|>", special=False, normalized=False)])
    assert tokenizer_sha256(used) == digest
    used.split_special_tokens = True
    assert tokenizer_sha256(used) != digest
    used.split_special_tokens = False
    used.add_tokens(["another"])
    assert tokenizer_sha256(used) != digest


def test_markers_in_parts_and_strings_give_one_image_each(tokenizer: Any) -> None:
    turns = (Turn("user", f"{IMAGE_MARKER}\nA {IMAGE_MARKER} B"), Turn("assistant", "x"))
    for name in ("chatml", "llava 1.5"):
        assert ChatEncoder(tokenizer, "response", TEMPLATES[name]).encode(turns, 2, "here").num_images == 2
