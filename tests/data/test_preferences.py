"""Preferences are read from every usual layout, and what is none of them is named."""

import json
from pathlib import Path

import pytest

from llmctl.data.preferences import read_preferences
from llmctl.errors import UsageError

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "你好?"), ("assistant", "yes"), ("assistant", "no"))
)
SYSTEM = {"role": "system", "content": "be brief"}
TURNS = "\n\nHuman: 你好?\n\nAssistant: yes\n\nHuman: and?\n\nAssistant:"


def read(tmp_path: Path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return list(read_preferences([str(path)]))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "你好?", "chosen": "yes", "rejected": "no"},
        {"question": "你好?", "chosen": "yes", "rejected": "no"},
        {"instruction": "你好?", "input": "", "chosen": "yes", "rejected": "no"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
        {
            "conversations": [{"from": "human", "value": "你好?"}],
            "chosen": {"from": "gpt", "value": "yes"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "你好?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": "\n\nHuman: 你好?\n\nAssistant: yes", "rejected": "\n\nHuman: 你好?\n\nAssistant: no"},
    ],
)
def test_layouts_of_pairs(tmp_path, row):
    (found,) = read(tmp_path, row)
    assert [(message.role, message.content) for message in found.prompt] == [("user", "你好?")]
    assert [[(message.role, message.content) for message in answer] for answer in found.answers] == [
        [("assistant", "yes")],
        [("assistant", "no")],
    ]
    assert found.is_desirable


def test_several_turns_a_system_message_and_equal_answers(tmp_path):
    more = {"role": "user", "content": "and?"}
    rows = [
        {"chosen": [SYSTEM, USER, GOOD, more, GOOD], "rejected": [SYSTEM, USER, GOOD, more, BAD]},
        {"chosen": f"{TURNS} yes", "rejected": f"{TURNS} no", "system": "be brief"},
        {"chosen": [USER, GOOD], "rejected": [USER, GOOD]},
        {"system": "be brief", "question": "你好?", "chosen": "yes", "rejected": "no"},
    ]
    first, second, third, fourth = read(tmp_path, *rows)
    assert [message.role for message in first.prompt] == ["system", "user", "assistant", "user"]
    assert [message.role for message in second.prompt] == ["system", "user", "assistant", "user"]
    assert third.answers[0] == third.answers[1]
    assert [message.role for message in fourth.prompt] == ["system", "user"]


@pytest.mark.parametrize(("label", "expected"), [(True, True), (False, False), (1, True), ("false", False)])
def test_single_answers(tmp_path, label, expected):
    (found,) = read(tmp_path, {"prompt": "你好?", "completion": "yes", "label": label})
    assert (len(found.answers), found.is_desirable) == (1, expected)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "not both answers"),
        ({"text": "a"}, "is no preference; it has `text`"),
        ([1], "of type list"),
        ({"chosen": "b", "rejected": "c"}, "no prompt for its answers"),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, "`chosen` is int"),
        ({"prompt": "a", "chosen": [USER, GOOD, USER], "rejected": [USER, BAD]}, "does not end with one answer"),
        ({"chosen": [USER, GOOD], "rejected": [SYSTEM, BAD]}, "does not end with one answer"),
        ({"prompt": "a", "completion": "b", "label": "maybe"}, "must be true or false"),
        ({"completion": "b", "label": True}, "no `prompt`"),
        ({"prompt": "a", "chosen": [GOOD, BAD], "rejected": "c"}, "must be one answer"),
    ],
)
def test_other_rows_are_refused_by_line(tmp_path, row, message):
    with pytest.raises(UsageError, match=message) as caught:
        read(tmp_path, row)
    assert "line 1" in str(caught.value)


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="there are no preferences"):
        read(tmp_path)
