"""Conversations out of every shape that published sets have, and one clear error for what is none."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llmctl.data.conversations import Message, read_conversations
from llmctl.errors import LlmctlError, UsageError

ASKED = [Message("user", "你好 "), Message("assistant", " Hi\n")]
SYSTEM = Message("system", "Be brief.")


@pytest.fixture
def write(tmp_path) -> Callable[..., str]:
    def make(*rows: object, name: str = "rows.jsonl") -> str:
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(tmp_path / name)

    return make


def messages_of(path: str, **settings) -> list[list[Message]]:
    return [conversation.messages for conversation in read_conversations([path], **settings)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [{"role": "user", "content": "你好 "}, {"role": "assistant", "content": " Hi\n"}]}, ASKED),
        ({"conversations": [{"from": "human", "value": "你好 "}, {"from": "gpt", "value": " Hi\n"}]}, ASKED),
        ({"conversations": [{"role": "USER", "content": "你好 "}, {"role": "model", "content": " Hi\n"}]}, ASKED),
        ([{"role": "user", "content": "你好 "}, {"role": "bot", "content": " Hi\n"}], ASKED),
        ({"messages": '[{"role": "user", "content": "你好 "}, {"role": "ai", "content": " Hi\\n"}]'}, ASKED),
        ({"prompt": "你好 ", "completion": " Hi\n"}, ASKED),
        (
            {"prompt": [{"role": "user", "content": "你好 "}], "completion": " Hi\n", "system": "Be brief."},
            [SYSTEM, *ASKED],
        ),
        ({"instruction": "你好 ", "input": "", "output": " Hi\n"}, ASKED),
        ({"instruction": "你好 ", "output": " Hi\n", "system": None}, ASKED),
        (
            {"instruction": "Add", "input": "1 2", "output": "3"},
            [Message("user", "Add\n\n1 2"), Message("assistant", "3")],
        ),
        (
            {"instruction": "b", "output": "c", "history": [["你好 ", " Hi\n"]]},
            [*ASKED, Message("user", "b"), Message("assistant", "c")],
        ),
        ({"question": "你好 ", "answer": " Hi\n"}, ASKED),
        (
            {
                "messages": [
                    {"role": "developer", "content": "Be brief."},
                    {"from": "human", "value": "你好 "},
                    {"role": "assistant", "content": " Hi\n"},
                ]
            },
            [SYSTEM, *ASKED],
        ),
        (
            {
                "system": "Be brief.",
                "conversations": [{"from": "human", "value": "你好 "}, {"from": "gpt", "value": " Hi\n"}],
            },
            [SYSTEM, *ASKED],
        ),
        (
            {"messages": [{"role": "user", "content": "a\ud800"}, {"role": "assistant", "content": "b"}]},
            [Message("user", "a\ufffd"), Message("assistant", "b")],
        ),
    ],
)
def test_every_shape_is_read(write, row, expected: list[Message]):
    assert messages_of(write(json.dumps(row))) == [expected]


def test_each_instance_is_a_conversation(write):
    path = write({"instruction": "Add", "instances": [{"input": "1 2", "output": "3"}, {"input": "", "output": "?"}]})
    found = list(read_conversations([path]))
    assert [c.messages[0].content for c in found] == ["Add\n\n1 2", "Add"]
    assert found[1].where == f"`{path}` line 1 instance 2"


def test_another_field_can_be_named(write):
    row = {
        "chat": [{"role": "user", "content": "你好 "}, {"role": "assistant", "content": " Hi\n"}],
        "prompt": "x",
        "completion": "y",
    }
    assert messages_of(write(row), messages_key="chat") == [ASKED]


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.csv", 'prompt,completion\n"你好 "," Hi\n"\n'), ("a.json", '[{"prompt": "你好 ", "completion": " Hi\\n"}]')],
)
def test_tables_and_json_files(write, name: str, text: str):
    assert messages_of(write(text.rstrip("\n"), name=name)) == [ASKED]


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install pyarrow")
    import pyarrow as pa

    rows = [{"messages": [{"role": "user", "content": "你好 "}, {"role": "assistant", "content": " Hi\n"}]}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert messages_of(str(tmp_path / "a.parquet")) == [ASKED]


GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ("{oops", ["line 2 is not JSON"]),
        ("3", ["line 2 is of type int"]),
        ({"messages": []}, ["line 2", "`messages` is an empty list"]),
        ({"messages": "hi"}, ["line 2", "`messages` is text"]),
        ({"messages": None}, ["line 2", "`messages` is null"]),
        ({"messages": ["hi"]}, ["line 2", "message 1", "str"]),
        ({"messages": [{"role": "user"}]}, ["line 2", "message 1", "no `content`"]),
        ({"messages": [{"content": "a"}]}, ["line 2", "message 1", "no `role`"]),
        ({"messages": [{"role": "user", "content": None}]}, ["message 1", "`content` is null, not text"]),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, ["message 1", "`content` is list, not text"]),
        (
            {"messages": [{"role": "robot", "content": "a"}]},
            ["line 2", "message 1", "`robot`", "`assistant`", "`human`"],
        ),
        ({"messages": [{"role": 3, "content": "a"}]}, ["the unknown role `3`"]),
        ({"conversations": [{"from": "human", "text": "a"}]}, ["message 1", "no `value`", "`text`"]),
        ({"messages": [{"role": "user", "content": "a"}]}, ["line 2 has no assistant message"]),
        ({"prompt": "a"}, ["line 2 has `prompt` but no `completion`"]),
        ({"instruction": "a"}, ["line 2 has `instruction` but no `output` or `instances`"]),
        ({"instruction": "a", "instances": []}, ["line 2", "`instances` is list"]),
        ({"instruction": "a", "instances": [{"input": "b"}]}, ["line 2 instance 1", "no `output`"]),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, ["line 2", "`history`"]),
        ({"prompt": 3, "completion": "a"}, ["line 2", "`prompt` is int"]),
        ({"text": "a", "label": "b"}, ["these columns fit `--task classify`; known fields"]),
        ({"text": "a"}, ["line 2", "matches no known schema", "`text`", "`messages`"]),
        ({}, ["line 2", "no fields"]),
        (
            {"prompt": "a", "completion": "b", "question": "c", "answer": "d"},
            ["line 2", "`prompt`, `completion` or `question`, `answer`"],
        ),
        (
            {"system": "s", "messages": [{"role": "system", "content": "a"}]},
            ["line 2", "both a field `system` and a system message"],
        ),
        ({"system": 3, "prompt": "a", "completion": "b"}, ["line 2", "`system` is int"]),
    ],
)
def test_what_is_no_conversation_is_named(write, row, parts: list[str]):
    path = write(GOOD, row)
    with pytest.raises(UsageError) as caught:
        list(read_conversations([path]))
    message = f"{caught.value} {caught.value.hint}"
    assert f"`{path}`" in message
    assert caught.value.hint
    for part in parts:
        assert part in message


def test_a_missing_field_of_ones_own_is_named(write):
    with pytest.raises(UsageError, match="no field `talk`; it has `prompt`, `completion`"):
        list(read_conversations([write(GOOD)], messages_key="talk"))


def test_files_without_conversations_are_named(write, tmp_path):
    for path in (write("", name="empty.jsonl"), write("hello", name="a.txt"), str(tmp_path / "gone.jsonl")):
        with pytest.raises(LlmctlError) as caught:
            list(read_conversations([path]))
        assert f"`{path}`" in str(caught.value)


def test_stdin_is_json_lines():
    import subprocess
    import sys

    code = "from llmctl.data.conversations import *; print(list(read_conversations(['-']))[0])"
    done = subprocess.run(
        [sys.executable, "-c", code], input=b'{"prompt": "a", "completion": "b"}\n', capture_output=True, check=True
    )
    assert b"line 1" in done.stdout


def test_published_demonstrations(shared_data: Path):
    folder = shared_data / "sft-demo"
    rows = json.loads((folder / "alpaca_zh_demo.json").read_text(encoding="utf-8"))
    found = messages_of(str(folder / "alpaca_zh_demo.json"))
    assert len(found) == len(rows)
    assert [m[-1].content for m in found] == [row["output"] for row in rows]
    tasks = [json.loads(line) for line in (folder / "seed_tasks.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(messages_of(str(folder / "seed_tasks.jsonl"))) == sum(len(task["instances"]) for task in tasks)
    assert len(messages_of(str(shared_data / "gsm8k" / "train.jsonl.gz"))) == 7473


def test_what_a_message_says_beside_its_text_is_kept(write):
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "\ud800"}}}
    path = write(
        json.dumps(
            {
                "tools": json.dumps([{"name": "f"}]),
                "messages": [
                    {"role": "user", "content": "Hi", "name": None, "weight": None},
                    {"role": "assistant", "content": None, "tool_calls": [call], "weight": 1},
                    {"role": "tool", "content": "1", "tool_call_id": "x"},
                    {"role": "assistant", "content": "Hm", "weight": 0, "tool_calls": []},
                ],
            }
        )
    )
    (conversation,) = read_conversations([path])
    kept = {"type": "function", "function": {"name": "f", "arguments": {"a": "\ufffd"}}}
    assert conversation.tools == ({"name": "f"},)
    assert conversation.messages == [
        Message("user", "Hi"),
        Message("assistant", "", (("tool_calls", [kept]),)),
        Message("tool", "1", (("tool_call_id", "x"),)),
        Message("assistant", "Hm", is_trained=False),
    ]
    assert conversation.messages[1].to_dict() == {"role": "assistant", "content": "", "tool_calls": [kept]}


@pytest.mark.parametrize(
    ("change", "part"),
    [({"weight": 0.5}, "`weight` is `0.5`"), ({"content": None}, "null"), ({"tool_calls": []}, "null")],
)
def test_weights_and_texts_that_cannot_be_are_named(write, change: dict, part: str):
    answer = {"role": "assistant", "content": None if "tool_calls" in change else "Hi", **change}
    with pytest.raises(UsageError, match=f"line 1.*{part}"):
        messages_of(write({"messages": [{"role": "user", "content": "Hi"}, answer]}))
    with pytest.raises(UsageError, match="`tools` is dict, not a list"):
        messages_of(write({"tools": {"name": "f"}, "question": "a", "answer": "b"}))
