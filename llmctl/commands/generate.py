"""`llmctl generate`: prompts from an argument or standard input -> completions on stdout, in order."""

import os
import sys
from collections.abc import Collection, Iterator
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmctl.commands.common import (
    AdapterNames,
    KeysAndValues,
    command_app,
    find_model,
    note,
    note_decoding,
    prepare_decoding,
    result_json,
)
from llmctl.config import GenerateConfig
from llmctl.errors import UsageError

if TYPE_CHECKING:
    from llmctl.artifacts.load import Loaded
    from llmctl.inference.chat import Turn
    from llmctl.inference.generate import Completion

app = command_app()
DEFAULT = GenerateConfig()


@app.command()
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help=r"Prompt; `-`: one per line of standard input, answered in one line each: newlines become \n.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("-m", "--model", help="Model folder, file, run or `latest`.")] = None,
    adapter: AdapterNames = None,
    max_tokens: Annotated[
        int, typer.Option("-n", "--max-tokens", "--max-new-tokens", help="Maximum new tokens.")
    ] = DEFAULT.max_tokens,
    temperature: Annotated[
        float, typer.Option("-t", "--temperature", "--temp", help="Sampling temperature; 0: greedy.")
    ] = DEFAULT.temperature,
    top_k: Annotated[int, typer.Option(help="Sample from the k most likely tokens; 0: off.")] = DEFAULT.top_k,
    top_p: Annotated[
        float, typer.Option(help="Sample from the top tokens up to this cumulative probability; 1: off.")
    ] = DEFAULT.top_p,
    min_p: Annotated[
        float, typer.Option(help="Drop tokens below this fraction of the top token's probability.")
    ] = DEFAULT.min_p,
    repetition_penalty: Annotated[
        float, typer.Option(help="Penalty for repeated tokens; 1: off.")
    ] = DEFAULT.repetition_penalty,
    stop: Annotated[list[str] | None, typer.Option(help="String that ends generation; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Sampling seed.")] = DEFAULT.seed,
    beams: Annotated[int, typer.Option(help="Beam width; above 1 replaces sampling.")] = DEFAULT.beams,
    length_penalty: Annotated[float, typer.Option(help="Above 1 favors longer beams.")] = DEFAULT.length_penalty,
    batch_size: Annotated[
        int, typer.Option(help="Prompts decoded together; 1: answer line by line.")
    ] = DEFAULT.batch_size,
    kv: KeysAndValues = DEFAULT.kv,
    whole: Annotated[bool, typer.Option("--whole", help="Read all of standard input as one prompt.")] = False,
    null: Annotated[
        bool, typer.Option("-0", "--null", help="Separate prompts and completions by NUL, not newline.")
    ] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Treat each prompt as a user message and apply the chat template.")
    ] = False,
    system: Annotated[str, typer.Option("-s", "--system", help="System prompt (with --chat).")] = "",
    ids: Annotated[bool, typer.Option("--ids", help="Read and print token ids separated by spaces.")] = False,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="Print text while it is generated.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object per prompt.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Do not print which model is used.")] = False,
) -> None:
    r"""Continue a prompt, or every line of standard input; print only the new text.

    Examples:

      llmctl generate "The function returns"

      llmctl generate -t 0 -n 20 - < prompts.txt > answers.txt

      cat article.txt | llmctl generate --whole -m runs/0003 --json

      llmctl generate --chat -s "Answer in one word." "What is the capital of France?"
    """
    from llmctl.inference.settings import check

    config = GenerateConfig(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        seed=seed,
        beams=beams,
        length_penalty=length_penalty,
        batch_size=batch_size,
        kv=kv,
    )
    check(config)
    is_piped = prompt in (None, "-")
    if is_piped and prompt is None and sys.stdin.isatty():
        raise UsageError(
            "no prompt", '`llmctl generate "The function returns"`, or `-` to read prompts from standard input'
        )
    if system and not chat:
        raise UsageError(f"`--system {system}` needs `--chat`", "add `--chat`, or put the text into the prompt")
    if chat and ids:
        raise UsageError("`--chat` takes text, `--ids` takes token ids", "use one of them")
    texts = read_prompts(whole=whole, null=null, quiet=quiet) if is_piped else iter([argument(prompt)])
    if (whole or not is_piped) and not ids and not chat:
        texts = noting_empty(texts, quiet=quiet)
    path = find_model(model, "generate", quiet=quiet, adapters=adapter)
    from llmctl.artifacts.adapters import apply_adapters
    from llmctl.artifacts.load import load_model
    from llmctl.formats.generation_settings import unused_settings

    prepare_decoding(device=device, quiet=quiet)
    loaded = load_model(path, device=device, dtype=dtype, able="generate", packed=True)
    loaded = apply_adapters(loaded, adapter or [], able="generate")
    note(unused := unused_settings(loaded.artifact.files), quiet=quiet or not unused)
    note_decoding(loaded, quiet=quiet)
    is_streamed = (not is_piped or whole) and not json and not ids and beams == 1
    is_streamed = is_streamed and (sys.stdout.isatty() if stream is None else stream)
    turn = turn_of(loaded, argument(system), quiet=quiet) if chat else None
    if loaded.tokenizer is not None and not ids:
        n_sentinels = len(loaded.tokenizer.sentinel_ids()) if loaded.model.config.family == "encoder_decoder" else 0
        names = sorted(set(loaded.tokenizer.special_tokens()) - {f"<extra_id_{n}>" for n in range(n_sentinels)})
        texts = noting_special(texts, names, "" if chat else "; --chat renders messages with them", quiet=quiet)
    is_record = is_piped and not whole
    empty = write(
        loaded, texts, config, json=json, null=null, ids=ids, stream=is_streamed, is_record=is_record, turn=turn
    )
    if not is_record and not json:
        note(NOTHING_NEW.get(empty, ""), quiet=quiet or empty not in NOTHING_NEW)


EMPTY_PROMPT = "note: the prompt is empty; the model starts a new text"
EMPTY_STDIN = "note: standard input is empty, so there is no result"
NOTHING_NEW = {
    "eos": "note: the model ended the text at once; another prompt, --seed or a higher --temperature may give some",
    "stop": "note: the text began with a stop string, so nothing of it is left",
}
"""What is said when a prompt gets an empty completion, by the reason that ended it."""


def noting_empty(texts: Iterator[str], *, quiet: bool) -> Iterator[str]:
    """Yield the texts, and print a note at an empty one: a text is then generated from its beginning."""
    for text in texts:
        note(EMPTY_PROMPT, quiet=quiet or bool(text))
        yield text


def noting_special(texts: Iterator[str], names: Collection[str], hint: str, *, quiet: bool) -> Iterator[str]:
    """Yield the texts, and print a note at the first that has the name of a special token in it: text is literal."""
    is_noted, marks = quiet, {name[:1] for name in names}
    for text in texts:
        may_have = not is_noted and any(mark in text for mark in marks)  # a tokenizer can have thousands of names
        found = next((name for name in names if name in text), "") if may_have else ""
        if found:
            is_noted = True
            note(f"note: `{found}` in a text is read as ordinary text, not as the special token{hint}")
        yield text


def turn_of(loaded: "Loaded", system: str, *, quiet: bool) -> "Turn":
    """Return the renderer of chat messages, and print a note if the model has no chat template."""
    from llmctl.inference.chat import PLAIN_NOTE, SYSTEM_NOTE, Turn, hides_system
    from llmctl.inference.chat_template import template_of

    template = template_of(loaded)
    note(PLAIN_NOTE, quiet=quiet or not template.is_plain)
    note(SYSTEM_NOTE, quiet=not hides_system(template, system))
    return Turn(template, system)


def argument(text: str | None) -> str:
    """Return a command-line argument, decoded strictly.

    Raises: UsageError naming the first byte that is not UTF-8.
    """
    from llmctl.data.text_files import decode_utf8

    return decode_utf8(os.fsencode(text or ""), "argument")


def read_prompts(*, whole: bool, null: bool, quiet: bool = False) -> Iterator[str]:
    """Yield the prompts on standard input, decoded strictly; print a note if there is none."""
    from llmctl.data.text_files import STDIN_NAME, decode_utf8

    stdin = sys.stdin.buffer
    if whole:
        yield decode_utf8(stdin.read(), STDIN_NAME)
        return
    offset, end = 0, b"\0" if null else b"\n"
    for raw in split_stream(stdin, end):
        yield decode_utf8(raw.removesuffix(end), STDIN_NAME, offset)
        offset += len(raw)
    note(EMPTY_STDIN, quiet=quiet or offset > 0)


def split_stream(stdin: Any, end: bytes) -> Iterator[bytes]:
    """Yield the records of a binary stream, including their terminators."""
    if end == b"\n":
        yield from stdin
        return
    rest = b""
    while block := stdin.read1(1 << 16):
        *records, rest = (rest + block).split(end)
        yield from (record + end for record in records)
    if rest:
        yield rest


def write(
    loaded: "Loaded",
    texts: Iterator[str],
    config: GenerateConfig,
    *,
    json: bool,
    null: bool,
    ids: bool,
    stream: bool,
    is_record: bool,
    turn: "Turn | None" = None,
) -> str:
    """Complete prompts in windows, so that output starts before a long input ends; `turn`: treat them as chat messages.

    Returns why the last completion is empty: its finish reason, or nothing if it is not.
    """
    from llmctl.inference.encoding import encode_prompt
    from llmctl.inference.generate import WINDOW_BATCHES, Prompt, generate, parse_ids
    from llmctl.inference.prefix import Prefix

    end = "\0" if null else "\n"
    encode = turn.encode if turn else partial(encode_prompt, loaded)
    config = turn.config(config) if turn else config
    prompts = (Prompt(n, parse_ids(text, n) if ids else encode(text), text) for n, text in enumerate(texts))
    # On interrupt show partial text, but never a partial record: it would look complete.
    is_single_text = not (is_record or json or ids)
    unprinted: list[str] = []

    lead = turn.lead() if turn else None

    def on_text(_: int, text: str) -> None:
        text = lead.cut(text) if lead else text
        if stream:
            write_text(text)
        else:
            unprinted.append(text)

    # A window is several batches, so that prompts of similar length share one. The first window is a single batch, so
    # that output starts early. With batch size 1 each line is answered before the next is read.
    largest = config.batch_size * WINDOW_BATCHES if config.batch_size > 1 else 1
    size, prefix, empty = config.batch_size, Prefix(), ""
    while window := list(islice(prompts, size)):
        size = min(2 * size, largest)
        try:
            ends = turn.ends if turn else ()
            callback = on_text if is_single_text else None
            completions = list(generate(loaded, window, config, callback, ends=ends, prefix=prefix))
        except KeyboardInterrupt:
            if stream or unprinted:
                write_text("".join(unprinted) + end)
            raise
        for completion in map(turn.clean, completions) if turn else completions:
            empty = "" if completion.text or (ids and completion.ids) else completion.finish
            if stream:
                write_text(end)
            elif json:
                result_json(as_record(completion))
            else:
                text = " ".join(map(str, completion.ids)) if ids else completion.text
                write_text((one_line(text) if is_record and not null else text) + end)
    return empty


def write_text(text: str) -> None:
    """Write text unchanged and flush."""
    sys.stdout.write(text)
    sys.stdout.flush()


def one_line(text: str) -> str:
    """Escape newlines and backslashes, so that N prompts give N lines."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r") if set(text) & set("\n\r\\") else text


def as_record(completion: "Completion") -> dict[str, object]:
    """Return a completion as the record that `--json` prints."""
    return {
        "i": completion.index,
        "prompt": completion.prompt,
        "text": completion.text,
        "ids": completion.ids,
        "n_tokens": len(completion.ids),
        "finish": completion.finish,
    }
