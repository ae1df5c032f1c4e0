"""The floors of the house: imports point down, heavy packages stay behind functions, and `--help` is instant."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "llmctl"
FLOORS = [
    {"__main__"},
    {"cli"},
    {"commands"},
    {"engine"},
    {"model", "data", "formats", "tokenizer", "recipe"},
    {"config", "files", "losses", "quant"},
    {"errors"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Return every module a file imports anywhere in it, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def own_modules() -> dict[str, set[str]]:
    known = {module_of(path) for path in SOURCES}
    return {module_of(path): imports_of(path) & known - {module_of(path), "llmctl"} for path in SOURCES}


def test_every_room_has_a_floor():
    assert {room(module_of(path)) for path in SOURCES} - {""} <= set(LEVEL)


def test_imports_point_down():
    wrong = []
    for module, imported in own_modules().items():
        for target in imported:
            here, there = room(module), room(target)
            if here and here != there and LEVEL[there] <= LEVEL[here]:
                wrong.append(f"{module} -> {target}")
    assert not wrong


def test_no_import_cycles():
    graph = own_modules()
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for target in graph[module]:
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize(
    ("package", "rooms"),
    [("typer", {"cli", "commands"}), ("accelerate", {"engine"}), ("transformers", set()), ("pickle", set())],
)
def test_packages_stay_in_their_rooms(package: str, rooms: set[str]):
    users = {module_of(path) for path in SOURCES if any(name.split(".")[0] == package for name in imports_of(path))}
    assert {room(module) for module in users} <= rooms
    if package == "accelerate":
        assert users <= {"llmctl.distributed.runtime", "llmctl.distributed.launch"}


def test_print_only_in_commands():
    for path in SOURCES:
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        printing = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert not printing or room(module_of(path)) == "commands", path


def test_nothing_is_unpickled():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("torch", "load"), path


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["pretrain", "--help"], ["tokenize", "--help"]])
def test_help_loads_neither_torch_nor_rich(arguments: list[str]):
    code = (
        "import sys; from llmctl.__main__ import main; sys.argv = ['llmctl', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'accelerate', 'transformers', 'sentencepiece', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
