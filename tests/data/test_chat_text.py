"""Templates render conversations, say what is wrong with them, and never run away or escape."""

import pickle

import pytest

from llmctl.data.chat_text import BEGIN, PLAIN_TEMPLATE, Template
from llmctl.data.conversations import Message
from llmctl.errors import UsageError

TALK = [Message("system", "用中文。"), Message("user", "诗？"), Message("assistant", "好。\n二"), Message("user", "再")]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def text_of(source: str, messages=TALK, *, asks: bool = False) -> str:
    return Template(source).render(messages, TOKENS, add_generation_prompt=asks).text


def test_the_plain_template():
    expected = "<s>用中文。\n\nUser:\n诗？\n\nAssistant:\n好。\n二</s>\n\nUser:\n再\n\n"
    assert text_of(BEGIN + PLAIN_TEMPLATE) == expected
    assert text_of(BEGIN + PLAIN_TEMPLATE, asks=True) == expected + "Assistant:\n"
    assert text_of(PLAIN_TEMPLATE, [Message("tool", "3")]) == "Tool:\n3\n\n"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% if true %}\n  {# a comment #}\n  {% set x = 1 %}\n  a\n{% endif %}\n", "  a\n"),
        ("{{ messages[1] | tojson }}", '{"role": "user", "content": "诗？"}'),
        ("{{ {'b': '<', 'a': 1} | tojson(indent=1) }}", '{\n "b": "<",\n "a": 1\n}'),
        ("{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "systemuser"),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.role }},{% endfor %}",
            "system,assistant,",
        ),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "4"),
        ("{% macro f(x) %}[{{ x ~ 1 }}]{% endmacro %}{{ f('a') }}{{ f(2) }}", "[a1][21]"),
        ("{{ messages | map(attribute='role') | join(' ') }} {{ ['a', 'b'] | join }}", "system user assistant user ab"),
        ("{{ 'a-b'.split('-')[-1] | upper }}{{ ' x ' | trim }}{{ 'aXb' | replace('X', '') }}", "Bxab"),
        ("{{ '%s:%02d' | format('a', 3) }} {{ '%s' % 3 }} {{ '{}-{}'.format('a', 2) }}", "a:03 3 a-2"),
        ("{% for m in messages[::-1] %}{{ loop.revindex0 }}{% endfor %}{{ messages | length }}", "32104"),
        ("{% if tools is none and nothing is not defined %}x{% endif %}{{ nothing }}", "x"),
        ("{{ strftime_now('%%') }}", "%"),
        ("{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}", "role=system;content=用中文。;"),
    ],
)
def test_what_templates_use(source: str, expected: str):
    assert text_of(source) == expected


def test_marked_blocks_are_told_and_leave_no_trace():
    answer = "{% generation %}{% if m.role == 'assistant' %}{{ m.content }}{% endif %}{% endgeneration %}"
    source = "{% for m in messages %}{{ m.role }}:" + answer + ";{% endfor %}"
    rendered = Template(source).render(TALK, {}, add_generation_prompt=False)
    assert rendered.text == "system:;user:;assistant:好。\n二;user:;"
    assert [rendered.text[start:end] for start, end in rendered.answers] == ["好。\n二"]


def test_a_template_goes_to_another_process():
    template = Template("{{ messages[0].role }}")
    template.render(TALK, {}, add_generation_prompt=False)
    assert pickle.loads(pickle.dumps(template)).render(TALK, {}, add_generation_prompt=False).text == "system"


DOUBLING = "{{% set ns = namespace(x='a') %}}{{% for i in range(60) %}}{} {{% endfor %}}"


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("a\n{% for %}", "line 2 is not valid Jinja"),
        ("{{" + "(" * 3000, "compiled"),
        ("{{ raise_exception('user first') }}", "rejects the conversation: user first"),
        ("{{ messages[9].role }}", "rejects the conversation"),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError"),
        ("{% include 'x' %}", "fails"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "something the sandbox forbids"),
        ("{{ messages.append(1) }}", "something the sandbox forbids"),
        ("{{ raise_exception.__globals__['os'] }}", "something the sandbox forbids"),
        ("{{ (messages | map(attribute='__class__') | list)[0].mro() }}", "something the sandbox forbids"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "takes more than 300,000 loop iterations or 0.6 seconds",
        ),
        (
            "{% for i in range(9999) %}{% for j in range(9999) if j < 0 %}{% endfor %}{% endfor %}",
            "takes more than 300,000 loop iterations or 0.6 seconds",
        ),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
            "takes more than 300,000 loop iterations or 0.6 seconds",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "RecursionError"),
        ("{{ 'x' * 10 ** 10 }}", "more than"),
        ("{{ 10 ** 10 ** 3 * 10 ** 10000000 }}", "more than"),
        (DOUBLING.format("{% set ns.x = ns.x ~ ns.x %}"), "more than"),
        (DOUBLING.format("{% set ns.x = ns.x + ns.x %}"), "more than"),
        (DOUBLING.format("{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"), "more than"),
        (DOUBLING.format("{% set ns.x = [ns.x, ns.x] | join %}"), "more than"),
        (DOUBLING.format("{% set ns.x = ns.x.replace('a', 'aa') %}"), "more than"),
        ("{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "more than"),
        ("{{ 'x' | center(10 ** 10) }}{{ messages }}", "more than"),
        ("{{ messages[0].role.ljust(10 ** 10) }}", "more than"),
        ("{{ '%9999999999d' % 3 }}", "more than"),
        ("{{ '{:9999999999}'.format(3) }}", "more than"),
        ("{{ '%*d' | format(9999999999, 3) }}", "more than"),
    ],
)
def test_broken_and_hostile_templates_are_answered(source: str, part: str):
    with pytest.raises(UsageError, match="the chat template") as caught:
        text_of(source)
    assert part in str(caught.value)
    assert caught.value.hint
