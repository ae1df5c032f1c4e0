"""`llmctl chat`: a conversation in the terminal or from a script; answers go to stdout."""

import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmctl.commands.common import (
    AdapterNames,
    KeysAndValues,
    command_app,
    find_model,
    note,
    note_decoding,
    one_name,
    prepare_decoding,
)
from llmctl.config import GenerateConfig
from llmctl.errors import LlmctlError, OutputError, UsageError
from llmctl.runs.terminal import plain
from llmctl.tables.names import closest

if TYPE_CHECKING:
    from llmctl.inference.chat import Chat

app = command_app()
DEFAULT = GenerateConfig()
MAX_TOKENS = 512
"""Default for an answer: chat answers are longer than the completions of `generate`."""
FENCE = '"""'
HELP = f"""/system TEXT  set the system prompt; without TEXT show it
/reset        clear the conversation, keep the system prompt
/save FILE    write the conversation as a line of JSON, for llmctl finetune --task chat
/exit         quit (also Ctrl-D)
/help         show this help
{FENCE}           starts and ends a message of several lines
Ctrl-C stops an answer. To send a message that starts with /, put a space before it."""


@app.command()
def chat(
    name: Annotated[str | None, typer.Argument(metavar="MODEL", help="Same as -m.")] = None,
    model: Annotated[str | None, typer.Option("-m", "--model", help="Model folder, file, run or `latest`.")] = None,
    adapter: AdapterNames = None,
    system: Annotated[str, typer.Option("-s", "--system", help="System prompt.")] = "",
    max_tokens: Annotated[
        int, typer.Option("-n", "--max-tokens", "--max-new-tokens", help="Maximum tokens per answer.")
    ] = MAX_TOKENS,
    temperature: Annotated[
        float, typer.Option("-t", "--temperature", "--temp", help="Sampling temperature; 0: greedy.")
    ] = DEFAULT.temperature,
    top_p: Annotated[
        float, typer.Option(help="Sample from the top tokens up to this cumulative probability; 1: off.")
    ] = DEFAULT.top_p,
    top_k: Annotated[int, typer.Option(help="Sample from the k most likely tokens; 0: off.")] = DEFAULT.top_k,
    min_p: Annotated[
        float, typer.Option(help="Drop tokens below this fraction of the top token's probability.")
    ] = DEFAULT.min_p,
    seed: Annotated[int, typer.Option(help="Sampling seed.")] = DEFAULT.seed,
    kv: KeysAndValues = DEFAULT.kv,
    script: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Read messages and commands from a file, one per line; `-`: standard input."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Do not print which model is used.")] = False,
) -> None:
    r"""Chat with a model through its chat template, in the terminal or from a script; /help lists the commands.

    Examples:

      llmctl chat

      llmctl chat -m runs/0003 -s "Answer in one sentence." -t 0

      printf 'Hello\nAnd you?\n/save talk.jsonl\n' | llmctl chat --script -
    """
    if script is None and not sys.stdin.isatty():
        raise UsageError(
            "standard input is not a terminal",
            "use `--script -` for a conversation, or `llmctl generate --chat -` for independent prompts",
        )
    from llmctl.inference.settings import check

    config = GenerateConfig(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, kv=kv
    )
    check(config)
    name = one_name(name, model)
    lines = None if script is None else script_lines(script)
    path = find_model(name, "generate", quiet=quiet, adapters=adapter)
    from llmctl.artifacts.adapters import apply_adapters
    from llmctl.artifacts.load import load_model
    from llmctl.commands.generate import argument
    from llmctl.formats.generation_settings import unused_settings
    from llmctl.inference.chat import PLAIN_NOTE, SOURCE_NOTE, Chat

    prepare_decoding(device=device, quiet=quiet)
    loaded = load_model(path, device=device, dtype=dtype, able="generate", packed=True)
    loaded = apply_adapters(loaded, adapter or [], able="generate")
    note(unused := unused_settings(loaded.artifact.files), quiet=quiet or not unused)
    note_decoding(loaded, quiet=quiet)
    talk = Chat(loaded, config, argument(system))
    if talk.template is None or talk.template.is_plain:
        note(PLAIN_NOTE if talk.template else SOURCE_NOTE, quiet=quiet)
    note_system(talk)
    if lines is not None:
        play(talk, lines)
        return
    note("/help lists the commands; Ctrl-D quits", quiet=quiet)
    converse(talk)


# --- reading input ----------------------------------------------------------------------------------------------------


def script_lines(name: str) -> Iterator[str]:
    """Return the lines of a script; fail right away if the file does not exist."""
    from llmctl.commands.generate import read_prompts
    from llmctl.data.text_files import STDIN, numbered_lines, open_binary

    if name == STDIN:  # answer each line as it arrives, while the pipe stays open
        return (line.removesuffix("\r") for line in read_prompts(whole=False, null=False))
    open_binary(name).close()
    return (line.rstrip("\r\n") for _, line in numbered_lines(name))


def typed_line(prompt: str) -> str:
    """Read a line from the terminal; the prompt goes to stderr if stdout is redirected."""
    if sys.stdout.isatty():
        return input(prompt)
    sys.stderr.write(prompt)
    sys.stderr.flush()
    return input()


def checked(text: str) -> str:
    """Return the text unchanged if it can be encoded as UTF-8.

    Raises: UsageError for bytes that the terminal could not decode.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the line is not valid text at character {error.start + 1}", "type it again") from None
    return text


def read_message(read: Callable[[str], str]) -> str:
    """Read one line, or the lines between two fences; end of input closes an open fence.

    Raises: EOFError at the end of input.
    """
    line = read("> ")
    if line.strip() != FENCE:
        return line
    lines: list[str] = []
    with suppress(EOFError):
        while (line := read("... ")).strip() != FENCE:
            lines.append(line)
    return "\n".join(lines)


# --- the conversation ------------------------------------------------------------------------------------------------


def converse(talk: "Chat") -> None:
    """Run the conversation in the terminal until the user quits; errors are shown and do not end it."""
    with suppress(ImportError):
        import readline  # noqa: F401 - adds line editing and history to `input`
    # The shell ignores SIGINT in background jobs; restore it: Ctrl-C stops an answer.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    while True:
        try:
            if not handle(talk, checked(read_message(typed_line))):
                return
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:
            note("\nCtrl-D or /exit quits")
        except LlmctlError as error:
            note(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""))


def play(talk: "Chat", lines: Iterator[str]) -> None:
    """Run a script until it ends or an error occurs.

    Raises: KeyboardInterrupt if an answer was interrupted: nobody is there to continue.
    """

    def read(_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    with suppress(EOFError):
        while handle(talk, read_message(read), is_script=True):
            pass


def handle(talk: "Chat", text: str, *, is_script: bool = False) -> bool:
    """Run a command or answer a message; return whether the conversation continues."""
    if not text.strip():
        return True
    command = re.fullmatch(r"/([a-z]+)(?:\s+(.*))?", text, re.DOTALL)
    if command is None:
        answer(talk, text, is_script=is_script)
        return True
    if command[1] not in COMMANDS:
        close = closest(command[1], COMMANDS)
        hint = (
            f"did you mean `/{close}`?" if close else "`/help` lists the commands; a leading space makes it a message"
        )
        raise UsageError(f"unknown command `/{command[1]}`", hint)
    return COMMANDS[command[1]](talk, (command[2] or "").strip())


def answer(talk: "Chat", text: str, *, is_script: bool) -> None:
    """Stream an answer, and print why it ended if the model did not end it."""
    result = talk.ask(text, show_answer)
    show_answer("\n")
    if result.is_cut:
        note("(the oldest turns no longer fit in the model's context and are dropped)")
    if result.finish == "interrupted" and is_script:
        raise KeyboardInterrupt
    if reason := ENDINGS.get(result.finish):
        note(reason.format(n=talk.config.max_tokens))


def show_answer(text: str) -> None:
    """Print part of an answer immediately, with control characters spelled out on a terminal."""
    if sys.stdout.isatty():
        text = plain(text)
    sys.stdout.write(text)
    sys.stdout.flush()


ENDINGS = {
    "length": "(stopped after {n} tokens; -n sets the maximum)",
    "context": "(the model's context is full; /reset clears the conversation)",
    "interrupted": "(stopped)",
}


def note_system(talk: "Chat") -> None:
    """Say if the model will not see the system prompt."""
    from llmctl.inference.chat import SYSTEM_NOTE, hides_system

    note(SYSTEM_NOTE, quiet=talk.template is None or not hides_system(talk.template, talk.system))


def set_system(talk: "Chat", text: str) -> bool:
    """`/system`: set or show the system prompt."""
    if text:
        talk.set_system(text)
        note_system(talk)
    else:
        note(talk.system or "(no system prompt)")
    return True


def reset(talk: "Chat", _: str) -> bool:
    """`/reset`: clear the conversation."""
    talk.reset()
    return True


def save(talk: "Chat", name: str) -> bool:
    """`/save`: write the conversation to a file.

    Raises: UsageError without a name or a message; OutputError for a file that exists or cannot be written.
    """
    import json

    from llmctl.files import write_text

    if not name:
        raise UsageError("`/save` needs a file name", "`/save talk.jsonl`")
    if not talk.messages:
        raise UsageError("the conversation is empty", "send a message first")
    path = Path(name).expanduser()
    if path.exists():
        raise OutputError(f"`{path}` already exists", "choose another name")
    write_text(path, json.dumps(talk.record(), ensure_ascii=False) + "\n")
    note(f"saved to {path}: {len(talk.messages)} messages")
    return True


def show_help(_: "Chat", __: str) -> bool:
    """`/help`: list the commands."""
    note(HELP)
    return True


def leave(_: "Chat", __: str) -> bool:
    """`/exit`: end the conversation."""
    return False


COMMANDS: Mapping[str, Callable[["Chat", str], bool]] = {
    "system": set_system,
    "reset": reset,
    "save": save,
    "help": show_help,
    "exit": leave,
}
