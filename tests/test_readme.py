"""The README's transcript runs as it stands, and every command line of the README and the guides is a valid one."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from llmctl.cli import COMMANDS, EXIT_CODES, SUBCOMMANDS, root_help
from llmctl.config import TRAINING, EvaluateConfig
from llmctl.recipe import keys_of

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "recipes").rglob("README.md"))]
LARGEST_README = 9 * 1024
LONGEST_ROW = 90
"""Characters that a command's row may have as it is shown: without the targets of its links."""

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#([^)\s]+))?\)|^\[\w+\]: (\S+)$", re.MULTILINE)
SEPARATORS = frozenset("|&;<>()")
"""Characters of the shell's operators: `shlex` returns a run of them as one word."""


def transcript() -> list[tuple[str, str]]:
    """Return (command, expected stdout or nothing) of the console block."""
    block = re.search(r"```console\n(.*?)```", README, re.DOTALL)
    assert block
    steps: list[tuple[str, str]] = []
    for line in block[1].splitlines():
        if line.startswith("$ "):
            steps.append((line[2:], ""))
        else:
            steps[-1] = (steps[-1][0], steps[-1][1] + line + "\n")
    return steps


def agrees(shown: str, printed: str) -> bool:
    """Tell whether output is what is shown, where `...` is any text of one line, and alone on a line any whole lines."""
    lines = [
        r"(?:[^\n]*\n)*" if line == "..." else "[^\n]*".join(map(re.escape, line.split("..."))) + "\n"
        for line in shown.splitlines()
    ]
    return re.fullmatch("".join(lines), printed) is not None


def parts(line: str) -> Iterator[list[str]]:
    """Yield the simple commands of a shell line, also those inside of `$(...)`."""
    for inner in re.findall(r"\$\(([^()]*)\)", line):
        yield from parts(inner)
    lexer = shlex.shlex(re.sub(r"\$\([^()]*\)", "X", line), posix=True, punctuation_chars="".join(SEPARATORS))
    lexer.whitespace_split, lexer.commenters = True, "#"
    words: list[str] = []
    redirects = False
    for word in lexer:
        if redirects:
            redirects = False
        elif set(word) <= {"<", ">"}:
            redirects = True
        elif set(word) <= SEPARATORS:
            yield words
            words = []
        else:
            words.append(word)
    yield words


def command_lines(text: str) -> Iterator[list[str]]:
    """Yield the arguments of every `llmctl` in fenced blocks and code spans."""
    fenced = [line.removeprefix("$ ") for _, block in FENCE.findall(text) for line in block.splitlines()]
    spans = SPAN.findall(" ".join(FENCE.sub("", text).split()))
    for line in [*fenced, *(span for span in spans if span.startswith("llmctl "))]:
        if "llmctl " in line:
            for words in parts(line):
                if "llmctl" in words:
                    yield words[words.index("llmctl") + 1 :]


def command_of(arguments: list[str]) -> tuple[Any, list[str], Mapping[str, str]]:
    """Return the click command of a command line, the arguments left for it, and the keys that its options set."""
    name, rest = arguments[0], arguments[1:]
    file = {"import": "import_"}.get(name, name)
    if rest and rest[0] in SUBCOMMANDS.get(name, ()):
        file, rest = f"{name}_{rest[0]}", rest[1:]
    module = import_module(f"llmctl.commands.{file}")
    command = get_command(module.app)
    if rest and rest[0] in getattr(command, "commands", ()):
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest, getattr(module, "SETTINGS", {})


def problem(arguments: list[str]) -> str:
    """Return why a command line is invalid: its command, an option, a key or a name; empty if it is valid."""
    if arguments[0] not in COMMANDS:
        return "" if arguments in (["--help"], ["--install-completion"]) else "unknown command"
    command, rest, settings = command_of(arguments)
    try:
        context = command.make_context(arguments[0], list(rest))
    except Exception as error:
        if not hasattr(error, "format_message"):  # of usage errors of click, which Typer vendors
            raise
        return error.format_message()
    given = {key: context.params[name] for name, key in settings.items() if context.params.get(name)}
    given |= dict(setting.split("=", 1) for setting in context.params.get("set_") or ())
    known = keys_of(TRAINING.get(arguments[0], EvaluateConfig))
    unknown = [f"no key `{key}`" for key in given if key not in known]
    wrong = [
        f"no `{value}` for `{key}`"
        for key, value in given.items()
        if key in known and known[key].names and str(value) not in known[key].names
    ]
    return ", ".join(unknown + wrong)


def options_of(command: Any) -> set[str]:
    below = [options_of(each) for each in getattr(command, "commands", {}).values()]
    own = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    return own.union(*below) | {"-h", "--help"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_readme_and_the_help(name: str):
    assert f"`{name}`" in README
    assert name in root_help()


def test_the_readme_is_short():
    assert len(README.encode()) <= LARGEST_README
    table = README.split("| command | does |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) >= len(COMMANDS) - 1
    for row in table:
        assert len(re.sub(r"\]\[\w+\]", "]", row)) <= LONGEST_ROW, row


def test_exit_codes_of_the_guide_are_those_of_the_help():
    section = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8").split("## Exit codes")[1].split("##")[0]
    shown = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", section, re.MULTILINE) for code in row.split(",")}
    helped = {
        int(code) for codes in re.findall(r"\b(\d{1,3}(?:/\d+)?) +[a-z]", EXIT_CODES) for code in codes.split("/")
    }
    assert helped <= shown


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_command_lines_are_valid(path: Path):
    lines = list(command_lines(path.read_text(encoding="utf-8")))
    assert lines
    assert not [f"llmctl {shlex.join(line)}: {problem(line)}" for line in lines if problem(line)]


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.parent.name != "benchmarks"], ids=str)
def test_options_and_keys_in_the_text_exist(path: Path):
    """Code spans such as `--beams` and `--set train.patience=3` name what there is."""
    commands = [command_of([name])[0] for name in COMMANDS] + [command_of(["distill", "cache"])[0]]
    known = set().union(*map(options_of, commands))
    keys = set().union(*(keys_of(config) for config in [*TRAINING.values(), EvaluateConfig]))
    sections = {key.split(".")[0] for key in keys if "." in key}
    text = " ".join(FENCE.sub("", path.read_text(encoding="utf-8")).split())
    for span in SPAN.findall(text):
        if span.startswith("-") and span != "-":
            assert set(re.findall(r"(?<!\S)--?[a-z][\w-]*", span)) <= known, span
        for key in re.findall(r"(?:--set |^)([a-z]+\.(?!json|model|safetensors|svg)\w+)(?:=|$)", span):
            assert key in keys or key.split(".")[0] not in sections, span


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path):
    text = path.read_text(encoding="utf-8")
    for target, anchor, reference in LINK.findall(text):
        name = target or reference
        if "://" in name:
            continue
        assert (path.parent / name).exists(), name
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (path.parent / name).read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, anchor


@pytest.mark.parametrize(
    "line",
    [
        "llmctl pretrian",
        "llmctl pretrain --minuets 1",
        "echo a | llmctl generate --tempo 1 -",
        'llmctl generate -m "$(llmctl pretrain --quit)" Return',
        "llmctl pretrain --objective next",
        "llmctl finetune MODEL data --set train.patients=3",
        "llmctl finetune MODEL data --set optim.name=adam",
        "llmctl runs show --pretty",
    ],
)
def test_invalid_command_lines_are_found(line: str):
    assert any(map(problem, command_lines(f"```sh\n{line}\n```\n")))


def test_shell_lines_are_taken_apart():
    line = 'A=1 llmctl pretrain -q > out.txt && printf "x | y" | srun llmctl chat -m "$(llmctl use)" - < in.txt  # z'
    text = f"```\n{line}\n```\nand `llmctl fill\n--json -` too\n"
    expected = ["use", "pretrain -q", "chat -m X -", "fill --json -"]
    assert [" ".join(words) for words in command_lines(text)] == expected


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a\n", "a\n", True),
        ("a\n", "a\nb\n", False),
        ("a\n", "a", False),
        ("a ... c\n", "a b b c\n", True),
        ("a ... c\n", "a b\nb c\n", False),
        ("a ...\n", "a b\nc\n", False),
        ("...\tx\n", "0.1\tx\n", True),
        ("a.c\n", "abc\n", False),
        ("a\n...\nd\n", "a\nb\nc\nd\n", True),
        ("a\n...\nd\n", "a\nb\nc\n", False),
        ("a\n...\n", "ab\nc\n", False),
        ("...\nd\n", "bd\n", False),
    ],
)
def test_dots_stand_for_output_that_varies(shown: str, printed: str, same: bool):
    assert agrees(shown, printed) is same


def test_the_transcript_runs(tmp_path, monkeypatch):
    # The commands as they stand; only steps and texts are bounded, so that a minute is seconds here.
    shim = tmp_path / "bin" / "llmctl"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -P -m llmctl "$@"\n')
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shim.parent}:{os.environ['PATH']}")
    for key, value in {"TRAIN_STEPS": "6", "DATA_VAL_FRAC": "0.005", "WEIGHTS_CALIBRATION_ROWS": "8"}.items():
        monkeypatch.setenv(f"LLMCTL_{key}", value)
    for command, expected in transcript():
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        assert "\x1b" not in done.stdout
        if expected:
            assert agrees(expected, done.stdout), f"{command}\n{done.stdout}"
        elif not command.startswith("cp "):
            assert done.stdout, command


def test_the_plot_is_drawn_from_the_data_in_the_guide():
    folder = ROOT / "benchmarks"
    spec = importlib.util.spec_from_file_location("plot_quality", folder / "plot_quality.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    data = json.loads((folder / "quality.json").read_text(encoding="utf-8"))
    assert script.svg(data) == (folder / "quality.svg").read_text(encoding="utf-8")
    guide = (ROOT / "recipes" / "quantize" / "README.md").read_text(encoding="utf-8")
    rows = [re.findall(r"[\d.]+", line) for line in guide.split("| | MB |")[1].split("\n\n")[0].splitlines()]
    for row in data["rows"]:
        assert any(row["mb"] in cells and row["kl"] in cells for cells in rows), row
