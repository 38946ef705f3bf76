"""Chat templates: Jinja sources that come with a model, in the environment that they are written for.

That is the one of Hugging Face transformers: its globals, its `tojson`, its `{% generation %}` blocks, and
`tools` and `documents` always defined. Sandboxed, as models bring their own code.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]
"""One turn, as {"role": "system" | "user" | "assistant", "content": text}."""


def render(
    source: str, messages: Sequence[Message], add_generation_prompt: bool, special_tokens: Mapping[str, str]
) -> str:
    """Renders a conversation.

    Args:
        source: the template.
        messages: the turns; keys whose value is None count as absent.
        add_generation_prompt: end with what begins the assistant's next turn.
        special_tokens: text by name, such as "bos_token"; others are undefined in the template.

    Raises:
        ValueError: if there are no messages, or the template is broken or refuses them.
    """
    if not messages:
        raise ValueError("a chat template needs at least one message, got none")
    turns = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        return _compiled(source).render(
            messages=turns,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"the model's chat template refuses these messages: {error}") from error
    except Exception as error:  # a template is a program and can fail in any way
        raise ValueError(
            f"the model's chat template fails on these messages ({type(error).__name__}: {error})"
        ) from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks what the assistant wrote, for training; renders as its contents."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_contents"), [], [], body).set_lineno(line)

    @staticmethod
    def _contents(caller: jinja2.runtime.Macro) -> str:
        return caller()


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own filter escapes HTML, which templates written for transformers do not expect.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


_ENVIRONMENT = _environment()


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(source)
