"""Training end to end, every objective: it learns, it repeats byte for byte, and what it leaves opens everywhere."""

import json
import os
import shutil
import signal
import subprocess
import time
from io import TextIOWrapper
from pathlib import Path

import pytest
import torch

from llmctl.artifacts.load import load_model
from llmctl.cli import run as command_line
from llmctl.config import PretrainConfig
from llmctl.errors import ArtifactError, InterruptedRunError, LlmctlError, UsageError
from llmctl.formats.artifact import read_artifact
from llmctl.inference.encoding import encode_prompt
from llmctl.inference.generate import Prompt, generate
from llmctl.jobs.begin import begin
from llmctl.jobs.finish import Trained
from llmctl.jobs.resume import resume
from llmctl.recipe import load
from llmctl.runs.folder import find_run
from llmctl.runs.metrics_file import MetricsFile
from llmctl.runs.progress import Silent
from tests.support.jobs import finish, running
from tests.support.warm import WARM

SMALL = [
    "model.d_model=32",
    "model.n_layers=2",
    "model.n_heads=2",
    "train.seq_len=32",
    "train.batch_size=8",
    "train.steps=12",
    "train.eval_every=6",
    "train.dtype=float32",
    "train.device=cpu",
    "tokenizer.vocab_size=340",
]


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(
            f"the cat {number} sat on the mat. 猫坐在垫子上。\n" * 3, encoding="utf-8"
        )
    return folder


@pytest.fixture
def pairs(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"one {n} two\ttwo {n} one\n" for n in range(60)))
    return path


def run(data: Path, *settings: str, out: Path | None = None) -> Trained:
    resolved = load(PretrainConfig, settings=[*SMALL, f"data.paths=[{data}]", *settings], environment={})
    trained = begin(
        "pretrain", resolved.config, resolved.origins, invocation="llmctl pretrain ...", out=out, quiet=True
    )
    assert trained is not None
    return trained


@pytest.mark.parametrize(
    ("objective", "architecture"),
    [("clm", "LlamaForCausalLM"), ("mlm", "EuroBertForMaskedLM"), ("span", "T5ForConditionalGeneration")],
)
def test_every_objective_learns_and_leaves_a_model(corpus, objective: str, architecture: str):
    trained = run(corpus, f"objective={objective}")
    before, after = trained.summary["before"], trained.summary["after"]
    assert after["bits_per_byte"] < before["bits_per_byte"]
    assert read_artifact(trained.path).architecture == architecture
    left = {path.name for path in trained.path.iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "README.md",
        "loss.svg",
        "metrics.jsonl",
        "samples.jsonl",
        "recipe.yaml",
        "run.json",
    } <= left
    assert "data" not in left
    assert json.loads((trained.path / "run.json").read_text())["status"] == "finished"
    assert (trained.path.parent / "latest").resolve() == trained.path.resolve()
    lines = [json.loads(line) for line in (trained.path / "metrics.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"train", "eval"}
    card = (trained.path / "README.md").read_text(encoding="utf-8")
    assert f"{after['bits_per_byte']:.3f}" in card
    loaded = load_model(trained.path)
    assert loaded.tokenizer is not None


def test_a_model_says_nothing_of_the_folders_it_was_made_in(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "elsewhere" / "texts")
    made = []
    for folder in (corpus, tmp_path / "elsewhere" / "texts"):
        config = load(PretrainConfig, settings=[*SMALL, f"data.paths=[{folder}]"], environment={}).config
        trained = begin(
            "pretrain", config, invocation=f"llmctl pretrain {folder} --set data.paths={folder}", quiet=True
        )
        assert trained is not None
        card = (trained.path / "README.md").read_text(encoding="utf-8")
        assert "llmctl pretrain texts --set data.paths=texts" in card
        assert str(tmp_path) not in card
        made.append((trained.path / "model.safetensors").read_bytes())
    assert str(tmp_path).encode() not in made[0]
    assert made[0] == made[1]


def test_pairs_train_an_encoder_decoder(pairs):
    trained = run(pairs, "objective=seq2seq")
    assert trained.summary["after"]["loss"] < trained.summary["before"]["loss"]
    loaded = load_model(trained.path)
    prompt = Prompt(0, encode_prompt(loaded, "one 3 two"))
    from llmctl.config import GenerateConfig

    assert next(generate(loaded, [prompt], GenerateConfig(max_tokens=5, temperature=0))).ids


@pytest.mark.parametrize("preset", ["gpt2", "bert-base", "bart-base", "transformer-base"])
def test_published_families_train_from_scratch_and_are_written_as_such(corpus, pairs, preset: str):
    small = ["model.d_ff=64", "model.max_positions=64", f"model.preset={preset}"]
    if preset in ("bart-base", "transformer-base"):
        trained = run(pairs, *small, "model.n_decoder_layers=2", "objective=seq2seq")
    else:
        trained = run(corpus, *small, "objective=mlm" if "bert" in preset else "objective=clm")
    names = {
        "gpt2": "GPT2LMHeadModel",
        "bert-base": "BertForMaskedLM",
        "bart-base": "BartForConditionalGeneration",
        "transformer-base": "MarianMTModel",
    }
    assert read_artifact(trained.path).architecture == names[preset]
    assert trained.summary["after"]["loss"] < trained.summary["before"]["loss"]


def test_the_same_recipe_and_seed_give_the_same_bytes(corpus):
    first, second = run(corpus), run(corpus)
    assert first.path != second.path
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes(), name
    other = run(corpus, "train.seed=1")
    assert (other.path / "model.safetensors").read_bytes() != (first.path / "model.safetensors").read_bytes()


def test_a_copy_of_the_one_file_is_the_whole_model(corpus, tmp_path):
    out = tmp_path / "student.safetensors"
    trained = run(corpus, out=out)
    assert trained.path == out
    alone = tmp_path / "elsewhere" / "teacher.safetensors"
    alone.parent.mkdir()
    alone.write_bytes(out.read_bytes())
    loaded = load_model(alone)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("猫")) == "猫"


def test_the_recipe_of_a_run_makes_the_run_again(corpus):
    first = run(corpus)
    resolved = load(PretrainConfig, recipe=str(first.path / "recipe.yaml"), environment={})
    second = begin("pretrain", resolved.config, resolved.origins, quiet=True)
    assert (first.path / "model.safetensors").read_bytes() == (second.path / "model.safetensors").read_bytes()


def test_training_goes_on_from_a_model(corpus):
    first = run(corpus)
    second = run(corpus, f"model.preset={first.path}", "train.steps=3")
    assert second.summary["before"]["loss"] == pytest.approx(first.summary["after"]["loss"], rel=1e-4)


def test_characters_and_the_tail_of_one_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "".join(f"{n} times hello. " for n in range(400))
    (tmp_path / "a.txt").write_text(text)
    trained = run(tmp_path / "a.txt", "tokenizer.model_type=char", "data.val_frac=0.1")
    # the held-out tail and the end token, each predicted once; the first character has nothing before it but <s>
    assert trained.summary["after"]["n_bytes"] == round(0.1 * len(text))
    assert trained.summary["after"]["n_labels"] == round(0.1 * len(text)) + 1


def test_a_pipe_is_read_once_and_trains_like_its_file(corpus, tmp_path, monkeypatch, capsys):
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir()))
    (tmp_path / "all.txt").write_text(text, encoding="utf-8")
    settings = [part for setting in SMALL for part in ("--set", setting)]
    paths = []
    for source in ("all.txt", "<(cat all.txt)", "-"):
        with subprocess.Popen(["cat", "all.txt"], stdout=subprocess.PIPE) as cat:
            assert cat.stdout is not None
            monkeypatch.setattr("sys.stdin", TextIOWrapper(cat.stdout))
            pipe = f"/dev/fd/{cat.stdout.fileno()}"  # what bash puts for <(...)
            assert command_line(["pretrain", "-q", *settings, pipe if source.startswith("<") else source]) == 0
        paths.append(Path(capsys.readouterr().out.strip()))
    weights = [read_artifact(path).state() for path in paths]
    for other in weights[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in weights[0].items())


def test_a_signal_while_a_finished_run_is_tidied_up_leaves_it_finished(corpus, monkeypatch):
    remove = shutil.rmtree

    def interrupt(path, *arguments, **options):
        if Path(path).name == "data" and Path(path).exists():
            raise KeyboardInterrupt
        remove(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(corpus)
    record = json.loads(Path("runs/latest/run.json").read_text(encoding="utf-8"))
    assert record["status"] == "finished"
    assert read_artifact(Path("runs/latest")).state()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_resume_gives_the_same_bytes(corpus, number: int):
    settings = [part for setting in [*SMALL, "train.steps=60", "train.eval_every=20"] for part in ("--set", setting)]
    command = [*WARM, "pretrain", str(corpus), *settings]
    whole = finish(command)
    with running(command) as (stopped,):
        stopped.wait_for("step ")
        os.kill(stopped.process.pid, number)
        assert stopped.end() == 128 + number, stopped.err
    assert "--resume runs/0002" in stopped.err
    assert json.loads(Path("runs/0002-pretrain-clm-tiny/run.json").read_text())["status"] == "interrupted"
    resumed = finish([*WARM, "pretrain", "--resume", "latest", "-q"])
    assert resumed.out == "runs/0002-pretrain-clm-tiny\n"
    first = Path(whole.out.strip(), "model.safetensors").read_bytes()
    assert first == Path(resumed.out.strip(), "model.safetensors").read_bytes()


def test_a_budget_of_minutes_is_kept(corpus):
    started = time.monotonic()
    trained = run(corpus, "train.steps=0", "train.minutes=0.1")
    assert trained.summary["steps"] > 4
    # Not a time that is asserted, but that the budget is what ends the run, and not a number of steps.
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["train.batch_size=0"], ["train.batch_size"]),
        (["train.micro_batch_size=3"], ["train.micro_batch_size", "8"]),
        (["data.val_frac=1.5", "train.seq_len=1"], ["data.val_frac", "train.seq_len"]),
        (["model.preset=gpt5"], ["gpt5"]),
        (["model.preset=bert-base"], ["bert-base", "encoder"]),
        (["model.n_heads=3"], ["n_heads", "32"]),
        (["model.max_positions=16"], ["max_positions", "16"]),
        (["model.vocab_size=10"], ["vocab_size", "10"]),
        (["tokenizer.path=nowhere"], ["nowhere"]),
        (["tokenizer.vocab_size=40"], ["vocab_size", "40"]),
        (["data.paths=[nowhere.txt]"], ["nowhere.txt"]),
        (["objective=seq2seq"], ["00.txt"]),
    ],
)
def test_what_cannot_be_is_one_clear_error(corpus, settings: list[str], parts: list[str]):
    with pytest.raises(LlmctlError) as caught:
        run(corpus, *settings)
    for part in parts:
        assert part in str(caught.value)
    assert not Path("runs/latest").exists()


def test_too_little_text_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UsageError):
        run(tmp_path / "a.txt")


def stopped_run(corpus: Path, *settings: str, after_step: int = 8) -> Path:
    """Begin a run and stop it as a scheduler would; return its folder."""
    import llmctl.jobs.begin as engine

    class Stopping(Silent):
        def step(self, record, total_steps, eta_seconds) -> None:  # noqa: ARG002
            if record["step"] == after_step:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "make_progress", lambda **_: Stopping())
        with pytest.raises(InterruptedRunError):
            run(corpus, *settings)
    return find_run("latest")


def test_a_changed_recipe_is_shown_and_refused_unless_allowed(corpus):
    folder = stopped_run(corpus)
    for given, key in (({"optim.lr": 1e-4}, "optim.lr"), ({"train.steps": 20}, "train.steps")):
        with pytest.raises(UsageError, match=f"`{key}`") as caught:
            resume("pretrain", str(folder), quiet=True, given=given)
        assert f"--allow-change {key}" in caught.value.hint
    with pytest.raises(UsageError, match="cannot change"):
        resume("pretrain", str(folder), quiet=True, given={"model.d_model": 64}, allowed=["model.d_model"])
    with pytest.raises(UsageError, match="power of two"):
        resume(
            "pretrain",
            str(folder),
            quiet=True,
            given={"parallel.deterministic": True, "parallel.gradient_chunks": 3},
            allowed=["parallel.deterministic", "parallel.gradient_chunks"],
        )
    trained = resume("pretrain", str(folder), quiet=True, given={"train.steps": 20}, allowed=["train.steps"])
    assert trained is not None
    assert trained.summary["steps"] == 20
    assert load(PretrainConfig, recipe=str(folder / "recipe.yaml"), environment={}).config.train.steps == 20
    with pytest.raises(UsageError, match="finished"):
        resume("pretrain", str(folder), quiet=True)


@pytest.mark.parametrize(("key", "first", "then"), [("epochs", 1.0, 2.0), ("tokens", 3000, 6000), ("steps", 12, 20)])
def test_a_changed_budget_trains_as_long_as_it_says_with_its_schedule(corpus, key: str, first: float, then: float):
    folder = stopped_run(corpus, "train.steps=0", f"train.{key}={first}", "train.log_every=1", after_step=4)
    trained = resume("pretrain", str(folder), quiet=True, given={f"train.{key}": then}, allowed=[f"train.{key}"])
    whole = run(corpus, "train.steps=0", f"train.{key}={then}", "train.log_every=1")
    assert trained is not None
    assert trained.summary["steps"] == whole.summary["steps"] > 4

    def rates(path: Path) -> dict[int, float]:
        lines = MetricsFile(path / "metrics.jsonl").read()
        return {line["step"]: line["lr"] for line in lines if line["kind"] == "train" and line["step"] > 4}

    assert rates(folder) == rates(whole.path)


def test_a_budget_of_another_kind_replaces_the_first(corpus):
    folder = stopped_run(corpus, after_step=4)
    resume("pretrain", str(folder), quiet=True, given={"train.tokens": 4000}, allowed=["train.tokens"])
    train = load(PretrainConfig, recipe=str(folder / "recipe.yaml"), environment={}).config.train
    assert (train.steps, train.tokens) == (0, 4000)


@pytest.mark.parametrize("key", ["train.seed", "train.batch_size", "train.seq_len", "train.freeze", "optim.name"])
def test_what_cannot_take_effect_is_refused_and_leaves_the_recipe(corpus, key: str):
    folder = stopped_run(corpus, after_step=2)
    before = (folder / "recipe.yaml").read_bytes()
    value = {"train.freeze": ["embeddings"], "optim.name": "adamw"}.get(key, 16)
    with pytest.raises(UsageError, match="cannot change"):
        resume("pretrain", str(folder), quiet=True, given={key: value}, allowed=[key])
    assert (folder / "recipe.yaml").read_bytes() == before


def test_a_changed_metric_forgets_the_best_value_of_the_other(corpus):
    folder = stopped_run(corpus, "train.eval_every=2", after_step=5)
    with pytest.raises(UsageError, match="`bleu` is not measured"):
        resume("pretrain", str(folder), quiet=True, given={"train.metric": "bleu"}, allowed=["train.metric"])
    trained = resume("pretrain", str(folder), quiet=True, given={"train.metric": "accuracy"}, allowed=["train.metric"])
    assert trained is not None
    assert trained.summary["kept_step"] > 4  # no accuracy exceeds the loss of step 4


def test_the_same_settings_beside_resume_are_no_change(corpus):
    folder = stopped_run(corpus)
    trained = resume("pretrain", str(folder), quiet=True, given={"train.steps": 12, "train.seq_len": 32})
    assert trained is not None
    assert trained.summary["steps"] == 12


def test_a_run_goes_on_without_its_text_files(corpus):
    whole = run(corpus)
    folder = stopped_run(corpus)
    for path in corpus.iterdir():
        path.unlink()
    resume("pretrain", str(folder), quiet=True)
    assert (folder / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()


def test_damaged_checkpoints_are_not_a_fresh_start(corpus):
    folder = stopped_run(corpus)
    for path in (folder / "checkpoints").glob("*/model.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        resume("pretrain", str(folder), quiet=True)


def test_micro_batches_that_fit_are_found_and_kept(corpus):
    trained = run(corpus, "train.micro_batch_size=-1")
    assert (
        load(PretrainConfig, recipe=str(trained.path / "recipe.yaml"), environment={}).config.train.micro_batch_size
        == 8
    )


def test_recomputed_activations_change_nothing(corpus):
    plain, again = run(corpus), run(corpus, "parallel.activation_checkpointing=true")
    assert again.summary["after"]["loss"] == pytest.approx(plain.summary["after"]["loss"], rel=1e-5)


def test_figures_go_to_tensorboard(corpus):
    pytest.importorskip("tensorboard", reason="needs the extra `tensorboard`")
    trained = run(corpus, "train.track=[tensorboard]", "train.log_every=1")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {
        path.parent for path in trained.path.rglob("events.out.tfevents.*") if path.parent.parent == trained.path
    }
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 13))
    assert "eval/bits_per_byte" in events.Tags()["scalars"]
