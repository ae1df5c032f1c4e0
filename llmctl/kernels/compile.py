"""Compile the decoding step for this CPU into the cache folder."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

from llmctl.errors import LlmctlError, MissingCompilerError
from llmctl.files import atomic_path, cache_folder, exposed, writing
from llmctl.machine import processor_name

Library = ctypes.CDLL


COMPILERS = ("c++", "g++", "clang++")


FLAGS = (
    *("-O3", "-std=c++17", "-fno-exceptions", "-fopenmp", "-shared", "-fPIC"),
    # Allow reordered sums, as in torch. -ffast-math would also set flush-to-zero for the whole process at load time.
    *("-fno-math-errno", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"),
)


HERE = "native"
"""The compiler's name for the CPU it runs on (`-march=native`)."""


def source_path() -> Path:
    """Return the C++ source file; it includes the headers beside it."""
    return Path(__file__).parent / "cpp" / "decode.cpp"


def library_path(processor: str = HERE) -> Path:
    """Return the cache path of the compiled library; it changes with the source, the CPU and the flags."""
    features = ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    sources = [path.read_text(encoding="utf-8") for path in sorted(source_path().parent.glob("*.[ch]*"))]
    parts = [*sources, " ".join(flags_for(processor)), processor_name(), features]
    return cache_folder() / f"decode-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"


def flags_for(processor: str) -> tuple[str, ...]:
    """Return the compiler flags for a CPU."""
    return (*FLAGS, f"-march={processor}")


def compile_library(processor: str = HERE) -> Path:
    """Compile the step for this CPU, or another one by its `-march` name, and return its path; takes a few seconds.

    Raises: MissingCompilerError without a compiler; LlmctlError with the compiler's first error.
    """
    named = os.environ.get("CXX")
    compiler = next((path for name in ([named] if named else COMPILERS) if (path := shutil.which(name))), None)
    if compiler is None:
        raise MissingCompilerError(
            f"no C++ compiler found (tried {named or ', '.join(COMPILERS)})", "install g++, or set CXX to a compiler"
        )
    target = library_path(processor)
    with writing(target):
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if problem := exposed(target.parent):
        raise LlmctlError(
            f"no compiled library is kept in `{target.parent}`: {problem}",
            "make it writable for you only (chmod go-w), or set LLMCTL_CACHE to another folder",
        )
    with atomic_path(target) as temporary:
        done = subprocess.run(
            [compiler, *flags_for(processor), str(source_path()), "-o", str(temporary)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            message = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
            raise LlmctlError(
                f"`{compiler}` cannot compile the decoding step: {message}", "set CXX to a newer compiler"
            )
        temporary.chmod(0o700)
    return target
