"""Compile the decoding library: for this CPU, or for several instruction sets to choose from at run time.

Needs nothing but Python: `pip install` runs it before there is an environment to import the package in.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
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


class BuildError(Exception):
    """There is no compiler, or it failed; `has_compiler` tells which."""

    def __init__(self, message: str, *, has_compiler: bool) -> None:
        super().__init__(message)
        self.has_compiler = has_compiler


def sources() -> list[Path]:
    """Return the C++ files."""
    return sorted((Path(__file__).parent / "cpp").glob("*.[ch]*"))


def source_hash() -> str:
    """Return a hash of the C++ files and the flags, which a library contains."""
    parts = [path.read_text(encoding="utf-8") for path in sources()]
    return hashlib.sha256("\0".join([*parts, *FLAGS]).encode()).hexdigest()[:16]


def find_compiler() -> str:
    """Return the path of the C++ compiler: `CXX`, or the first of `COMPILERS`.

    Raises: BuildError.
    """
    named = os.environ.get("CXX")
    compiler = next((path for name in ([named] if named else COMPILERS) if (path := shutil.which(name))), None)
    if compiler is None:
        raise BuildError(f"no C++ compiler found (tried {named or ', '.join(COMPILERS)})", has_compiler=False)
    return compiler


def build_here(source: Path, target: Path, processor: str = "native") -> None:
    """Compile for one CPU by its `-march` name; takes a few seconds.

    Raises: BuildError with the compiler's first error.
    """
    run([find_compiler(), *FLAGS, "-shared", f"-march={processor}", str(source), "-o", str(target)])


def build_all(target: Path, machine: str = "", compiler: Sequence[str] = ()) -> list[str]:
    """Compile for all instruction sets of a machine, and return those in the library; a compiler may not know all.

    Raises: BuildError with the compiler's first error.
    """
    command = list(compiler) or [find_compiler()]
    folder, variants = Path(__file__).parent / "cpp", VARIANTS.get(machine or platform.machine(), {"base": ()})
    with tempfile.TemporaryDirectory() as scratch:
        objects = {name: Path(scratch) / f"{name}.o" for name in variants}
        started = {
            name: start(
                [
                    *command,
                    *FLAGS,
                    *variants[name],
                    f"-DVARIANT={name}",
                    "-c",
                    str(folder / "decode.cpp"),
                    "-o",
                    str(objects[name]),
                ]
            )
            for name in variants
        }
        results = {name: process.communicate()[1] for name, process in started.items()}
        built = [name for name, process in started.items() if process.returncode == 0]
        if "base" not in built:
            raise BuildError(first_error(command[0], results["base"]), has_compiler=True)
        names = [*(f"-DHAS_{name}" for name in built), f'-DSOURCE="{source_hash()}"']
        files = [str(folder / "dispatch.cpp"), *(str(objects[name]) for name in built)]
        run([*command, *FLAGS, "-shared", *names, *files, "-o", str(target)])
    return built


def run(command: Sequence[str]) -> None:
    """Run a compiler.

    Raises: BuildError.
    """
    process = start(command)
    errors = process.communicate()[1]
    if process.returncode:
        raise BuildError(first_error(command[0], errors), has_compiler=True)


def start(command: Sequence[str]) -> "subprocess.Popen[str]":
    """Start a compiler."""
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def first_error(compiler: str, errors: str) -> str:
    """Return a message with the first error of a compiler's output."""
    message = next((line for line in errors.splitlines() if "error" in line), errors.strip()[:200])
    return f"`{compiler}` cannot compile the decoding library: {message}"
