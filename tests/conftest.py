"""Fixtures shared by all tests: where the real data lies, and an environment that no user's setting leaks into."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real corpora and weights beside the checkout, or skip."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder shared/data with real corpora and weights is not beside this checkout")
    return folder


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep LLMCTL_* settings of the person running the tests out, and their runs and defaults untouched."""
    import os

    for name in [name for name in os.environ if name.startswith("LLMCTL_") and name != "LLMCTL_CACHE"]:
        monkeypatch.delenv(name)
    # What a test starts as a process of its own is this checkout too, wherever it is started.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path_factory.getbasetemp() / "xdg-data"))
