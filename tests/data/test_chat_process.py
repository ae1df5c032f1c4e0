"""A template that no count of loops or characters bounds ends in its process, and the next one renders."""

import gc
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmctl.data.chat_process import Renderer
from llmctl.data.chat_sandbox import TemplateFailureError
from llmctl.data.chat_text import PLAIN_TEMPLATE, Template
from llmctl.data.conversations import Message
from llmctl.errors import UsageError

TWICE = (
    "{% set ns = namespace(a=['x'], b=['x']) %}{% for i in range(60) %}"
    "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}"
)
GROWING = "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = SOMETHING %}{% endfor %}"
HOSTILE = {
    "comparing doubled lists": TWICE + "{{ ns.a == ns.b }}",
    "the text of one": TWICE + "{{ ns.a | tojson }}",
    "finding one": TWICE + "{{ ns.a in [ns.b] }}",
    "bytes of an integer": "{{ (1).to_bytes(9999999999, 'big') | length }}",
    "bytes": "{% set b = ('x' * 4000000).encode() %}{{ b.replace('x'.encode(), b) | length }}",
    "tabs": "{{ ('\t' * 1000000).expandtabs(4000000) | length }}",
    "percent": GROWING.replace("SOMETHING", "'%s%s' % (ns.s, ns.s)"),
    "format": GROWING.replace("SOMETHING", "'{}{}'.format(ns.s, ns.s)"),
    "translate": GROWING.replace("SOMETHING", "ns.s.translate({97: 'a' * 32})"),
    "a long wrap": "{{ ('x ' * 1000000) | wordwrap(1, true, 'y' * 3999999) | length }}",
    "sums of lists": "{{ ([[1] * 1000] * 100000) | sum(start=[]) | length }}",
    "folding while compiling": "{{ ([[1] * 99999] * 99999) | string }}",
    "kept strings": "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = [ns.x, 'a' * 3999999] %}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_counted_is_stopped(name: str):
    template = Template(HOSTILE[name])
    with pytest.raises(UsageError, match="the chat template was stopped: it takes more") as caught:
        template.render([Message("user", "x")], {}, add_generation_prompt=True)
    assert caught.value.hint


def test_the_next_rendering_has_a_new_process():
    renderer = Renderer("{% if go %}" + TWICE + "{{ ns.a == ns.b }}{% endif %}ok {{ n }}")
    assert renderer({"n": 1}) == "ok 1"
    with pytest.raises(TemplateFailureError, match="was stopped"):
        renderer({"go": True})
    assert renderer({"n": 2, "x": "\ud800"}) == "ok 2"
    assert renderer.process is not None
    os.kill(renderer.process.pid, signal.SIGKILL)
    renderer.process.wait()
    assert renderer({"n": 3}) == "ok 3"


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_threads_take_turns_and_a_fork_starts_its_own():
    renderer = Renderer("{{ n }}")
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(renderer, [{"n": n} for n in range(200)])) == [str(n) for n in range(200)]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, renderer({"n": "from the fork"}).encode())
        del renderer
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 100) == b"from the fork"
    os.close(reading)
    os.close(writing)
    assert renderer({"n": 5}) == "5"


def test_a_process_ends_with_its_template():
    renderer = Renderer("x")
    renderer({})
    process = renderer.process
    assert process is not None
    del renderer
    gc.collect()
    assert process.poll() is not None


def test_the_process_has_no_secrets_and_writes_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("API_KEY", "secret")
    monkeypatch.setenv("PYTHONSTARTUP", str(tmp_path / "x"))
    renderer = Renderer("{{ n }}")
    renderer({"n": 0})
    assert renderer.process is not None
    proc = Path("/proc", str(renderer.process.pid))
    assert b"secret" not in (proc / "environ").read_bytes()
    limits = {line[:25].strip(): line[25:].split()[0] for line in (proc / "limits").read_text().splitlines()}
    assert limits["Max file size"] == "0"
    assert limits["Max address space"] != "unlimited"


def test_our_own_template_needs_no_process():
    template = Template(PLAIN_TEMPLATE)
    template.render([Message("user", "x")], {"eos_token": ""}, add_generation_prompt=True)
    assert not isinstance(template._render, Renderer)


@pytest.mark.parametrize("value", [json.loads('"\\ud800"'), float("nan"), {"a": [1, None]}, "\n\r\u2028", 10**300])
def test_values_arrive_as_they_are(value):
    in_process = Template(PLAIN_TEMPLATE)  # the same sandbox
    assert in_process.source
    from llmctl.data.chat_sandbox import compiled

    source = "{{ x }}|{{ x | tojson }}"
    assert Renderer(source)({"x": value}) == compiled(source)({"x": value})
