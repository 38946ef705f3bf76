"""The environment of templates; expected renderings are those of transformers 5.24."""

import re

import pytest

from retro_jax.models.chat_template import render

HI = [{"role": "user", "content": "Hi <b>"}]
TALK = [*HI, {"role": "assistant", "content": "Ho"}]


@pytest.mark.parametrize(
    ("source", "rendered"),
    [
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}[{{ m.content }}]"
            "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
            "Hi <b>[Ho]",
        ),
        (
            "{% for m in messages %}\n{%- generation -%}  {{ m.role }}  {%- endgeneration -%}\n{% endfor %}",
            "userassistant",
        ),
        ("{{ tools is none }} {{ documents is none }} {{ xml_tools is defined }}", "True True False"),
        ("{{ bos_token + pad_token }} {{ unk_token is defined }}", "<s><p> False"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "Hi <b>"}'),
        ("{{ {'b': 'é', 'a': 1} | tojson(sort_keys=true, separators=(',', ':')) }}", '{"a":1,"b":"é"}'),
        ("{{ {'a': 'é'} | tojson(ensure_ascii=true, indent=1) }}", '{\n "a": "\\u00e9"\n}'),
        ("{% for m in messages %}{{ m.role }}{% break %}{% endfor %}", "user"),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
         "assistant"),
        ("  {% if true %}\na\n  {% endif %}\nb", "a\nb"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = 2 %}{% endfor %}{{ ns.n }}",
         "2"),
        ("{{ add_generation_prompt }}", "True"),
    ],
)  # fmt: skip
def test_what_templates_are_written_for(source, rendered):
    assert render(source, TALK, True, {"bos_token": "<s>", "pad_token": "<p>"}) == rendered


def test_the_date():
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", render("{{ strftime_now('%Y-%m-%d') }}", HI, True, {}))


def test_keys_without_a_value_are_absent():
    turn = {"role": "user", "content": "Hi", "tool_calls": None}
    assert render("{{ 'tool_calls' in messages[0] }}", [turn], True, {}) == "False"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no pirates') }}", "refuses these messages: no pirates"),
        ("{% for %}", "refuses these messages"),
        ("{{ bos_token + 'x' }}", "refuses these messages: 'bos_token' is undefined"),
        ("{{ messages[0].content + 1 }}", "fails on these messages .TypeError: can only concatenate str"),
        ("{{ 1 // 0 }}", "fails on these messages .ZeroDivisionError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "access to attribute '__class__'.* is unsafe"),
        ("{{ messages.append(1) }}", "refuses these messages"),
    ],
)
def test_failures_are_one_error_in_words(source, message):
    with pytest.raises(ValueError, match=message):
        render(source, HI, True, {})


def test_a_conversation_without_messages():
    with pytest.raises(ValueError, match="at least one message, got none"):
        render("", [], True, {})
