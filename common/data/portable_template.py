"""Chat templates that take a message's content as a string and as a list of parts.

A language model's template joins strings. Programs that talk to a model of images (transformers' pipelines, OpenAI's
API) hand it lists of parts instead. Jinja code before the template turns these into strings, with the image's
placeholder where an image stands, so that the template itself stays as it was.
"""

from typing import Any

_START = "{#- Content may be a string, or a list of parts of text and images. -#}\n"

# A line break follows a placeholder unless it is the last part, as in LLaVA's data. The empty expression at the end
# keeps Jinja from trimming the beginning of the template.
_PREAMBLE = (
    _START
    + """{%- set given = namespace(messages=[], text='') -%}
{%- for message in messages -%}
{%- if message['content'] is string or message['content'] is none or message['content'] is not defined -%}
{%- set given.messages = given.messages + [message] -%}
{%- else -%}
{%- set given.text = '' -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}
{%- set given.text = given.text + part['text'] -%}
{%- elif part['type'] in ('image', 'image_url') -%}
{%- set given.text = given.text + PLACEHOLDER + ('' if loop.last else '\\n') -%}
{%- else -%}
{{- raise_exception('this model takes text and images, not ' + part['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- set given.messages = given.messages + [dict(message, content=given.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = given.messages -%}
{{- '' }}"""
)


def make_portable(template: str, placeholder: str) -> str:
    """Returns a template that takes strings and parts, of one that takes strings; a portable one stays as it is."""
    return template if template.startswith(_START) else _PREAMBLE.replace("PLACEHOLDER", repr(placeholder)) + template


def original_template(template: str) -> str:
    """Returns the template that `make_portable` was given, or any other one as it is.

    Captures and training render this one, so that a template has one fingerprint, whether it was made portable or not.
    """
    if not template.startswith(_START):
        return template
    return template.partition("{{- '' }}")[2]


def find_problem(tokenizer: Any, template: str, placeholder: str) -> str | None:
    """Returns why a portable template does not render as the original one, in which strings have the placeholder.

    Returns:
        None if it renders strings and parts as that one renders strings.
    """
    answer = {"role": "assistant", "content": "A dog."}
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    strings = [{"role": "user", "content": f"{placeholder}\nWhat is it?"}, answer]
    listed = [{"role": "user", "content": parts}, {**answer, "content": [{"type": "text", "text": "A dog."}]}]

    def render(text: str, messages: list[dict[str, Any]]) -> str:
        tokenizer.chat_template = text
        return str(tokenizer.apply_chat_template(messages, tokenize=False))

    before = tokenizer.chat_template
    try:
        expected = render(original_template(template), strings)
        for messages in (strings, listed):
            if (found := render(template, messages)) != expected:
                return f"it renders {found!r} in place of {expected!r}"
    except Exception as error:  # noqa: BLE001 - a template may raise anything
        return f"{type(error).__name__}: {error}"
    finally:
        tokenizer.chat_template = before
    return None
