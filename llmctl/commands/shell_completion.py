"""Completion of commands, options, their values and files in bash, zsh and fish.

The shell asks `llmctl` itself, with `_LLMCTL_COMPLETE` set and the words up to the cursor as arguments; it completes file
names where llmctl has no answer. Commands come from the command table, so that only options need an import.
"""

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from llmctl.errors import UsageError
from llmctl.files import write_text

ASKED = "_LLMCTL_COMPLETE"
"""The environment variable that a shell sets to ask for completions."""

SCRIPTS = {
    "bash": """\
_llmctl() {
    local IFS=$'\\n'
    COMPREPLY=( $(_LLMCTL_COMPLETE=1 llmctl "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null) )
}
complete -o bashdefault -o default -F _llmctl llmctl
""",
    "zsh": """\
#compdef llmctl
_llmctl() {
    local -a found
    found=("${(@f)$(_LLMCTL_COMPLETE=1 llmctl "${(@)words[2,$CURRENT]}" 2>/dev/null)}")
    if [[ -n "$found" ]]; then compadd -- $found; else _files; fi
}
if ! whence compdef >/dev/null; then autoload -Uz compinit; compinit; fi
compdef _llmctl llmctl
""",
    "fish": """\
function __llmctl_complete
    set -l found (env _LLMCTL_COMPLETE=1 llmctl (commandline -opc)[2..] (commandline -ct) 2>/dev/null)
    if test (count $found) -gt 0
        printf '%s\\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c llmctl -f -a '(__llmctl_complete)'
""",
}
"""What each shell sources."""


def shell_named(name: str | None, environment: Mapping[str, str]) -> str:
    """Return the shell to complete in: the one that is named, or the user's.

    Raises: UsageError for one that is not supported.
    """
    shell = name or Path(environment.get("SHELL", "")).name
    if shell not in SCRIPTS:
        what = f"shell `{shell}` is not supported" if shell else "the shell is not known: `SHELL` is not set"
        raise UsageError(what, f"name one: {', '.join(SCRIPTS)}")
    return shell


def install(shell: str) -> Path:
    """Write the script where the shell finds it, once; return the file that was written."""
    home = Path.home()
    if shell == "fish":
        base = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
        path = base / "fish" / "completions" / "llmctl.fish"
        write_script(path, SCRIPTS[shell])
        return path
    base = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    path, start = base / "llmctl" / f"completion.{shell}", home / f".{shell}rc"
    write_script(path, SCRIPTS[shell])
    line = f"source '{path}'"
    old = start.read_text(encoding="utf-8") if start.is_file() else ""
    if line not in old.splitlines():
        with start.open("a", encoding="utf-8") as file:  # appended, so that nothing of the user's file can be lost
            file.write(f"{'' if not old or old.endswith(chr(10)) else chr(10)}{line}\n")
    return path


def write_script(path: Path, text: str) -> None:
    """Write a script into a folder that may not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def complete(words: Sequence[str], commands: Mapping[str, str], subcommands: Mapping[str, Sequence[str]]) -> list[str]:
    """Return what may stand in the place of the last of these words; nothing where a file or free text stands."""
    *before, word = words or [""]
    before = before[1:] if before[:1] == ["--debug"] else before
    if not before:
        options = ("--help", "--version", "--debug", "--install-completion", "--show-completion")
        return sorted(name for name in (*commands, *(options if word.startswith("-") else ())) if name.startswith(word))
    if before[0] not in commands:
        return []
    command, found = command_of(before, subcommands)
    nested = getattr(command, "commands", {})
    inside = before[found:]
    if nested and inside and inside[0] in nested:
        command, inside = nested[inside[0]], inside[1:]
        nested = {}
    known: dict[str, Any] = {
        name: parameter for parameter in command.params for name in parameter.opts + parameter.secondary_opts
    }
    last = known.get(inside[-1]) if inside else None
    if last is not None and not getattr(last, "is_flag", False) and getattr(last, "param_type_name", "") == "option":
        key = getattr(command, "keys", {}).get(last.name)
        return [name for name in (key.names if key else ()) if name.startswith(word)]
    if word.startswith("-"):
        return sorted(name for name in [*known, "--help"] if name.startswith(word) and name.startswith("-"))
    more = [] if inside else [*nested, *subcommands.get(before[0], ())]
    return sorted(name for name in more if word and name.startswith(word))


def command_of(before: Sequence[str], subcommands: Mapping[str, Sequence[str]]) -> tuple[Any, int]:
    """Return the command that the words name, and how many of them do."""
    from typer.main import get_command

    name, n_words = {"import": "import_"}.get(before[0], before[0]), 1
    if len(before) > 1 and before[1] in subcommands.get(before[0], ()):
        name, n_words = f"{before[0]}_{before[1]}", 2
    return get_command(import_module(f"llmctl.commands.{name}").app), n_words
