"""Small samples of a corpus as text, the same for every vocabulary, and text that a decoder generates."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llmctl.artifacts.load import Loaded, is_bare, load_model
from llmctl.artifacts.with_adapters import read_model
from llmctl.config import CompressConfig, FinetuneDataConfig, GenerateConfig
from llmctl.data.builtin import builtin_documents
from llmctl.errors import UsageError
from llmctl.files import write_bytes
from llmctl.inference.generate import Prompt, generate
from llmctl.preparing.corpus import Corpus, Ints, is_read_once, spool
from llmctl.runs.progress import Say

WINDOW_TOKENS = 512
"""Tokens of a document of a sample."""

TEXT_TOKENS = 256
"""Tokens of a generated text."""

HELD_OUT_EVERY = 8
"""One generated text in so many is held out."""

BATCH_TEXTS = 32

TRAIN, HELD_OUT = "train.jsonl", "held-out.jsonl"
"""The files of generated text."""

MIXED_TOKENS, SWAPPED, MASKED, SWEEPS = 128, 0.5, 0.15, 8
"""Mixtures that a masked model fills in: their length, the fraction of drawn pieces, and of masked tokens in each sweep."""

PIPE = "pipe-{}.txt"
"""The copy of piped text."""


def windows(corpus: Corpus, documents: Ints, n_tokens: int) -> Iterator[str]:
    """Yield evenly spaced parts of documents, each at most `WINDOW_TOKENS` long, in all about `n_tokens` tokens."""
    lengths = corpus.documents.lengths[documents]
    n_parts = -(-lengths // WINDOW_TOKENS)  # of each document
    ends = np.cumsum(n_parts)
    total = int(ends[-1]) if len(ends) else 0
    mean = float(lengths.sum()) / max(total, 1)
    wanted = max(1, min(total, round(n_tokens / max(mean, 1.0))))
    for number in range(wanted):
        at = number * total // wanted
        place = int(np.searchsorted(ends, at, side="right"))
        begin = (at - int(ends[place] - n_parts[place])) * WINDOW_TOKENS
        ids = corpus.documents.document(int(documents[place]))[begin : begin + WINDOW_TOKENS]
        # A window may begin or end inside of a character.
        text = corpus.tokenizer.decode(ids.tolist()).strip("\ufffd")
        if text.strip():
            yield text


def rows(texts: Iterator[str]) -> bytes:
    """Return texts as the rows of a jsonl file."""
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def write_sample(corpus: Corpus, documents: Ints, n_tokens: int, path: Path) -> None:
    """Write a sample of documents, unless it exists.

    Raises: UsageError if there is no text in them.
    """
    if path.exists():
        return
    content = rows(windows(corpus, documents, n_tokens))
    if not content:
        n_found = int(corpus.documents.lengths[documents].sum())
        raise UsageError(f"the held-out text is too short: {n_found} tokens", "pass more text, or `--val FILE`")
    write_bytes(path, content)


def frequencies(corpus: Corpus, vocab_size: int) -> list[int]:
    """Return the ids that training documents use, the most frequent first."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for shards in filter(None, (corpus.documents, corpus.targets)):
        for index in corpus.train:
            counts += np.bincount(shards.document(int(index)), minlength=vocab_size)
    order = np.argsort(-counts, kind="stable")
    return [int(index) for index in order if counts[index]]


def generated(loaded: Loaded, n_tokens: int, seed: int, folder: Path, say: Say) -> tuple[Path, Path]:
    """Let a decoder generate text from its beginning-of-text token at temperature 1; return training and held-out file.

    A resumed run generates only what is missing. Source: data-free calibration, LLM-QAT, Liu et al. 2023, arXiv:2305.17888.
    Raises: UsageError for a model without a token to begin with.
    """
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    frame = list(loaded.frame.before)
    start = frame or [index for index in (tokenizer.bos_id, tokenizer.eos_id) if index is not None][:1]
    if not start:
        raise UsageError(
            f"`{loaded.artifact.path}` has no token that begins a text, so it cannot generate its own data",
            "--data FILE with text of the kind that the model is used on",
        )
    config = loaded.model.config
    longest = min(TEXT_TOKENS, config.max_positions - len(start) - 1)
    n_texts = max(2 * HELD_OUT_EVERY, n_tokens // longest)
    files = folder / TRAIN, folder / HELD_OUT
    if all(path.exists() for path in files):
        return files
    texts: list[str] = []
    for first in range(0, n_texts, BATCH_TEXTS):
        path = folder / f"part-{first // BATCH_TEXTS:05d}.json"
        if not path.exists():
            settings = GenerateConfig(max_tokens=longest, temperature=1.0, seed=seed, batch_size=BATCH_TEXTS)
            prompts = [Prompt(number, start, "") for number in range(first, min(first + BATCH_TEXTS, n_texts))]
            found = [completion.text for completion in generate(loaded, prompts, settings)]
            write_bytes(path, json.dumps(found, ensure_ascii=False).encode())
        texts += json.loads(path.read_text(encoding="utf-8"))
        say(f"the model has generated {len(texts):,} of {n_texts:,} texts")
    texts = [text for text in texts if text.strip()]
    held_out = texts[::HELD_OUT_EVERY]
    write_bytes(files[1], rows(iter(held_out)))
    write_bytes(files[0], rows(text for number, text in enumerate(texts) if number % HELD_OUT_EVERY))
    return files


def refilled(loaded: Loaded, n_tokens: int, seed: int, folder: Path, say: Say) -> None:
    """Write passages of the built-in corpus, and mixtures of them with sampled pieces that a masked model has filled in.

    Half of the tokens of a mixture are drawn uniformly from the vocabulary; then `SWEEPS` times a part of all tokens is masked
    and drawn from the model's predictions.
    Source: a masked model as a Markov random field to sample from: Wang and Cho 2019, arXiv:1902.04094, section 3.2.
    """
    if (folder / TRAIN).exists() and (folder / HELD_OUT).exists():
        return
    tokenizer, config = loaded.tokenizer, loaded.model.config
    assert tokenizer is not None
    generator = torch.Generator().manual_seed(seed)
    frame = loaded.frame
    length = min(MIXED_TOKENS, config.max_positions) - len(frame.before) - len(frame.after)
    rows_of_ids = [
        ids[begin : begin + length]
        for ids in tokenizer.encode_batch(builtin_documents())
        for begin in range(0, len(ids) - length + 1, length)
    ]
    n_rows = max(2 * HELD_OUT_EVERY, n_tokens // length)
    order = torch.randperm(len(rows_of_ids), generator=generator)[:n_rows].tolist()
    plain = [tokenizer.decode(rows_of_ids[index]) for index in order]
    ids_BT = torch.tensor([[*frame.before, *rows_of_ids[index], *frame.after] for index in order[: len(order) // 2]])
    usual = torch.tensor([index for index, size in enumerate(tokenizer.token_bytes()) if size])
    inside = slice(len(frame.before), len(frame.before) + length)
    drawn = usual[torch.randint(len(usual), (len(ids_BT), length), generator=generator)]
    swapped = torch.rand(len(ids_BT), length, generator=generator) < SWAPPED
    ids_BT[:, inside] = torch.where(swapped, drawn, ids_BT[:, inside])
    for sweep in range(SWEEPS):
        for part_BT in ids_BT.split(BATCH_TEXTS):
            fill_in(loaded, part_BT[:, inside], part_BT, usual, generator)
        say(f"the model has filled in {sweep + 1} of {SWEEPS} times")
    mixed = [tokenizer.decode(ids) for ids in ids_BT[:, inside].tolist()]
    found = [text for pair in zip_longest(plain, mixed) for text in pair if text and text.strip()]
    write_bytes(folder / HELD_OUT, rows(iter(found[::HELD_OUT_EVERY])))
    write_bytes(folder / TRAIN, rows(text for number, text in enumerate(found) if number % HELD_OUT_EVERY))


@torch.inference_mode()
def fill_in(loaded: Loaded, own_BT: Tensor, ids_BT: Tensor, usual: Tensor, generator: torch.Generator) -> None:
    """Replace a random part of ids, a view into the whole rows, by samples of the model's predictions."""
    model = loaded.model
    masked = torch.rand(own_BT.shape, generator=generator) < MASKED
    kept = own_BT.clone()
    own_BT[masked] = model.config.mask_id
    states_ND = model.hidden(ids_BT)[:, -own_BT.shape[1] - len(loaded.frame.after) :][:, : own_BT.shape[1]][masked]
    logits_NV = model.head(states_ND[None])[0].float()
    allowed = torch.full((logits_NV.shape[1],), -torch.inf)
    allowed[usual] = 0.0
    samples = torch.multinomial((logits_NV + allowed).softmax(dim=-1), 1, generator=generator).squeeze(1)
    own_BT.copy_(kept)
    own_BT[masked] = samples


def make_data(config: CompressConfig, folder: Path, say: Say) -> None:
    """Copy piped text, which can be read only once, to a folder; without data, let a decoder generate its own there."""
    for number, path in enumerate(config.data.paths):
        if is_read_once(path):
            spool(path, folder / PIPE.format(number))
    if config.data.paths:
        return
    artifact = read_model(Path(config.model))
    model = artifact.config
    fills = model.family == "encoder" and model.mask_id >= 0 and not (model.n_labels or is_bare(artifact))
    if model.family != "decoder" and not fills:
        say("no --data: using the built-in corpus, which is small and of one kind")
        return
    how = "the built-in corpus, and mixtures that the model fills in" if fills else "the model generates its own"
    say(f"no --data: {how}")
    loaded = load_model(Path(config.model), device="cpu", dtype="float32")
    (refilled if fills else generated)(loaded, config.plan.written_tokens, config.train.seed, folder, say)


def data_of(config: CompressConfig, folder: Path) -> FinetuneDataConfig:
    """Return the data of a run, with what `make_data` has left in a folder."""
    data = config.data
    if data.paths:
        spooled = [folder / PIPE.format(number) for number in range(len(data.paths))]
        paths = tuple(str(own) if own.exists() else path for own, path in zip(spooled, data.paths, strict=True))
        return replace(data, paths=paths)
    train, held_out = folder / TRAIN, folder / HELD_OUT
    if not train.exists():
        return data
    return replace(data, paths=(str(train),), val_paths=(str(held_out),), text_key="text", split="file")
