"""Texts that a teacher writes: a row depends on the row alone, and a kill leaves no trace."""

import json
from pathlib import Path

import numpy as np
import pytest

from llmctl.artifacts.load import load_model
from llmctl.config import DistillConfig
from llmctl.distilling import teacher_texts
from llmctl.distilling.settings import settle
from llmctl.distilling.teacher_texts import PROMPT_TOKENS, answer, beginning, write_texts
from llmctl.recipe import load
from llmctl.training.task_data import prepare_task
from tests.jobs.test_distill import TINY, here, pairs  # noqa: F401
from tests.support.jobs import environment, finish, running, weights
from tests.support.warm import WARM

SEQ = ["loss.name=seq", "teacher.max_tokens=10", "train.seq_len=32"]


def config_of(teacher: Path, *settings: str) -> DistillConfig:
    given = [*TINY, *SEQ, f"model={teacher}", "data.paths=[text.txt]", "student.shape=layers=1", *settings]
    return settle(load(DistillConfig, settings=given, environment={}).config)


def settings_of(family: str) -> list[str]:
    return [pairs(), "task=translate", "teacher.beams=3"] if family == "encoder_decoder" else []


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "made").iterdir())}


@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_a_row_depends_on_the_row_alone(teachers, here, family):  # noqa: F811
    config = config_of(teachers[family], *settings_of(family))
    teacher = load_model(teachers[family], device="cpu", dtype="float32")
    corpus = prepare_task(config, teacher, here / "given", print)
    together = list(answer(config, teacher, corpus, corpus.train))
    assert len(together) == len(corpus.train)
    order = np.random.default_rng(0).permutation(len(corpus.train))[:7]
    assert list(answer(config, teacher, corpus, corpus.train[order])) == [together[place] for place in order]
    assert list(answer(config, teacher, corpus, corpus.train[3:4])) == together[3:4]


@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_missing_parts_are_made_and_no_others(teachers, here, monkeypatch, family):  # noqa: F811
    monkeypatch.setattr(teacher_texts, "PART_ROWS", 16)
    config = config_of(teachers[family], *settings_of(family))
    teacher = load_model(teachers[family], device="cpu", dtype="float32")
    write_texts(config, teacher, here / "texts", print)
    whole = written(here / "texts")
    assert len(whole) > 2
    first, *_, last = (here / "texts" / "made" / name for name in whole)
    first.unlink()
    last.unlink()
    said: list[str] = []
    write_texts(config, teacher, here / "texts", said.append)
    assert written(here / "texts") == whole
    assert sum("has generated" in line for line in said) == 2
    keys = {"source", "target"} if family == "encoder_decoder" else {"text"}
    rows = [json.loads(line) for data in whole.values() for line in data.decode().splitlines()]
    assert all(row.keys() == keys for row in rows)


def test_a_short_text_is_gone_on_with_and_not_followed_by_another(teachers, here):  # noqa: F811
    Path("names.txt").write_text("\n".join(f"the cat {i}" for i in range(40)), encoding="utf-8")
    config = config_of(teachers["decoder"], "data.paths=[names.txt]", "data.split=line")
    teacher = load_model(teachers["decoder"], device="cpu", dtype="float32")
    corpus = prepare_task(config, teacher, here / "given", print)
    for number, row in zip(range(20), answer(config, teacher, corpus, corpus.train[:20]), strict=True):
        document = corpus.documents.document(int(corpus.train[number])).tolist()
        assert len(document) < PROMPT_TOKENS
        assert document[-1] == teacher.tokenizer.eos_id
        assert not row["text"].startswith(f"the cat {corpus.train[number]}")


def test_the_beginning_of_a_text():
    assert beginning([2, *range(10, 100), 3], 3) == [2, *range(10, 25)]
    assert beginning([2, 10, 11, 12, 3], 3) == [2, 10]
    assert beginning([10, 3], 3) == [10]
    assert beginning([3], 3) == [3]  # nothing else is there
    assert beginning([10, 11, 12, 13], None) == [10, 11]


def test_a_kill_leaves_no_trace(teachers, here):  # noqa: F811
    """Files of rows are there whole or not at all, and what goes on makes the same of the rest and the same student."""
    rows = "\n".join(f"the good cat {i} sat on a mat and 猫坐在垫子上 while another cat sat down" for i in range(1400))
    Path("long.txt").write_text(rows, encoding="utf-8")
    settings = [*TINY, *SEQ, "student.shape=layers=1", "data.split=line", "train.steps=2"]
    flags = [part for setting in settings for part in ("--set", setting)]
    command = [*WARM, "distill", str(teachers["decoder"]), "-d", "long.txt", *flags]
    with running([*command, "-o", "whole"], [*command, "-o", "killed"], env=environment()) as (whole, killed):
        killed.wait_for("the teacher has generated")
        killed.kill()
        killed.end()
        assert whole.end() == 0, whole.err
    assert list((here / "killed").rglob("part-00000.jsonl"))
    resumed = finish([*WARM, "distill", "--resume", "killed"], env=environment())
    assert "has generated 512 of" not in resumed.err
    assert weights(here / "killed") == weights(here / "whole")
