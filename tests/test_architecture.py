"""Layers: imports point down, heavy packages stay behind functions, and `--help` is instant."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "llmctl"
LAYERS = [
    {"__main__": "python -m llmctl"},
    {"cli": "the command table; turns errors into exit codes"},
    {"commands": "one file per subcommand: flags -> config -> one call -> result on stdout"},
    {"jobs": "pretrain, finetune, distill, quantize, compress; begin and resume a run, dry runs"},
    {"compressing": "plans for a file size: vocabulary, shape and bits; measured, tried"},
    {
        "distilling": "teachers, their cached outputs and texts; pruning, refit, distillation objectives",
        "quantizing": "calibration, bit allocation, fake quantization (QAT), 4-bit base of qlora, report",
    },
    {
        "training": "loop.py, the one training loop; saving, objectives, optimizers, batches",
        "evaluating": "evaluate.py and one file per kind of task",
    },
    {
        "preparing": "text or examples -> tokenizer, split, shards",
        "converting": "import, export, GGUF, ONNX, checks",
        "benchmarking": "bench, doctor, network check",
    },
    {"inference": "generate, chat, chat templates, fill, classify; sampling, beams, KV cache sessions"},
    {"artifacts": "find the model a command means, load it; adapters, heads"},
    {"runs": "run folders, checkpoints, journal, history, progress, model card"},
    {
        "kernels": "compiled decoding step, choice of matmul kernels",
        "formats": "files on disk: safetensors, GGUF, ONNX, adapters, quantization",
        "data": "text files, tables, examples, shards, packed rows, masking",
    },
    {"families": "published architectures: config.json, tensor names and forms"},
    {
        "distributed": "Accelerate, launcher, ranks, sharded tensors, gradients",
        "metrics": "metrics as quotients of sums; BLEU, ROUGE, F1; gates",
        "model": "pure torch: blocks, three families, LoRA, pruning, memory and FLOPs of a step",
        "tokenizer": "sentencepiece and Hugging Face tokenizers",
        "recipe": "YAML, environment and flags -> config",
    },
    {"config": "every setting once, with default and meaning"},
    {
        "files": "atomic writes, JSON, hashes",
        "losses": "cross-entropy, divergences, matching: functions of tensors",
        "quant": "pure torch: schemes, GPTQ and other methods, packing, quantized layers",
        "machine": "precision, threads and memory of this process",
    },
    {"tables": "what a recipe can name, a row each: objectives, tasks, optimizers, losses, methods"},
    {"errors": "error classes with their exit codes"},
]
"""Packages from top to bottom; an import goes to a lower layer, or stays inside its package."""

LEVEL = {folder: level for level, folders in enumerate(LAYERS) for folder in folders}
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


def folder(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def tree() -> str:
    """Return the packages and their layers as the README shows them."""
    lines = ["llmctl/"]
    for number, folders in zip(range(len(LAYERS), 0, -1), LAYERS, strict=True):
        for name, meaning in folders.items():
            shown = f"{name}/" if (PACKAGE / name).is_dir() else f"{name}.py"
            lines.append(f"  {number:>2}  {shown:<14} {meaning}")
    return "\n".join(lines)


LARGEST_FOLDER = 0.15
"""Share of the package's lines that one folder may hold."""

APART = {"crash", "fuzz", "interop", "netns", "parity", "support"}
"""Folders of tests that are about the whole program, and helpers of tests."""


def own_modules() -> dict[str, set[str]]:
    known = {module_of(path) for path in SOURCES}
    return {module_of(path): imports_of(path) & known - {module_of(path), "llmctl"} for path in SOURCES}


def test_every_folder_has_a_layer():
    assert {folder(module_of(path)) for path in SOURCES} - {""} <= set(LEVEL)


def test_the_readme_shows_the_folders():
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    assert f"```\n{tree()}\n```" in readme, tree()


def test_no_folder_holds_too_much():
    lines: dict[str, int] = {}
    for path in SOURCES:
        lines[folder(module_of(path))] = lines.get(folder(module_of(path)), 0) + len(path.read_text().splitlines())
    assert max(lines.values()) <= LARGEST_FOLDER * sum(lines.values()), lines


def test_tests_mirror_the_package():
    """A file of tests is named after the module that it tests, and lies where that lies."""
    tests = Path(__file__).parent
    modules = {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in SOURCES}
    for path in sorted(tests.rglob("test_*.py")):
        where = path.relative_to(tests)
        if where.parts[0] in APART or where.as_posix() in (
            "test_adding.py",
            "test_architecture.py",
            "test_readme.py",
            "test_recipes.py",
        ):
            continue
        name = (where.parent / where.stem.removeprefix("test_")).as_posix()
        assert any(module in (name, f"{name}_") or name.startswith(f"{module}_") for module in modules), where


def test_imports_point_down():
    wrong = []
    for module, imported in own_modules().items():
        for target in imported:
            here, there = folder(module), folder(target)
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
    ("package", "folders"),
    [
        ("typer", {"cli", "commands"}),
        ("accelerate", {"distributed"}),
        ("huggingface_hub", {"artifacts"}),
        ("transformers", {"formats", "artifacts"}),
        ("pickle", set()),
    ],
)
def test_packages_stay_in_their_folders(package: str, folders: set[str]):
    users = {module_of(path) for path in SOURCES if any(name.split(".")[0] == package for name in imports_of(path))}
    assert {folder(module) for module in users} <= folders
    if package == "accelerate":
        assert users <= {"llmctl.distributed.runtime", "llmctl.distributed.launch"}


def test_print_only_in_commands():
    for path in SOURCES:
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        printing = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert not printing or folder(module_of(path)) == "commands", path


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
        "heavy = {'torch', 'accelerate', 'huggingface_hub', 'transformers', 'sentencepiece', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
