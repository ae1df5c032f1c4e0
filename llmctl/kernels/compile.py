"""Where the decoding library is: in the package, or compiled for this CPU into the cache folder.

A library is used once it has been checked on this machine (`llmctl.benchmarking.compiled_step_check`); the verdict is a
file in the cache folder, whose name depends on source, CPU and flags.
"""

import ctypes
import hashlib
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from llmctl.errors import LlmctlError, MissingCompilerError, OutputError
from llmctl.files import atomic_path, cache_folder, exposed, write_text, writing
from llmctl.kernels.build import FLAGS, BuildError, build_here, find_compiler, source_hash
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
    """Return `PACKAGED`, `COMPILED` or the reason why no library is used; empty if that is to be found out (again).

    It is, where the library is not the one that was checked, and where another compiler, or a library in the package,
    may do better than the one that failed.
    """
    path = library_path().with_suffix(".txt")
    texts = [own_verdicts().get(path, "")]
    with suppress(OSError, UnicodeDecodeError):
        texts.append(path.read_text(encoding="utf-8"))
    for text in texts:
        reason, _, circumstances = text.strip().partition("\n")
        if circumstances and circumstances == circumstances_of(reason):
            return reason
    return ""


def write_verdict(text: str, *, is_lasting: bool = True) -> None:
    """Keep the verdict of a check.

    What is not lasting, or cannot be written, is kept in this process only: the next one checks again.
    """
    path, reason = library_path().with_suffix(".txt"), " ".join(text.split())
    text = f"{reason}\n{circumstances_of(reason)}\n"
    own_verdicts()[path] = text
    if not is_lasting:
        return
    with suppress(OutputError):
        with writing(path):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text(path, text)


@cache
def own_verdicts() -> dict[Path, str]:
    """Return the verdicts of this process by path."""
    return {}


def circumstances_of(reason: str) -> str:
    """Return what a verdict was about; empty if that does not exist."""
    if reason == COMPILED:
        return identity_of(library_path())
    if reason == PACKAGED:
        return identity_of(packaged_path())
    try:
        command = find_compiler()
    except BuildError:
        return ""
    return " | ".join([*command, identity_of(Path(command[0])), identity_of(packaged_path()) or "no library"])


def identity_of(path: Path) -> str:
    """Return the size and time of a file; empty if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


def check_folder() -> None:
    """Make the cache folder, and check that a library can be kept in it.

    Raises: OutputError; LlmctlError if others could write it.
    """
    folder = library_path().parent
    with writing(library_path()):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    if problem := exposed(folder):
        raise LlmctlError(
            f"no compiled library is kept in `{folder}`: {problem}",
            "make it writable for you only (chmod go-w), or set LLMCTL_CACHE to another folder",
        )


def compile_library(processor: str = HERE) -> Path:
    """Compile the library for this CPU, or another one by its `-march` name, and return its path; takes a few seconds.

    Raises: MissingCompilerError without a compiler; LlmctlError with the compiler's first error, OutputError if it
    may work later; what `check_folder` raises.
    """
    check_folder()
    target = library_path(processor)
    with atomic_path(target) as temporary:
        try:
            build_here(source_path(), temporary, processor)
        except BuildError as error:
            if not error.has_compiler:
                raise MissingCompilerError(str(error), "install g++, or set CXX to a compiler") from None
            if error.is_transient:
                raise OutputError(str(error), "free memory or disk space (TMPDIR)") from None
            raise LlmctlError(str(error), "set CXX to another compiler") from None
        temporary.chmod(0o700)
    return target
