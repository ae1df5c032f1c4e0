"""`llmctl chat`: a conversation with a model in the terminal, or from a script; answers on stdout."""

import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmctl.commands.common import AdapterNames, KeysAndValues, command_app, find_model, note
from llmctl.config import GenerateConfig
from llmctl.errors import LlmctlError, OutputError, UsageError

if TYPE_CHECKING:
    from llmctl.inference.chat import Chat

app = command_app()
DEFAULT = GenerateConfig()
MAX_TOKENS = 512
"""An answer is longer than what `generate` continues a prompt with."""
FENCE = '"""'
HELP = f"""/system TEXT  set what the model is told first; without TEXT show it
/reset        forget the conversation; the system text stays
/save FILE    write the conversation as a line of JSON, for llmctl finetune --task chat
/exit         leave (so does Ctrl-D)
/help         this text
{FENCE}           begins and ends a message of several lines
Ctrl-C stops an answer. A message that begins with a command's name: put a space before it."""


@app.command()
def chat(
    name: Annotated[str | None, typer.Argument(metavar="MODEL", help="As -m.")] = None,
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="A model folder or file, a run, or `latest`.")
    ] = None,
    adapter: AdapterNames = None,
    system: Annotated[str, typer.Option("-s", "--system", help="What the model is told first.")] = "",
    max_tokens: Annotated[
        int, typer.Option("-n", "--max-tokens", "--max-new-tokens", help="Tokens of an answer at most.")
    ] = MAX_TOKENS,
    temperature: Annotated[
        float, typer.Option("-t", "--temperature", "--temp", help="0 is greedy.")
    ] = DEFAULT.temperature,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")] = DEFAULT.top_p,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 is off.")] = DEFAULT.top_k,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the best.")] = DEFAULT.min_p,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = DEFAULT.seed,
    kv: KeysAndValues = DEFAULT.kv,
    script: Annotated[
        str | None, typer.Option(metavar="FILE", help="Messages and commands, one a line, instead of a terminal; `-`.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Do not say which model is used.")] = False,
) -> None:
    r"""Talk with a model in the terminal; /help lists what can be typed.

    The model's own chat template is used, or a plain one where it has none. With --script every line is a message or
    a command, and stdout gets the answers.

    Examples:

      llmctl chat

      llmctl chat -m runs/0003 -s "Answer in one sentence." -t 0

      printf 'Hello\nAnd you?\n/save talk.jsonl\n' | llmctl chat --script -
    """
    if script is None and not sys.stdin.isatty():
        raise UsageError(
            "standard input is not a terminal",
            "`llmctl generate --chat -` answers lines; --script - plays a conversation",
        )
    if name is not None and model is not None and name != model:
        raise UsageError(f"two models are named: `{name}` and `{model}`", "name one")
    lines = None if script is None else script_lines(script)
    path = find_model(model if name is None else name, "generate", quiet=quiet, adapters=adapter)
    from llmctl.artifacts.adapters import apply_adapters
    from llmctl.artifacts.load import load_model
    from llmctl.commands.generate import argument
    from llmctl.inference.chat import PLAIN_NOTE, Chat
    from llmctl.inference.sampling import check

    config = GenerateConfig(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, kv=kv
    )
    check(config)
    loaded = load_model(path, device=device, dtype=dtype, able="generate", packed=True)
    loaded = apply_adapters(loaded, adapter or [], able="generate")
    talk = Chat(loaded, config, argument(system))
    if talk.template is not None and talk.template.is_plain:
        note(PLAIN_NOTE, quiet=quiet)
    if lines is not None:
        play(talk, lines)
        return
    note("/help lists the commands; Ctrl-D leaves", quiet=quiet)
    converse(talk)


# --- where lines come from -------------------------------------------------------------------------------------------


def script_lines(name: str) -> Iterator[str]:
    """Return the lines of a script; a missing one is named at once."""
    from llmctl.commands.generate import read_prompts
    from llmctl.data.text_files import STDIN, numbered_lines, open_binary

    if name == STDIN:  # answered line by line, while the pipe stays open
        return (line.removesuffix("\r") for line in read_prompts(whole=False, null=False))
    open_binary(name).close()
    return (line.rstrip("\r\n") for _, line in numbered_lines(name))


def typed_line(prompt: str) -> str:
    """Ask the terminal for a line; the prompt is no result, so it leaves stdout alone where that is not the terminal."""
    if sys.stdout.isatty():
        return input(prompt)
    sys.stderr.write(prompt)
    sys.stderr.flush()
    return input()


def checked(text: str) -> str:
    """Return what was typed.

    Raises: UsageError for bytes that the terminal's encoding does not have.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the line is not text at character {error.start + 1}", "type it again") from None
    return text


def read_message(read: Callable[[str], str]) -> str:
    """Read a line, or the lines between two fences.

    Raises: EOFError where there are no more; an open fence ends there, too.
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
    """Talk with the person at the terminal until they leave; no mistake ends the conversation."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives `input` its editing and its history
    # Of whom a script starts in the background, the shell lets Ctrl-C be ignored; here it is how an answer is stopped.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    while True:
        try:
            if not handle(talk, checked(read_message(typed_line))):
                return
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:
            note("\nCtrl-D or /exit leaves")
        except LlmctlError as error:
            note(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""))


def play(talk: "Chat", lines: Iterator[str]) -> None:
    """Play a script to its end, or to its first mistake.

    Raises: KeyboardInterrupt when an answer was interrupted: nobody is there to go on.
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
    """Do what a line says and tell whether the conversation goes on."""
    if not text.strip():
        return True
    found = re.fullmatch(r"/([a-z]+)(?:\s+(.*))?", text, re.DOTALL)
    if found is None:
        answer(talk, text, is_script=is_script)
        return True
    if found[1] not in COMMANDS:
        close = get_close_matches(found[1], COMMANDS, n=1)
        hint = (
            f"did you mean `/{close[0]}`?"
            if close
            else "/help lists the commands; a space before it makes it a message"
        )
        raise UsageError(f"there is no command `/{found[1]}`", hint)
    return COMMANDS[found[1]](talk, (found[2] or "").strip())


def answer(talk: "Chat", text: str, *, is_script: bool) -> None:
    """Show an answer as it comes, and say why it ended where that is no end of its own."""
    given = talk.ask(text, show_answer)
    show_answer("\n")
    if given.is_cut:
        note("(the oldest turns no longer fit into the model's context and are left out)")
    if given.finish == "interrupted" and is_script:
        raise KeyboardInterrupt
    if reason := ENDINGS.get(given.finish):
        note(reason.format(n=talk.config.max_tokens))


def show_answer(text: str) -> None:
    """Write a piece of an answer at once; what a model writes is not to control the terminal."""
    if sys.stdout.isatty():
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
    sys.stdout.write(text)
    sys.stdout.flush()


ENDINGS = {
    "length": "(stopped after {n} tokens; -n sets how many)",
    "context": "(the model's context is full; /reset begins anew)",
    "interrupted": "(stopped)",
}


def tell_system(talk: "Chat", text: str) -> bool:
    """`/system`: set or show the system's text."""
    if text:
        talk.instruct(text)
    else:
        note(talk.system or "(no system text)")
    return True


def forget(talk: "Chat", _: str) -> bool:
    """`/reset`: begin anew."""
    talk.reset()
    return True


def save(talk: "Chat", name: str) -> bool:
    """`/save`: write the conversation so far.

    Raises: UsageError without a name or an answer; OutputError for a file that is there or cannot be written.
    """
    import json

    from llmctl.files import write_text

    if not name:
        raise UsageError("/save needs a file's name", "/save talk.jsonl")
    if not talk.messages:
        raise UsageError("there is nothing to save yet", "say something first")
    path = Path(name).expanduser()
    if path.exists():
        raise OutputError(f"`{path}` exists already", "choose another name")
    write_text(path, json.dumps(talk.record(), ensure_ascii=False) + "\n")
    note(f"saved to {path}: {len(talk.messages)} messages")
    return True


def show_help(_: "Chat", __: str) -> bool:
    """`/help`: what can be typed."""
    note(HELP)
    return True


def leave(_: "Chat", __: str) -> bool:
    """`/exit`: no more."""
    return False


COMMANDS: Mapping[str, Callable[["Chat", str], bool]] = {
    "system": tell_system,
    "reset": forget,
    "save": save,
    "help": show_help,
    "exit": leave,
}
