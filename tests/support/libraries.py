"""Compiled decoding libraries, each made once for all processes of pytest-xdist."""

import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest

from llmctl.kernels.compile import compile_library, library_path


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that the processes of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen") else base) / "compiled"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def compiled(shelf: Path) -> Callable[[str], Path]:
    """Return a function from a processor to the file of its library."""

    def of(processor: str) -> Path:
        with (shelf / "lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
            fcntl.flock(lock, fcntl.LOCK_EX)
            patch.setenv("LLMCTL_CACHE", str(shelf))
            path = library_path(processor)
            return path if path.is_file() else compile_library(processor)

    return of
