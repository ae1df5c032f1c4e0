"""The command table, and the only place that turns errors into exit codes.

Root help and suggestions come from the table below: they import no command and no Typer, so they stay fast.
"""

import errno
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise

from llmctl.errors import LlmctlError, UsageError
from llmctl.tables.names import closest

COMMANDS: dict[str, str] = {
    "pretrain": "Train a decoder, encoder or encoder-decoder from raw text.",
    "finetune": "Fine-tune a model on a task (chat, classify, ...): all weights, or an adapter.",
    "distill": "Distill a large model into a small one and report what quality remains.",
    "quantize": "Quantize a model and measure the loss in quality and the gain in speed.",
    "compress": "Compress a model to a file size: vocabulary, layers, widths and bits.",
    "generate": "Continue a prompt, or every line of standard input.",
    "chat": "Chat with a model in the terminal.",
    "fill": "Predict the masked tokens of a text with an encoder.",
    "classify": "Label texts with a model that has a classification head.",
    "evaluate": "Evaluate models on the same data, side by side.",
    "bench": "Measure the prefill and decoding speed of models on this machine.",
    "tokenize": "Convert text to token ids and back; train tokenizers; encode corpora.",
    "import": "Convert a published model (Hugging Face folder, GGUF) to a model folder.",
    "export": "Export a model as a single file, a Hugging Face folder or GGUF.",
    "merge": "Merge models that were trained from one model.",
    "inspect": "Show the metadata of a model without loading its weights.",
    "runs": "List, show, compare and remove training runs.",
    "use": "Set the default model.",
    "doctor": "Check the installation, and the network for training on several hosts.",
    "presets": "List the model presets with sizes and sources.",
}

SUBCOMMANDS = {"distill": ("cache",)}
"""Subcommands that live in their own file, such as `distill cache` in `distill_cache.py`."""

EXIT_CODES = """exit codes:
  0  done                          7  optional package missing
  1  unclassified failure          8  output cannot be written
  2  invalid command or input      9  run folder is busy
  3  not found                    10  gate missed
  4  artifact is damaged          75  stopped by a limit, resumable
  5  out of memory           130/143  interrupted, checkpoint saved
  6  training diverged           141  pipe closed"""


def root_help() -> str:
    """Return the text of `llmctl --help`."""
    rows = "\n".join(f"  {name:<10} {summary}" for name, summary in COMMANDS.items())
    return f"""Usage: llmctl COMMAND [ARGS]...

Train, distill and compress language models, one command per step.

examples:
  llmctl pretrain --minutes 1                 train a small model on the built-in corpus
  llmctl generate "The function returns"      continue a prompt with the newest model
  llmctl pretrain --objective mlm && llmctl fill "a <mask> of strings"

commands:
{rows}

options:
  -h, --help     show this help; `llmctl COMMAND --help` shows that of one command
  -V, --version  show the version
  --install-completion, --show-completion [bash|zsh|fish]
                 complete command lines with the Tab key; goes alone
  --debug        show the stack trace of an error; goes before the command

{EXIT_CODES}
"""


FILTERS = {"bench", "classify", "evaluate", "fill", "generate", "inspect", "presets", "runs", "tokenize"}
"""Commands that SIGPIPE may end, as it ends `cat`; a training run must survive a closed pipe."""


def end_with_the_pipe(argv: Sequence[str]) -> None:
    """Restore the default SIGPIPE action for filters, so that a closed pipe ends them quietly (exit code 141)."""
    if argv[:1] and argv[0] in FILTERS and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def run(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    args, started = list(argv), time.monotonic()
    debug = bool(os.environ.get("LLMCTL_DEBUG"))
    if args[:1] == ["--debug"]:
        debug, args = True, args[1:]
    show_warnings()
    try:
        if "_LLMCTL_COMPLETE" in os.environ:
            from llmctl.commands.shell_completion import complete

            sys.stdout.write("".join(f"{word}\n" for word in complete(args, COMMANDS, SUBCOMMANDS)))
            sys.stdout.flush()
            return 0
        return dispatch(args, started)
    except Exception as error:
        if debug:
            raise
        return report(error, args)
    except KeyboardInterrupt as error:
        sys.stderr.write("interrupted\n")
        return 128 + int(getattr(error, "number", signal.SIGINT))


def show_warnings() -> None:
    """Show what the package logs on stderr, each text once; of several processes the first one speaks."""
    shown: set[str] = set()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            from llmctl.distributed.ranks import is_guest

            text = record.getMessage()
            if text not in shown and not is_guest(os.environ):
                shown.add(text)
                sys.stderr.write(f"{record.levelname.lower()}: {text}\n")

    log = logging.getLogger("llmctl")
    log.handlers, log.propagate = [Handler()], False


def dispatch(args: list[str], started: float | None = None) -> int:
    """Import and run the command that `args` names, and no other; it finds `started` as its context's object."""
    if not args or args[0] in ("-h", "--help", "help"):
        sys.stdout.write(root_help())
        sys.stdout.flush()
        return 0
    if args[0] in ("--install-completion", "--show-completion"):
        return complete_in(*args)
    name = args[0]
    if name not in COMMANDS:
        close = closest(name, COMMANDS)
        what = "option" if name.startswith("-") else "command"
        hint = f"did you mean `llmctl {close}`?" if close else "`llmctl --help` lists the commands"
        return show(f"unknown {what} `{name}`", hint, 2)
    rest = args[1:]
    # `import` is a keyword, so its file cannot be named after it.
    file = {"import": "import_"}.get(name, name)
    if rest and rest[0] in SUBCOMMANDS.get(name, ()):
        file, name, rest = f"{name}_{rest[0]}", f"{name} {rest[0]}", rest[1:]
    module = import_module(f"llmctl.commands.{file}")
    from typer.main import get_command

    refuse_empty_output(rest)
    if {"-q", "--quiet"} & set(rest):  # downloads may begin anywhere that a model is named
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        status = get_command(module.app).main(rest, prog_name=f"llmctl {name}", standalone_mode=False, obj=started)
    except SystemExit as stop:  # Click's own answer to a closed pipe is exit code 1
        if isinstance(stop.__context__, OSError) and stop.__context__.errno == errno.EPIPE:
            raise BrokenPipeError from stop
        raise
    sys.stdout.flush()
    return status if isinstance(status, int) else 0


def refuse_empty_output(args: Sequence[str]) -> None:
    """Refuse `-o ""`, as of a variable that is not set: as a path it would mean this folder.

    Raises: UsageError.
    """
    before = args[: args.index("--")] if "--" in args else args
    if any(option in ("-o", "--out") and not value for option, value in pairwise(before)) or "--out=" in before:
        raise UsageError("`-o` is empty", "name an output, or omit it")


def complete_in(option: str, shell: str | None = None, *_: str) -> int:
    """Show the script that completes command lines in a shell, or install it."""
    from llmctl.commands.shell_completion import SCRIPTS, install, shell_named

    name = shell_named(shell, os.environ)
    if option == "--show-completion":
        sys.stdout.write(SCRIPTS[name])
    else:
        sys.stdout.write(f"{install(name)}\n")
        sys.stderr.write(f"{name} completes llmctl's command lines from its next start on\n")
    sys.stdout.flush()
    return 0


UNWRITABLE = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT)
"""Reasons for which a file system refuses to write, or two of them to read."""


def report(error: Exception, args: Sequence[str] = ()) -> int:
    """Print an error and its hint and return the exit code; `args` is the command line that raised it."""
    if isinstance(error, LlmctlError):
        return show(str(error), error.hint, error.exit_code)
    if hasattr(error, "format_message"):  # usage errors of Click, which Typer may vendor under another name
        context = getattr(error, "ctx", None)
        if context is not None and hasattr(error, "option_name") and hasattr(error, "possibilities"):
            from llmctl.commands.option_names import unknown_option

            return show(*unknown_option(error), 2)
        hint = f"`{context.command_path} --help` shows the options" if context else "`llmctl --help` lists the commands"
        return show(error.format_message().rstrip(".") + given_value(error, args), hint, 2)
    if type(error).__name__ == "Abort":  # Typer turns KeyboardInterrupt into Abort
        sys.stderr.write("interrupted\n")
        return 130
    if isinstance(error, BrokenPipeError):
        # The reader is gone: redirect stdout, or the flush at interpreter exit would print another error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return show(f"out of memory: {error}", "reduce `--batch-size` or `--seq-len`", 5)
    if isinstance(error, OSError) and (error.errno in UNWRITABLE or error.filename):
        return show(*refused_file(error))
    return show(
        f"unexpected {type(error).__name__}: {error}", "this is a bug; `llmctl --debug ...` shows the stack trace", 1
    )


def refused_file(error: OSError) -> tuple[str, str, int]:
    """Return message, hint and exit code for a file that cannot be read or written."""
    from llmctl.files import HINTS, refuse_to_read, unreadable

    if unreadable(error):
        refused = refuse_to_read(error)
        return str(refused), refused.hint, refused.exit_code
    if error.errno == errno.ENAMETOOLONG:
        name = str(error.filename)
        return f"`{name[:60]}…` is too long for a file name: {len(name)} characters", "give a shorter one", 2
    if error.errno in UNWRITABLE:
        return f"cannot write `{error.filename or 'standard output'}`: {error.strerror}", HINTS[error.errno], 8
    status = 3 if isinstance(error, FileNotFoundError) else 1
    return f"`{error.filename}`: {error.strerror}", "check the path and its permissions", status


def given_value(error: Exception, args: Sequence[str]) -> str:
    """Return the value of the option that Typer rejects; its own message omits it."""
    options = getattr(getattr(error, "param", None), "opts", [])
    values = [value for option, value in pairwise(args) if option in options]
    return f" (got `{values[-1]}`)" if values else ""


def show(message: str, hint: str, exit_code: int) -> int:
    """Write an error and its hint to stderr, or pass them to the launcher if this is one of its processes."""
    from llmctl.distributed.ranks import tell_launcher
    from llmctl.runs.terminal import plain

    text = plain(f"error: {message}\n" + (f"\nhint: {hint}\n" if hint else ""))
    if not tell_launcher(text, os.environ):
        sys.stderr.write(text)
    return exit_code
