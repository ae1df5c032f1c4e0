"""Compile the decoding library: for this CPU, or for several instruction sets to choose from at run time.

Needs nothing but Python: `pip install` runs it before there is an environment to import the package in.
"""

import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

COMPILERS = ("c++", "g++", "clang++")

FLAGS = (
    *("-O3", "-std=c++17", "-fno-exceptions", "-fopenmp", "-fPIC"),
    # Allow reordered sums, as in torch. -ffast-math would also set flush-to-zero for the whole process at load time.
    *("-fno-math-errno", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"),
)

AVX2 = ("-mavx2", "-mfma", "-mbmi2", "-mf16c")
AVX512VNNI = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512cd", "-mavx512vnni")
VARIANTS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "x86_64": {
        "base": (),
        "avx2": AVX2,
        "avxvnni": (*AVX2, "-mavxvnni"),
        "avx512vnni": AVX512VNNI,
    },
    "aarch64": {"base": (), "dotprod": ("-march=armv8.2-a+dotprod",)},
}
"""Instruction sets by machine, as dispatch.cpp knows them: name -> compiler flags.

AVX-512 without VNNI is left out: it is a tenth faster than AVX2 (measured), and each variant takes seconds to compile.
"""


TRANSIENT = ("No space left on device", "out of memory", "Cannot allocate memory", "Killed", "terminated")
"""What compilers write about a failure of the machine, not of the sources."""


class BuildError(Exception):
    """There is no compiler, or it failed; `has_compiler` tells which, `is_transient` whether it may work later."""

    def __init__(self, message: str, *, has_compiler: bool, is_transient: bool = False) -> None:
        super().__init__(message)
        self.has_compiler, self.is_transient = has_compiler, is_transient


def sources() -> list[Path]:
    """Return the C++ files."""
    return sorted((Path(__file__).parent / "cpp").glob("*.[ch]*"))


def source_hash() -> str:
    """Return a hash of the C++ files and the flags, which a library contains."""
    parts = [path.read_text(encoding="utf-8") for path in sources()]
    return hashlib.sha256("\0".join([*parts, *FLAGS]).encode()).hexdigest()[:16]


def find_compiler() -> list[str]:
    """Return the command of the C++ compiler: `CXX`, which may have arguments, or the first of `COMPILERS`.

    Raises: BuildError.
    """
    named = os.environ.get("CXX", "").strip()
    try:
        commands = [shlex.split(named)] if named else [[name] for name in COMPILERS]
    except ValueError:  # a quotation mark without a second one
        commands = []
    for name, *arguments in commands:
        if path := shutil.which(name):
            return [path, *arguments]
    raise BuildError(f"no C++ compiler found (tried {named or ', '.join(COMPILERS)})", has_compiler=False)


def build_here(source: Path, target: Path, processor: str = "native") -> None:
    """Compile for one CPU by its `-march` name; takes a few seconds.

    Raises: BuildError with the compiler's first error.
    """
    run([*find_compiler(), *FLAGS, "-shared", f"-march={processor}", str(source), "-o", str(target)])


def build_all(target: Path, machine: str = "", compiler: Sequence[str] = ()) -> list[str]:
    """Compile for all instruction sets of a machine, and return those in the library; a compiler may not know all.

    Raises: BuildError with the compiler's first error.
    """
    command = list(compiler) or find_compiler()
    folder, variants = Path(__file__).parent / "cpp", VARIANTS.get(machine or platform.machine(), {"base": ()})
    with tempfile.TemporaryDirectory() as scratch:
        objects = {name: Path(scratch) / f"{name}.o" for name in variants}
        source = str(folder / "decode.cpp")
        errors = run_all(
            {
                name: [*command, *FLAGS, *flags, f"-DVARIANT={name}", "-c", source, "-o", str(objects[name])]
                for name, flags in variants.items()
            }
        )
        built = [name for name, error in errors.items() if error is None]
        if base := errors["base"]:
            raise base
        names = [*(f"-DHAS_{name}" for name in built), f'-DSOURCE="{source_hash()}"']
        files = [str(folder / "dispatch.cpp"), *(str(objects[name]) for name in built)]
        run([*command, *FLAGS, "-shared", *names, *files, "-o", str(target)])
    return built


def run(command: Sequence[str]) -> None:
    """Run a compiler.

    Raises: BuildError.
    """
    if error := run_all({"": command})[""]:
        raise error


def run_all(commands: Mapping[str, Sequence[str]]) -> dict[str, BuildError | None]:
    """Run compilers side by side and return their errors; when interrupted, none goes on."""
    started: dict[str, subprocess.Popen[str]] = {}
    errors: dict[str, BuildError | None] = {}
    try:
        for name, command in commands.items():
            try:
                started[name] = start(command)
            except OSError as error:  # such as a file that is no program
                message = f"`{command[0]}` cannot be run: {error.strerror}"
                errors[name] = BuildError(message, has_compiler=True)
        for name, process in started.items():
            output = output_of(process)
            errors[name] = error_of(commands[name], process.returncode, output)
    finally:
        for process in started.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # what it has started too
                process.wait()
            if process.stderr is not None:
                process.stderr.close()
    return errors


def start(command: Sequence[str]) -> "subprocess.Popen[str]":
    """Start a compiler in a process group of its own."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        process_group=0,
    )


def output_of(process: "subprocess.Popen[str]") -> str:
    """Wait for a compiler; return what it wrote to stderr."""
    while True:  # a signal just before a read does not end it: look for one every second
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=1)[1]


def error_of(command: Sequence[str], status: int, output: str) -> BuildError | None:
    """Return a message with the first error of a compiler's output; None if it wrote its file."""
    target = command[-1]
    if status == 0 and Path(target).is_file():
        return None
    lines = output.splitlines()
    found = next((line for line in lines if "error" in line.lower()), output.strip()[:200])
    if not status:
        found = "it wrote no file"
    is_transient = status < 0 or any(text in output for text in TRANSIENT)
    message = f"`{shlex.join(command[: command.index(FLAGS[0])])}` cannot compile the decoding library: "
    return BuildError(message + (found or f"exit status {status}"), has_compiler=True, is_transient=is_transient)
