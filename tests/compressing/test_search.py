"""The search of a plan on tiny models: measurements that are kept, levers that stay, costs of a model itself."""

from dataclasses import replace
from pathlib import Path

import pytest

from llmctl.compressing.search import Search, cost_of
from llmctl.compressing.settings import check, distill_config, settle
from llmctl.config import CompressConfig
from llmctl.recipe import load
from llmctl.training.task_data import open_task_model, prepare_task

SMALL = [
    "train.seq_len=32",
    "train.steps=4",
    "plan.calibration_rows=8",
    "plan.measure_tokens=512",
    "plan.refit_tokens=256",
]


@pytest.fixture
def text(tmp_path) -> Path:
    lines = [f"the good cat {number} sat on a bad mat. User: what is the number {number * 7}?" for number in range(400)]
    path = tmp_path / "text.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def search(model: Path, text: Path, folder: Path, size: str, *settings: str) -> Search:
    flags = {"model": str(model), "size": size, "data.paths": [str(text)]}
    config = settle(load(CompressConfig, settings=[*SMALL, *settings], flags=flags, environment={}).config)
    check(config)
    base = open_task_model(config, model)
    corpus = prepare_task(config, base, folder / "data", lambda _: None)
    return Search(config, corpus, folder / "parts", lambda _: None)


@pytest.mark.parametrize("name", ["decoder", "encoder", "bert", "encoder_decoder"])
def test_a_model_costs_nothing_against_itself(models, text, tmp_path, name: str):
    found = search(models[name], text, tmp_path, "150kB", "keep=[vocabulary,depth,width]")
    measured = found.measure()
    model = found.ground.teachers.own()
    assert cost_of(found.ground, model, measured) == pytest.approx(0.0, abs=1e-6)
    assert not measured.structure
    assert list(measured.vocabulary) == [found.shape.vocab_size]


def test_measurements_and_trials_are_kept(models, text, tmp_path):
    first = search(models["decoder"], text, tmp_path, "45kB")
    measured = first.measure()
    tried = first.trials(measured)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").rglob("*.json")}
    again = search(models["decoder"], text, tmp_path, "45kB")
    assert again.measure() == measured
    assert again.trials(measured) == tried
    assert again.plans(measured)[0] == first.plans(measured)[0]
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("trial-*.json")}
    assert kept
    assert kept.items() <= written.items()


def test_the_best_trial_has_a_file_of_at_most_the_size(models, text, tmp_path):
    found = search(models["decoder"], text, tmp_path, "45kB")
    tried = found.trials(found.measure())
    assert [one.cost for one in tried] == sorted(one.cost for one in tried)
    for number in range(1, len(tried) + 1):
        assert found.file_path(number).stat().st_size <= 45_000


def test_a_trimmed_vocabulary_is_measured_on_the_same_text(models, text, tmp_path):
    found = search(models["decoder"], text, tmp_path, "45kB", "keep=[depth,width]")
    measured = found.measure()
    sizes = sorted(measured.vocabulary, reverse=True)
    assert sizes[0] == found.shape.vocab_size
    assert sizes[1] < sizes[0]
    assert measured.vocabulary[sizes[1]] == pytest.approx(0.0, abs=1e-4), (
        "only pieces that the data does not use are gone"
    )
    ground = found.ground_of(sizes[1])
    assert ground.n_labels() == found.ground.n_labels()


def test_settings_of_a_stage_are_those_of_the_run(models, text, tmp_path):
    found = search(models["decoder"], text, tmp_path, "45kB")
    config = replace(found.config, train=replace(found.config.train, batch_size=3))
    other = distill_config(config, models["decoder"])
    assert other.train.batch_size == 3
    assert other.model == str(models["decoder"])
