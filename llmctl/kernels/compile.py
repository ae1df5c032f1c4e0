"""Where the decoding library is: in the package, or compiled for this CPU into the cache folder.

A library is used once it has been checked on this machine (`llmctl.benchmarking.compiled_step_check`); the verdict is a
file in the cache folder, whose name depends on source, CPU and flags.
"""

import ctypes
import hashlib
from contextlib import suppress
from pathlib import Path

from llmctl.errors import LlmctlError, MissingCompilerError, OutputError
from llmctl.files import atomic_path, cache_folder, exposed, write_text, writing
from llmctl.kernels.build import FLAGS, BuildError, build_here, source_hash
from llmctl.machine import processor_name

Library = ctypes.CDLL

HERE = "native"
"""The compiler's name for the CPU it runs on (`-march=native`)."""

PACKAGED, COMPILED = "packaged", "compiled"
"""Verdicts on a machine: which library passed the check. Any other text is why there is none."""


def source_path() -> Path:
    """Return the C++ source file; it includes the headers beside it."""
    return Path(__file__).parent / "cpp" / "decode.cpp"


def packaged_path() -> Path:
    """Return where the installation puts a library for all CPUs, if it had a compiler."""
    return Path(__file__).parent / "_decode.so"


def library_path(processor: str = HERE) -> Path:
    """Return the cache path of the compiled library; it changes with the source, the CPU and the flags."""
    features = ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    parts = [source_hash(), *FLAGS, processor, processor_name(), features]
    return cache_folder() / f"decode-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"


def verdict() -> str:
    """Return `PACKAGED`, `COMPILED` or the reason why no library is used; empty if none was checked yet."""
    try:
        return library_path().with_suffix(".txt").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def write_verdict(text: str) -> None:
    """Keep the verdict of a check; where the folder cannot be written, the next process checks again."""
    path = library_path().with_suffix(".txt")
    with suppress(OutputError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text(path, text + "\n")


def compile_library(processor: str = HERE) -> Path:
    """Compile the library for this CPU, or another one by its `-march` name, and return its path; takes a few seconds.

    Raises: MissingCompilerError without a compiler; LlmctlError with the compiler's first error.
    """
    target = library_path(processor)
    with writing(target):
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if problem := exposed(target.parent):
        raise LlmctlError(
            f"no compiled library is kept in `{target.parent}`: {problem}",
            "make it writable for you only (chmod go-w), or set LLMCTL_CACHE to another folder",
        )
    with atomic_path(target) as temporary:
        try:
            build_here(source_path(), temporary, processor)
        except BuildError as error:
            if not error.has_compiler:
                raise MissingCompilerError(str(error), "install g++, or set CXX to a compiler") from None
            raise LlmctlError(str(error), "set CXX to a newer compiler") from None
        temporary.chmod(0o700)
    return target
