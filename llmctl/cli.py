"""The command table and the only place that turns an error into an exit code.

Root help and did-you-mean come from the table below, so that no command, and no Typer, is imported for them.
"""

import errno
import os
import signal
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from itertools import pairwise

from llmctl.errors import LlmctlError

COMMANDS: dict[str, str] = {
    "pretrain": "Train a model from raw text: decoder, encoder or encoder-decoder.",
    "finetune": "Adapt a model to a task, all of it or by an adapter: chat, classify, translate, ...",
    "distill": "Make a small model of a large one, and report what it keeps.",
    "quantize": "Hold a model's weights in few bits, and measure what it costs and brings.",
    "generate": "Continue a prompt, or every line of a pipe.",
    "chat": "Talk with a model in the terminal.",
    "fill": "Fill the masks of a text with an encoder.",
    "classify": "Give texts their labels with a model that has a classification head.",
    "evaluate": "Measure models on the same data, side by side.",
    "bench": "Measure how fast models read and write on this machine, side by side.",
    "tokenize": "Turn text into token ids and back; train tokenizers; encode corpora.",
    "import": "Bring a published model (Hugging Face folder, GGUF) into a model folder.",
    "export": "Write a model as one file or as a Hugging Face folder.",
    "inspect": "Show what a model file holds, without loading it.",
    "runs": "List, show, compare and remove training runs.",
    "use": "Choose the model that commands take when none is named.",
    "doctor": "Check the installation, and the network between hosts that are to train together.",
    "presets": "List the model presets with their sizes and sources.",
}

SECOND_WORDS = {"distill": ("cache",)}
"""Commands whose first argument may be a word of its own; it has a file of its own, `distill_cache.py`."""

EXIT_CODES = """exit codes:
  0 done                         6 training diverged               75 stopped by a limit, resumable
  1 unclassified failure         7 an optional package is missing  130/143 interrupted, checkpoint saved
  2 command or input is wrong    8 output cannot be written        141 the pipe was closed
  3 something was not found      9 the run folder is busy
  4 an artifact is damaged      10 a gate was missed
  5 out of memory"""


def root_help() -> str:
    """Return the text of `llmctl --help`."""
    rows = "\n".join(f"  {name:<10} {summary}" for name, summary in COMMANDS.items())
    return f"""Usage: llmctl COMMAND [ARGS]...

Train, distill and compress language models, one command per step.

examples:
  llmctl pretrain --minutes 1                 train a small model on an embedded corpus
  llmctl generate "The function returns"      continue a prompt with the newest model
  llmctl pretrain --objective mlm && llmctl fill "a <mask> of strings"

commands:
{rows}

options:
  -h, --help     this text; `llmctl COMMAND --help` for one command
  -V, --version  the version
  --debug        before the command: show the stack trace of an error

{EXIT_CODES}
"""


FILTERS = {"bench", "classify", "evaluate", "fill", "generate", "inspect", "presets", "runs", "tokenize"}
"""Commands that end with the pipe they write to, as `cat` does; a training run must not."""


def end_with_the_pipe(argv: Sequence[str]) -> None:
    """Let the operating system end a filter whose reader has gone (141 in the shell), before any buffer complains."""
    if argv[:1] and argv[0] in FILTERS and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def run(argv: Sequence[str]) -> int:
    """Run one command line and return the exit code of the process."""
    args = list(argv)
    debug = bool(os.environ.get("LLMCTL_DEBUG"))
    if args[:1] == ["--debug"]:
        debug, args = True, args[1:]
    try:
        return dispatch(args)
    except Exception as error:
        if debug:
            raise
        return report(error, args)
    except KeyboardInterrupt as error:
        sys.stderr.write("interrupted\n")
        return 128 + int(getattr(error, "number", signal.SIGINT))


def dispatch(args: list[str]) -> int:
    """Find the command that `args` name, import only that one, and run it."""
    if not args or args[0] in ("-h", "--help", "help"):
        sys.stdout.write(root_help())
        sys.stdout.flush()
        return 0
    name = args[0]
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, n=1)
        what = "option" if name.startswith("-") else "command"
        hint = f"did you mean `llmctl {close[0]}`?" if close else "llmctl --help lists the commands"
        return show(f"there is no {what} `{name}`", hint, 2)
    rest = args[1:]
    # `import` is a keyword, so its file cannot be named after it.
    file = {"import": "import_"}.get(name, name)
    if rest and rest[0] in SECOND_WORDS.get(name, ()):
        file, name, rest = f"{name}_{rest[0]}", f"{name} {rest[0]}", rest[1:]
    module = import_module(f"llmctl.commands.{file}")
    from typer.main import get_command

    status = get_command(module.app).main(rest, prog_name=f"llmctl {name}", standalone_mode=False)
    sys.stdout.flush()
    return status if isinstance(status, int) else 0


def report(error: Exception, args: Sequence[str] = ()) -> int:
    """Print what went wrong in two lines and return its exit code; `args` is the command line it came from."""
    if isinstance(error, LlmctlError):
        return show(str(error), error.hint, error.exit_code)
    if hasattr(error, "format_message"):  # Typer's own usage errors, whichever Click it carries
        context = getattr(error, "ctx", None)
        hint = f"{context.command_path} --help shows the options" if context else ""
        return show(error.format_message().rstrip(".") + given_value(error, args), hint, 2)
    if type(error).__name__ == "Abort":  # what Typer makes of Ctrl-C
        sys.stderr.write("interrupted\n")
        return 130
    if isinstance(error, BrokenPipeError):
        # The reader has gone; keep the interpreter's own flush at exit from complaining about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return show(f"out of memory: {error}", "a smaller --batch-size or --seq-len needs less", 5)
    if isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.EDQUOT,
    ):
        return show(
            f"cannot write `{error.filename or 'output'}`: {error.strerror}",
            "free some space or choose another place with -o",
            8,
        )
    if isinstance(error, OSError) and error.filename:
        return show(f"`{error.filename}`: {error.strerror}", "", 3 if isinstance(error, FileNotFoundError) else 1)
    return show(f"unexpected {type(error).__name__}: {error}", "this is a defect; `llmctl --debug ...` shows where", 1)


def given_value(error: Exception, args: Sequence[str]) -> str:
    """Return what stood after the option that Typer complains about; its own message leaves it out."""
    options = getattr(getattr(error, "param", None), "opts", [])
    values = [value for option, value in pairwise(args) if option in options]
    return f" (it is `{values[-1]}`)" if values else ""


def show(message: str, hint: str, exit_code: int) -> int:
    """Write one error in the house's form to stderr, or leave it to the process that started this one among others."""
    from llmctl.distributed.ranks import tell_launcher

    text = f"error: {message}\n" + (f"\nhint: {hint}\n" if hint else "")
    if not tell_launcher(text, os.environ):
        sys.stderr.write(text)
    return exit_code
