"""Answers that a student generates in the place of those of the data."""

from dataclasses import replace

import pytest
import torch

from llmctl.artifacts.load import load_model
from llmctl.distilling.on_policy import AnswerWriter, prompts_of
from llmctl.losses.base import IGNORE


@pytest.fixture(scope="module")
def loaded(teachers):
    return load_model(teachers["decoder"], device="cpu", dtype="float32")


def conversations(loaded):
    """Return a batch with two conversations in the first row and one in the second, and their prompts."""
    prompts = [loaded.tokenizer.encode(text) for text in ("the cat sat", "a bad mat and", "the good")]
    answers = [loaded.tokenizer.encode(text) for text in ("on a mat", "cat", "bad mat")]
    rows = []
    for numbers in ((0, 1), (2,)):
        ids, labels, documents = [], [], []
        for document, number in enumerate(numbers, start=1):
            whole = [*prompts[number], *answers[number]]
            ids += whole[:-1]
            labels += [IGNORE] * (len(prompts[number]) - 1) + answers[number]
            documents += [document] * (len(whole) - 1)
        rows.append((ids, labels, documents))
    longest = max(len(ids) for ids, _, _ in rows)
    names = ("input_ids_BT", "labels", "documents_BT")
    fills = (0, IGNORE, 0)
    batch = {
        name: torch.tensor([row[place] + [fill] * (longest - len(row[place])) for row in rows])
        for place, (name, fill) in enumerate(zip(names, fills, strict=True))
    }
    return batch, prompts


def test_the_prompts_are_what_comes_before_the_last_answer(loaded):
    batch, prompts = conversations(loaded)
    assert prompts_of(batch, 100) == prompts
    assert prompts_of(batch, max(map(len, prompts)) - 1) == [
        one for one in prompts if len(one) < max(map(len, prompts))
    ]
    # Two turns: the first answer is a part of the prompt.
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    labels = torch.tensor([[IGNORE, 7, IGNORE, IGNORE, 10, 11]])
    assert prompts_of({"input_ids_BT": ids, "labels": labels}, 100) == [[5, 6, 7, 8, 9]]


def test_every_conversation_gets_an_answer_of_the_student(loaded):
    batch, prompts = conversations(loaded)
    end = loaded.tokenizer.encode("cat")[0]
    writer = AnswerWriter(1.0, 6, loaded, (end,), pad=0)
    loaded.model.train()
    found = writer.write(loaded.model, batch)
    again = writer.write(loaded.model, batch)
    assert loaded.model.training
    loaded.model.eval()
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert len(found["labels"]) == len(prompts)
    for row, prompt in enumerate(prompts):
        ids, labels, documents = (found[name][row] for name in ("input_ids_BT", "labels", "documents_BT"))
        assert ids[: len(prompt)].tolist() == prompt
        answer = labels[labels != IGNORE].tolist()
        assert (labels[: len(prompt) - 1] == IGNORE).all()
        assert 1 <= len(answer) <= 7
        assert ids[len(prompt) : int(documents.sum())].tolist() == answer[:-1]
        assert end not in answer[:-1]
        assert answer[-1] == end or len(answer) == 6
    never = replace(writer, share=0.0).write(loaded.model, batch)
    assert all(torch.equal(never[name], batch[name]) for name in batch)
