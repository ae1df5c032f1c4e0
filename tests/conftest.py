"""Fixtures shared by all tests: where the real data lies, and an environment that no user's setting leaks into."""

import gc
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from tests.support.libraries import compiled, shelf  # noqa: F401
from tests.support.models import make_loaded, text_tokenizer  # noqa: F401

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # read when huggingface_hub is imported: a mistyped name must not lead into the network
)


LONGEST = ("test_the_transcript_runs", "test_two_hosts", "test_the_prediction_is_within_a_tenth_of_the_peak")
"""Tests of half a minute and more: begun last, one process would work alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest tests, and keep the order of the others."""
    items.sort(key=lambda item: not item.name.startswith(LONGEST))


FROZEN = pytest.StashKey[int]()


def freeze(config: pytest.Config) -> None:
    """Leave what there is (8,000 tests, imported modules) out of later garbage collections: each takes 0.3 s with it."""
    gc.collect()
    gc.freeze()
    config.stash[FROZEN] = len(sys.modules)


def pytest_collection_finish(session: pytest.Session) -> None:
    freeze(session.config)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    if len(sys.modules) > item.config.stash[FROZEN] + 50:  # the command line imports what it needs when it needs it
        freeze(item.config)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real corpora and weights beside the checkout, or skip."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder shared/data with real corpora and weights is not beside this checkout")
    return folder


@pytest.fixture(scope="session", autouse=True)
def interrupts() -> None:
    """Let Ctrl-C mean what it means, also where a shell has started the tests in the background and ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep LLMCTL_* settings of the person running the tests out, and their runs and defaults untouched."""
    for name in [name for name in os.environ if name.startswith("LLMCTL_") and name != "LLMCTL_CACHE"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LLMCTL_NATIVE", "0")  # no test compiles but those of the library
    monkeypatch.delenv("COLUMNS", raising=False)  # the width of the terminal, which pytest-xdist hands on
    # What a test starts as a process of its own is this checkout too, wherever it is started.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path_factory.getbasetemp() / "xdg-data"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of tiny random models, one of every family, each with a tokenizer."""
    from tests.support.tuning import write_models

    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def teachers(models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of models of every family with something to say: random ones whose layers matter."""
    from dataclasses import replace

    from llmctl.formats.artifact import read_artifact
    from llmctl.formats.artifact_write import write_artifact
    from llmctl.model.transformer import LanguageModel, initialize

    paths = {}
    for name, path in models.items():
        artifact = read_artifact(path)
        model = LanguageModel(replace(artifact.config, init_std=0.3))
        initialize(model, 1)
        folder = tmp_path_factory.mktemp("teachers") / name
        paths[name] = write_artifact(folder, model.config, model.state_dict(), files=artifact.files, provenance={})
    return paths


@pytest.fixture(scope="session")
def trained_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder whose `runs/` holds two finished runs, 0001 and 0002, and 0003, which was killed at its work."""
    import subprocess

    from llmctl.cli import run

    root = tmp_path_factory.mktemp("trained")
    (root / "texts").mkdir()
    for number in range(40):
        (root / "texts" / f"{number:02d}.txt").write_text(
            f"the cat {number} sat on the mat. 猫。\n" * 3, encoding="utf-8"
        )
    small = {
        "model.d_model": 32,
        "model.n_layers": 2,
        "model.n_heads": 2,
        "train.seq_len": 32,
        "train.eval_every": 6,
        "train.dtype": "float32",
        "train.device": "cpu",
        "tokenizer.vocab_size": 340,
    }
    command = ["pretrain", "texts", *(part for key, value in small.items() for part in ("--set", f"{key}={value}"))]
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("LLMCTL_") and name != "LLMCTL_CACHE"]:
            patch.delenv(name)
        patch.chdir(root)
        assert run([*command, "--steps", "12", "-q"]) == 0
        assert run([*command, "--steps", "18", "-q", "--objective", "mlm", "--set", "optim.lr=0.01"]) == 0
        endless = {"train.steps": 100_000, "train.eval_every": 100_000, "train.save_every": 2, "train.log_every": 1}
        command += ["-v", *(part for key, value in endless.items() for part in ("--set", f"{key}={value}"))]
        source = str(Path(__file__).resolve().parents[1])
        with subprocess.Popen(
            [sys.executable, "-c", "import sys; from llmctl.cli import run; run(sys.argv[1:])", *command],
            env=os.environ | {"PYTHONPATH": source},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stderr is not None
            assert any(line.startswith("step 5/") for line in process.stderr), "the run ended early"
            process.send_signal(signal.SIGKILL)
    return root


@pytest.fixture
def runs(trained_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of those runs that a test may harm, beside which it stands."""
    shutil.copytree(trained_runs / "runs", tmp_path / "runs", symlinks=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"
