"""Caches of trained teachers: how many bytes a token takes, how far draws are from what was said, that states are exact."""

import gzip
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llmctl.config import DistillConfig
from llmctl.distilling.settings import settle
from llmctl.distilling.teacher import Teacher, Teachers
from llmctl.distilling.teacher_cache import InOrder, Spec, fixed_batches, signals_of, states_of
from llmctl.jobs.distill_cache import encode, make_cache
from llmctl.losses.logits import logits
from llmctl.recipe import load as load_recipe

CPU = torch.device("cpu")


@pytest.fixture
def text(shared_data, tmp_path) -> Path:
    with gzip.open(shared_data / "wikitext-2" / "valid.txt.gz", "rt", encoding="utf-8") as file:
        text = "\n\n".join(line.strip() for line in file.read(40_000).splitlines() if len(line) > 100)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    return tmp_path / "text.txt"


def config_of(teacher: Path, text: Path, *settings: str) -> DistillConfig:
    given = [f"model={teacher}", f"data.paths=[{text}]", "student.shape=layers=1", "train.seq_len=128"]
    given += ["train.device=cpu", "train.dtype=float32", "data.split=blank", *settings]
    return load_recipe(DistillConfig, settings=given, environment={}).config


def job_of(config: DistillConfig, folder: Path) -> SimpleNamespace:
    config = settle(config)
    teachers = Teachers(config)
    return SimpleNamespace(teachers=teachers, data=encode(config, teachers, folder, print))


def test_bytes_of_a_token(smollm2, text, tmp_path, figure):
    text.write_text(text.read_text(encoding="utf-8")[:6_000], encoding="utf-8")
    for kind, most in (("sampled", 72), ("topk", 64 * 4 + 8)):
        config = config_of(smollm2, text, f"teacher.kind={kind}")
        store = make_cache(config, tmp_path / kind, print)
        figure("SmolLM2-135M-Instruct Q4_1", f"bytes per token, {kind}", f"{store.bytes_per_token:.1f}")
        assert store.bytes_per_token <= most


def test_states_are_exact(shared_data, text, tmp_path):
    """The teacher's own logits, bit for bit: rows keep the company in which they were written."""
    config = config_of(shared_data / "models" / "stories260K" / "hf", text, "teacher.kind=hidden")
    store = make_cache(config, tmp_path / "hidden", print)
    job = job_of(config, tmp_path / "data")
    source, teacher = InOrder(fixed_batches(job.data)), Teacher(job.teachers.original().model)
    own = teacher.dense(states_of(teacher, source.batch(range(8, 16)), CPU))
    head = store.head()
    found_ND = torch.from_numpy(store.signals(range(8, 16))["teacher_hidden"])
    size = len(found_ND), own.weight_VD.shape[0]
    expected = logits(own.hidden_ND, own.weight_VD, own.bias_V, torch.empty(size))
    assert torch.equal(logits(found_ND, head["weight"], head.get("bias"), torch.empty(size)), expected)


def test_draws_of_many_seeds_are_what_the_teacher_says(shared_data, text, tmp_path, figure):
    """The mean histogram has no bias that 256 times 32 draws could show, in the head or in the tail."""
    config = config_of(shared_data / "models" / "stories260K" / "hf", text)
    job = job_of(config, tmp_path / "data")
    teacher, vocabulary = Teacher(job.teachers.original().model), job.data.corpus.tokenizer.vocab_size
    states_LD = states_of(teacher, InOrder(fixed_batches(job.data)).batch([0]), CPU)
    own = teacher.dense(states_LD)
    p_LV = (own.hidden_ND.double() @ own.weight_VD.double().T)[:, :vocabulary].softmax(1).numpy()
    seeds, draws = 256, 32
    counts_LV = np.zeros_like(p_LV)
    for seed in range(seeds):
        packed = signals_of(teacher, states_LD, Spec(draws=draws, seed=seed), 0, vocabulary)
        places = np.repeat(np.arange(len(p_LV)), packed["n_ids"])
        np.add.at(counts_LV, (places, packed["ids"]), packed["counts"])
    n = seeds * draws
    assert (counts_LV.sum(1) == n).all()
    rank_LV = (-p_LV).argsort(1).argsort(1)
    worst = 0.0
    for low, high in ((0, 1), (1, 8), (8, 64), (64, vocabulary)):  # blocks of tokens by what the teacher thinks of them
        share_L = np.where((rank_LV >= low) & (rank_LV < high), p_LV, 0).sum(1)
        found_L = np.where((rank_LV >= low) & (rank_LV < high), counts_LV, 0).sum(1)
        z = (found_L - n * share_L).sum() / np.sqrt((n * share_L * (1 - share_L)).sum())
        worst = max(worst, abs(z))
    likely = n * p_LV > 20
    z_LV = (counts_LV - n * p_LV)[likely] / np.sqrt(n * p_LV * (1 - p_LV))[likely]
    figure("stories260K", "largest |z| of blocks of tokens, draws", f"{worst:.2f}")
    assert worst < 4
    assert (z_LV**2).mean() == pytest.approx(1, abs=0.1)
