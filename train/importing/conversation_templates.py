"""Chat templates of the original code, which keeps them in Python (`conv_templates`) and not with the checkpoints.

All take message contents as text and as lists of parts. A system turn replaces the default system text.
"""

from typing import Literal, get_args

TemplateName = Literal["v1", "mistral", "phi", "stablelm", "qwen"]
TEMPLATE_NAMES: tuple[TemplateName, ...] = get_args(TemplateName)

_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# Writes a message's content; in a list of parts an image is followed by a line break, as before the question of an
# image in the original data.
_TEXT = (
    "{%- macro text(content) -%}"
    "{%- if content is string -%}{{- content -}}"
    "{%- else -%}{%- for part in content -%}"
    "{%- if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)
_SPLIT_SYSTEM = (
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{%- set system = text(messages[0]['content']) -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set system = SYSTEM -%}{%- set turns = messages -%}{%- endif -%}"
)
# The separator style TWO.
_USER_ASSISTANT = (
    "{{- BOS + system + ' ' -}}{%- for turn in turns -%}"
    "{%- if turn['role'] == 'user' -%}{{- 'USER: ' + IMAGES(text(turn['content'])) + ' ' -}}"
    "{%- else -%}{{- 'ASSISTANT: ' + text(turn['content']) + 'END' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)
# The separator style LLAMA_2 without a default system text.
_INST = (
    "{{- BOS -}}{%- for turn in turns -%}"
    "{%- set text_ = IMAGES(text(turn['content'])) -%}"
    "{%- if turn['role'] == 'user' -%}"
    "{%- if loop.first and system -%}"
    "{%- set text_ = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + text_ -%}{%- endif -%}"
    "{{- '[INST] ' + text_ + ' [/INST]' -}}"
    "{%- else -%}{{- ' ' + text_ + ' END' -}}{%- endif -%}{%- endfor -%}"
)

_STYLES: dict[TemplateName, tuple[str, str, str]] = {
    "v1": (_USER_ASSISTANT, _SYSTEM, "</s>"),
    "mistral": (_INST, "", "</s>"),
    "phi": (_USER_ASSISTANT, _SYSTEM, "<|endoftext|>"),
    "stablelm": (_USER_ASSISTANT, _SYSTEM, "<|endoftext|>"),
    "qwen": (_USER_ASSISTANT, _SYSTEM, "<|endoftext|>"),
}


def end_of_turn(name: TemplateName) -> str:
    """Returns the token that the template writes after each answer."""
    return _STYLES[name][2]


def conversation_template(name: TemplateName, *, begins_with_bos: bool, marks_images: bool = False) -> str:
    """Returns a conversation style of the original code as a Jinja template.

    Args:
        name: its name there; "mistral" is `mistral_instruct` of LLaVA 1.6, "v1" is `vicuna_v1`.
        begins_with_bos: True if the tokenizer begins a text with its BOS token.
        marks_images: True to write `<im_start>` and `<im_end>` around each image (`mm_use_im_start_end`).
    """
    style, system, end = _STYLES[name]
    marked = "(TEXT | replace('<image>', '<im_start><image><im_end>'))" if marks_images else "TEXT"
    style = style.replace("IMAGES(text(turn['content']))", marked.replace("TEXT", "text(turn['content'])"))
    quoted = system.replace("'", "\\'")
    return (
        (_TEXT + _SPLIT_SYSTEM + style)
        .replace("SYSTEM", f"'{quoted}'")
        .replace("BOS", "bos_token" if begins_with_bos else "''")
        .replace("END", end)
    )
