"""`llmctl tokenize`: a filter from text to token ids and back, and the subcommands `train`, `encode`, `trim`, `extend` and `transplant`."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmctl.commands.common import command_app, find_model, note, result, result_json
from llmctl.errors import UsageError

if TYPE_CHECKING:
    from llmctl.preparing.trim import Figures

app = command_app()


@app.callback(invoke_without_command=True)
def tokenize(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="Tokenizer or model; default: the newest run.")
    ] = None,
    decode: Annotated[bool, typer.Option("--decode", help="Convert ids to text.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print statistics of the tokenizer on the text.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line, or for --stats.")] = False,
) -> None:
    """Convert lines of text to lines of token ids (without the line end), or back with `--decode`.

    Examples:

      llmctl tokenize -m runs/latest < text.txt > ids.txt

      llmctl tokenize --stats < text.txt

      llmctl tokenize train book.txt -o tok --vocab-size 8000

      llmctl tokenize encode corpus/ --tokenizer tok -o shards

      llmctl tokenize trim models/minilm --keep english.txt -o small
    """
    if context.invoked_subcommand is not None:
        return
    if decode and stats:
        raise UsageError("`--decode` and `--stats` exclude each other", "use one of them")
    if sys.stdin.isatty():
        raise UsageError("no text on standard input", "`llmctl tokenize < text.txt`")
    from llmctl.tokenizer.load import load_tokenizer

    path = find_model(model, "any", quiet=model is not None)
    tokenizer = load_tokenizer(path)
    from llmctl.commands.generate import read_prompts
    from llmctl.preparing.tokenize import decode_lines, encode_lines, measure

    lines = read_prompts(whole=False, null=False)
    if stats:
        report = measure(tokenizer, lines).to_dict()
        if json:
            result_json(report)
        else:
            result("\n".join(f"{name:<16} {value:,}" for name, value in report.items()))
    elif decode:
        for text in decode_lines(tokenizer, lines):
            result_json({"text": text}) if json else write_line(text)
    else:
        for ids in encode_lines(tokenizer, lines):
            result_json({"ids": ids}) if json else write_line(" ".join(map(str, ids)))
    sys.stdout.flush()


def write_line(text: str) -> None:
    """Write a line without flushing: the output is buffered for speed."""
    sys.stdout.write(text + "\n")


@app.command()
def train(
    corpus: Annotated[
        list[str] | None, typer.Argument(help="Text: files, folders, globs; default: the built-in corpus.")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Output folder.")] = Path("tokenizer"),
    vocab_size: Annotated[int | None, typer.Option(help="Vocabulary size with byte and special tokens.")] = None,
    model_type: Annotated[str | None, typer.Option(help="bpe, unigram or char.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any other key: tokenizer.n_sentinels=32.")] = None,
    force: Annotated[bool, typer.Option("-f", "--force", help="Replace an existing output.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train a lossless tokenizer and print its folder.

    Examples:

      llmctl tokenize train book.txt -o tok --vocab-size 8000

      llmctl tokenize train 'poems/*.jsonl.gz' -o tok --model-type unigram
    """
    from llmctl.config import PretrainConfig
    from llmctl.preparing.tokenize import train as make
    from llmctl.recipe import load

    flags = {"tokenizer.vocab_size": vocab_size, "tokenizer.model_type": model_type}
    config = load(PretrainConfig, settings=set_ or [], flags=flags).config
    tokenizer = make(corpus or [], config.tokenizer, config.data, out, force=force)
    if tokenizer.vocab_size < config.tokenizer.vocab_size and config.tokenizer.model_type != "char":
        note(
            f"the corpus gives a vocabulary of {tokenizer.vocab_size:,}, smaller than the requested {config.tokenizer.vocab_size:,}"
        )
    record = {"tokenizer": str(out), "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256}
    result_json(record) if json else result(str(out))


@app.command()
def encode(
    corpus: Annotated[
        list[str] | None, typer.Argument(help="Text: files, folders, globs; default: the built-in corpus.")
    ] = None,
    tokenizer: Annotated[str, typer.Option(help="Tokenizer or model.")] = "tokenizer",
    out: Annotated[Path, typer.Option("-o", "--out", help="Output folder; an interrupted one is resumed.")] = Path(
        "shards"
    ),
    shard: Annotated[str, typer.Option(help="Encode only part i of n, as i/n (array jobs).")] = "0/1",
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: one per core.")] = 0,
    split: Annotated[
        str | None, typer.Option(help="Document boundary in .txt files: file, line or blank line.")
    ] = None,
    text_key: Annotated[str | None, typer.Option(help="Text field of jsonl, csv and parquet rows.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No summary on stderr.")] = False,
) -> None:
    """Encode a corpus into memory-mapped shards for `llmctl pretrain` and print their folder.

    Examples:

      llmctl tokenize encode corpus/ --tokenizer tok -o shards

      llmctl tokenize encode corpus/ --tokenizer tok -o shards --shard 3/16
    """
    from llmctl.config import PretrainConfig
    from llmctl.data.shards import parse_part
    from llmctl.preparing.tokenize import encode_corpus
    from llmctl.recipe import load

    data = load(PretrainConfig, flags={"data.split": split, "data.text_key": text_key}).config.data
    shards = encode_corpus(
        corpus or [],
        tokenizer,
        data,
        out,
        part=parse_part(shard),
        workers=workers,
        say=lambda text: note(text, quiet=quiet),
    )
    if json:
        whole = {} if shards is None else {"documents": shards.n_documents, "tokens": shards.n_tokens}
        result_json({"shards": str(out), "part": shard, "complete": shards is not None, **whole})
    else:
        result(str(out))


@app.command()
def trim(
    model: Annotated[str, typer.Argument(help="Model or tokenizer.")],
    keep: Annotated[list[str], typer.Option(help="Text whose pieces stay: files, folders, globs.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder, or X.safetensors for a single file.")],
    keep_chars: Annotated[
        str | None, typer.Option(help="Keep all pieces of these scripts as well: latin,han,cyrillic,...")
    ] = None,
    vocab_size: Annotated[
        int, typer.Option(min=0, help="Largest vocabulary: the most frequent pieces; 0: all that occur.")
    ] = 0,
    split: Annotated[
        str | None, typer.Option(help="Document boundary in .txt files: file, line or blank line.")
    ] = None,
    text_key: Annotated[str | None, typer.Option(help="Text field of jsonl, csv and parquet rows.")] = None,
    force: Annotated[bool, typer.Option("-f", "--force", help="Replace an existing output.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print only the path.")] = False,
) -> None:
    """Remove the pieces of a vocabulary that a corpus does not use, and their rows in the model; print its path.

    Text of the pieces that stay is encoded as before, and the model computes the same for it; other text is encoded in
    smaller pieces, characters or bytes. One passage in 20 is held out to measure how much text that is.

    Examples:

      llmctl tokenize trim models/minilm --keep english.txt -o small

      llmctl tokenize trim models/smol --keep corpus/ --keep-chars latin --vocab-size 20000 -o smol.safetensors
    """
    from llmctl.artifacts.find import find_named
    from llmctl.preparing.trim_model import trim_model, trim_tokenizer

    path = find_named(model, "any")
    documents = documents_of(keep, split, text_key)
    scripts = [name.strip() for name in (keep_chars or "").split(",") if name.strip()]
    write = trim_model if has_weights(path) else trim_tokenizer
    record = write(
        path, out, documents, scripts=scripts, most=vocab_size, force=force, say=lambda text: note(text, quiet=quiet)
    )
    report(out, record, json=json, quiet=quiet)


@app.command()
def extend(
    model: Annotated[str, typer.Argument(help="Model with a byte-level BPE tokenizer.")],
    with_: Annotated[list[str], typer.Option("--with", help="Text of the language or domain: files, folders, globs.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder, or X.safetensors for a single file.")],
    add: Annotated[int, typer.Option(min=1, help="Most pieces to add.")] = 4000,
    split: Annotated[
        str | None, typer.Option(help="Document boundary in .txt files: file, line or blank line.")
    ] = None,
    text_key: Annotated[str | None, typer.Option(help="Text field of jsonl, csv and parquet rows.")] = None,
    force: Annotated[bool, typer.Option("-f", "--force", help="Replace an existing output.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print only the path.")] = False,
) -> None:
    """Add pieces of another language or domain to a vocabulary, and their rows to the model; print its path.

    Merges are learned on top of those of the tokenizer; a new embedding is the mean of those that it replaces. Train the model
    on such text afterwards.

    Examples:

      llmctl tokenize extend models/smol --with chinese.txt --add 8000 -o smol-zh

      llmctl finetune smol-zh chinese.txt --task text
    """
    from llmctl.artifacts.find import find_named
    from llmctl.preparing.extend_model import extend_model

    path = find_named(model, "any")
    documents = documents_of(with_, split, text_key)
    record = extend_model(path, out, documents, add, force=force, say=lambda text: note(text, quiet=quiet))
    report(out, record, json=json, quiet=quiet)


@app.command()
def transplant(
    model: Annotated[str, typer.Argument(help="Model whose tokenizer is replaced.")],
    from_: Annotated[str, typer.Option("--from", help="Model, or tokenizer, whose tokenizer it gets.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder, or X.safetensors for a single file.")],
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How rows of new pieces are made: omp: of those of shared pieces, as in the other model; mean: of the "
            "pieces of the same text; auto: omp if the other model has weights [auto, omp, mean].",
        ),
    ] = "auto",
    atoms: Annotated[int, typer.Option(min=1, help="omp: most shared pieces that a row is made of.")] = 64,
    with_: Annotated[
        list[str] | None,
        typer.Option("--with", help="Text to compare the tokenizers on; default: the built-in corpus."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Document boundary in .txt files: file, line or blank line.")
    ] = None,
    text_key: Annotated[str | None, typer.Option(help="Text field of jsonl, csv and parquet rows.")] = None,
    force: Annotated[bool, typer.Option("-f", "--force", help="Replace an existing output.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print only the path.")] = False,
) -> None:
    """Give a model the tokenizer of another, for example of its teacher; print its path.

    Rows of pieces that both have stay; the others are made of them (orthogonal matching pursuit). Train or distill the model
    afterwards.

    Examples:

      llmctl tokenize transplant models/smol --from models/qwen -o smol-qwen

      llmctl distill models/qwen --student smol-qwen -d corpus/
    """
    from llmctl.artifacts.find import find_named
    from llmctl.preparing.transplant_model import METHODS, transplant_model

    if method not in METHODS:
        raise UsageError(f"`--method {method}` is not a method", ", ".join(METHODS))
    path, donor = find_named(model, "any"), find_named(from_, "any")
    if with_:
        documents = documents_of(with_, split, text_key)
    else:
        from llmctl.data.builtin import builtin_documents

        documents = iter(builtin_documents())
    record = transplant_model(
        path,
        donor,
        out,
        documents,
        method=method,
        n_atoms=atoms,
        force=force,
        say=lambda text: note(text, quiet=quiet),
    )
    report(out, record, json=json, quiet=quiet)


def documents_of(paths: Sequence[str], split: str | None, text_key: str | None) -> Iterator[str]:
    """Yield the documents of a corpus, read as by `encode`."""
    from llmctl.config import PretrainConfig
    from llmctl.data.sources import read_documents
    from llmctl.recipe import load

    data = load(PretrainConfig, flags={"data.split": split, "data.text_key": text_key}).config.data
    return read_documents(paths, text_key=data.text_key, split=data.split)


def report(out: Path, record: "Figures", *, json: bool, quiet: bool) -> None:
    """Print what has changed, and the path of the result."""
    for line in record.lines():
        note(line, quiet=quiet)
    result_json({"path": str(out), **record.to_dict()}) if json else result(str(out))


def has_weights(path: Path) -> bool:
    """Tell whether a path is a model, and not only a tokenizer."""
    return path.suffix in (".safetensors", ".gguf") or (path / "config.json").is_file()
