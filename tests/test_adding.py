"""To add a thing, touch one place: a row of every table is added, and runs from the command line.

`TO_ADD` is printed in the README.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from llmctl.cli import COMMANDS, run
from llmctl.commands.common import command_app, result
from llmctl.data import tables as data_tables
from llmctl.families import table as families
from llmctl.families.rows import only
from llmctl.losses import divergences
from llmctl.model import presets
from llmctl.quant import methods
from llmctl.quant.schemes import SCHEMES, Scheme
from llmctl.tables.losses import DIVERGENCES, DivergenceRow
from llmctl.tables.methods import METHODS, MethodRow
from llmctl.tables.objectives import OBJECTIVES
from llmctl.tables.optimizers import OPTIMIZERS, SCHEDULES, OptimizerRow
from llmctl.tables.tasks import TASKS
from llmctl.training import batches, optim

README = Path(__file__).resolve().parents[1] / "README.md"
TO_ADD = {
    "a preset": "a row in `model/presets.py`",
    "a pretraining objective": "a row in `tables/objectives.py`, its batches in `training/batches.py`",
    "a task": "a row in `tables/tasks.py`; functions only where the row names new ones",
    "an optimizer or schedule": "a row in `tables/optimizers.py`, its function in `training/optim.py`",
    "a distillation loss": "a row in `tables/losses.py`, its function in `losses/divergences.py`",
    "a quantization method": "a row in `tables/methods.py`, its function in `quant/methods.py`",
    "a quantization scheme": "a row in `quant/schemes.py`",
    "a data file format": "a function and a row in `data/tables.py`",
    "a model family": "a file in `families/`, a row in its `table.py`",
    "a command": "a file in `commands/`, a row in `cli.py`",
}
SMALL = ["--set", "train.seq_len=32", "--set", "data.split=blank", "--steps", "3", "-q"]
TINY = ["--set", "model.d_model=32", "--set", "model.n_layers=2", "--set", "model.n_heads=2"]


def to_add() -> str:
    """Return the table as the README shows it."""
    return "\n".join(
        ["| to add | touch |", "|---|---|", *(f"| {thing} | {place} |" for thing, place in TO_ADD.items())]
    )


def test_the_readme_shows_what_to_touch():
    assert to_add() in README.read_text(encoding="utf-8"), to_add()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("\n\n".join(f"the cat {i} sat on the mat. 猫" * 3 for i in range(60)), encoding="utf-8")
    Path("pairs.tsv").write_text("".join(f"the cat {i}\tcat {i} good\n" for i in range(60)), encoding="utf-8")
    return tmp_path


@pytest.fixture
def call(capsys) -> Callable[..., str]:
    """Return what runs a command line and returns its stdout."""

    def call(*arguments: object) -> str:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return call


def refused(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert run([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def test_a_preset(call, monkeypatch):
    monkeypatch.setitem(presets._ROWS, "dummy", replace(presets.PRESETS["tiny"], summary="x"))
    assert "dummy" in call("presets")
    assert call("pretrain", "text.txt", "--model", "dummy", *TINY, *SMALL)


def test_an_objective(call, capsys, monkeypatch):
    assert "`clm`" in refused(capsys, "pretrain", "text.txt", "--objective", "dummy", *SMALL)
    monkeypatch.setitem(OBJECTIVES, "dummy", replace(OBJECTIVES["clm"], batches="dummy_batches", default_steps=2))
    monkeypatch.setattr(batches, "dummy_batches", batches.causal, raising=False)
    folder = call("pretrain", "text.txt", "--objective", "dummy", *TINY, *SMALL).strip()
    assert json.loads((Path(folder) / "run.json").read_text())["objective"] == "dummy"
    assert "dummy" in call("pretrain", "--print-config")


def test_a_task(call, models, monkeypatch):
    monkeypatch.setitem(TASKS, "dummy", replace(TASKS["summarize"], template="{source} =>", source_template="{source}"))
    for family in ("decoder", "encoder_decoder"):
        call("finetune", models[family], "pairs.tsv", "--task", "dummy", "-o", family, *SMALL)
        figures = json.loads(
            call(
                "evaluate",
                family,
                "-d",
                "pairs.tsv",
                "--task",
                "dummy",
                "--limit",
                2,
                "--max-tokens",
                8,
                "--json",
                "-q",
            )
        )
        assert {"rouge_l", "chrf"} <= figures["models"][0]["figures"].keys()


def test_an_optimizer_and_a_schedule(call, monkeypatch):
    def dummy(groups, config, dtype):
        return optim.adamw(groups, replace(config, lr=config.lr / 2), dtype)

    monkeypatch.setattr(optim, "dummy", dummy, raising=False)
    monkeypatch.setattr(optim, "dummy_schedule", lambda *_: 0.5, raising=False)
    row = OptimizerRow("half of adamw", "here", "dummy", OPTIMIZERS["adamw"].state, 2)
    monkeypatch.setitem(OPTIMIZERS, "dummy", row)
    monkeypatch.setitem(SCHEDULES, "dummy_schedule", "half")
    names = ["--set", "optim.name=dummy", "--set", "optim.schedule=dummy_schedule", "--set", "train.save_every=1"]
    assert call("pretrain", "text.txt", *TINY, *SMALL, *names)


def test_a_distillation_loss(call, models, monkeypatch):
    monkeypatch.setitem(DIVERGENCES, "dummy", DivergenceRow("dummy_kl", "forward KL again", "here"))
    monkeypatch.setattr(divergences, "dummy_kl", divergences.forward_kl, raising=False)
    options = ["-d", "text.txt", "--student", "layers=1", *SMALL]
    folder = call("distill", models["decoder"], "--loss", "dummy", *options).strip()
    same = call("distill", models["decoder"], "--loss", "fkl", *options).strip()
    reports = [json.loads((Path(each) / "report.json").read_text()) for each in (folder, same)]
    assert reports[0]["models"]["student"]["loss"] == reports[1]["models"]["student"]["loss"]


def test_a_quantization_method(call, models, monkeypatch):
    monkeypatch.setitem(METHODS, "dummy", MethodRow("dummy_codes", "nearest again", "here"))
    monkeypatch.setattr(methods, "dummy_codes", methods.nearest, raising=False)
    options = ["--bits", 8, "-d", "text.txt", "--set", "train.seq_len=32", "--set", "data.split=blank", "-q"]
    ours, same = (call("quantize", models["decoder"], "--method", m, *options).strip() for m in ("dummy", "nearest"))
    report, other = (json.loads((Path(each) / "report.json").read_text()) for each in (ours, same))
    assert report["method"] == "dummy"
    assert report["models"]["after"]["loss"] == other["models"]["after"]["loss"]


def test_a_quantization_scheme(call, models, monkeypatch):
    monkeypatch.setitem(SCHEMES, "dummy", Scheme(5, 16, symmetric=False))
    options = ["-d", "text.txt", "--set", "train.seq_len=32", "--set", "data.split=blank", "-q"]
    folder = call("quantize", models["decoder"], "--scheme", "dummy", *options).strip()
    assert call("generate", "-m", folder, "-t", 0, "-n", 3, "the cat")
    call("finetune", models["decoder"], "text.txt", "--task", "text", "--qat", "dummy", *SMALL)


def test_a_model_family(call, monkeypatch):
    rows = (*families.LLAMA.rows, only("dummy", 1, 1))
    dummy = replace(families.LLAMA, architecture="DummyForCausalLM", model_type="dummy", rows=rows)
    monkeypatch.setattr(families, "PUBLISHED", (dummy, *families.PUBLISHED))
    monkeypatch.setitem(families.FAMILIES, dummy.architecture, dummy)
    folder = call("pretrain", "text.txt", *TINY, *SMALL).strip()
    values = json.loads((Path(folder) / "config.json").read_text())
    assert (values["architectures"], values["model_type"]) == (["DummyForCausalLM"], "dummy")
    assert call("generate", "the cat", "--model", folder, "--max-tokens", 2, "-q")
    small = call("distill", folder, "-d", "text.txt", "--student", "layers=1", *SMALL).strip()
    assert json.loads((Path(small) / "config.json").read_text())["model_type"] == "dummy"
    monkeypatch.undo()
    assert (
        run(["generate", "the cat", "--model", str(Path(folder).resolve())]) != 0
    )  # and without its row it is unknown


def test_a_command(call, monkeypatch):
    module = ModuleType("llmctl.commands.dummy")
    module.app = command_app()

    @module.app.command()
    def dummy(text: str) -> int:
        """Print a text."""
        result(text)
        return 0

    monkeypatch.setitem(sys.modules, "llmctl.commands.dummy", module)
    monkeypatch.setitem(COMMANDS, "dummy", "Print a text.")
    assert call("dummy", "猫") == "猫\n"
    assert "Print a text." in call("--help")


def test_a_data_file_format(call, monkeypatch):
    def rows(name):
        for number, line in enumerate(Path(name).read_text(encoding="utf-8").split("\n\n"), start=1):
            yield f"`{name}` part {number}", {"text": line}

    monkeypatch.setattr(data_tables, "ROW_READERS", {**data_tables.ROW_READERS, ".dummy": rows})
    Path("text.txt").rename("text.dummy")
    assert call("pretrain", "text.dummy", *TINY, *SMALL)
