"""Compile the decoding step for this processor, once, into the cache."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

from llmctl.errors import LlmctlError, MissingCompilerError
from llmctl.files import atomic_path, cache_folder
from llmctl.machine import processor_name

Library = ctypes.CDLL


COMPILERS = ("c++", "g++", "clang++")


FLAGS = (
    *("-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC"),
    # Sums may be reordered, as torch's own are; -ffast-math as a whole would change the process that loads this.
    *("-fno-math-errno", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"),
)


HERE = "native"
"""The processor of this machine, to its compiler."""


def source_path() -> Path:
    """Return the file that is compiled."""
    return Path(__file__).parent / "cpp" / "decode.cpp"


def library_path(processor: str = HERE) -> Path:
    """Return where the library for this source, processor and set of flags lies."""
    features = ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    parts = [source_path().read_text(encoding="utf-8"), " ".join(flags_for(processor)), processor_name(), features]
    return cache_folder() / f"decode-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"


def flags_for(processor: str) -> tuple[str, ...]:
    """Return the compiler's flags for a processor."""
    return (*FLAGS, f"-march={processor}")


def compile_library(processor: str = HERE) -> Path:
    """Compile the step for this machine, or for another processor as compilers name it, and return its file; a few seconds.

    Raises: MissingCompilerError without a compiler; LlmctlError with the compiler's first complaint.
    """
    named = os.environ.get("CXX")
    compiler = next((path for name in ([named] if named else COMPILERS) if (path := shutil.which(name))), None)
    if compiler is None:
        raise MissingCompilerError(
            f"no C++ compiler found (looked for {named or ', '.join(COMPILERS)})", "install g++, or name one with CXX"
        )
    target = library_path(processor)
    with atomic_path(target) as temporary:
        done = subprocess.run(
            [compiler, *flags_for(processor), str(source_path()), "-o", str(temporary)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            complaint = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
            raise LlmctlError(
                f"`{compiler}` cannot compile the decoding step: {complaint}", "a newer g++ may; CXX names it"
            )
    return target
