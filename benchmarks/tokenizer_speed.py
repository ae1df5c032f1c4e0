"""Encoding speed of llmctl compared with raw sentencepiece, on the same tokenizer and text in one run.

    python benchmarks/tokenizer_speed.py [FILE ...]

Without files: the built-in corpus. Prints MB of UTF-8 text per CPU-second, the best of three alternating rounds: of the
lines, of the documents (a plain text file is one, or several of 4 M characters), and of `llmctl tokenize encode` with
one and two processes, from reading to writing shards, less the start of the command. Text that is encoded as a whole by
sentencepiece takes three times as long: that is measured on the first 2 M characters.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage

ROUNDS = 3
WHOLE_CHARACTERS = 2_000_000
IDENTITY = {"tokenizer_sha256": "benchmark", "source_sha256": "benchmark"}


def cpu_seconds() -> float:
    """Return the CPU time of this process and of those that it has waited for."""
    return sum(usage.ru_utime + usage.ru_stime for usage in map(getrusage, (RUSAGE_SELF, RUSAGE_CHILDREN)))


def best_of(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Return CPU time and passed time of each, the least of alternating rounds."""
    best = dict.fromkeys(ways, (float("inf"), float("inf")))
    for _ in range(rounds):
        for name, run in ways.items():
            begun, passed = cpu_seconds(), time.perf_counter()
            run()
            best[name] = min(best[name], (cpu_seconds() - begun, time.perf_counter() - passed))
    return best


def main() -> None:
    # Processes that encode import this file: not all of this.
    from sentencepiece import SentencePieceProcessor

    from llmctl.config import TokenizerConfig
    from llmctl.data.builtin import builtin_documents
    from llmctl.data.shard_writer import write_shards
    from llmctl.data.sources import read_documents
    from llmctl.machine import processor_name
    from llmctl.tokenizer.train import train_tokenizer

    paths = sys.argv[1:]
    documents = list(read_documents(paths) if paths else builtin_documents())
    lines = [line + "\n" for text in documents for line in text.split("\n")]
    n_bytes = sum(len(text.encode()) for text in documents)
    tokenizer = train_tokenizer(lines[:20_000], TokenizerConfig(vocab_size=8000))
    raw = SentencePieceProcessor(model_proto=tokenizer.files()["tokenizer.model"])
    start = "".join(documents)[:WHOLE_CHARACTERS]
    assert tokenizer.encode(start) == raw.encode(start)
    assert tokenizer.encode_batch(lines[:1000]) == raw.encode(lines[:1000])
    with tempfile.TemporaryDirectory() as folder:

        def write(workers: int) -> None:
            texts = read_documents(paths) if paths else documents
            place = Path(folder, f"{workers}-{time.monotonic_ns()}")
            write_shards(
                place,
                texts,
                tokenizer.encode_batch,
                cut=tokenizer.cut,
                bos=1,
                eos=2,
                vocab_size=tokenizer.vocab_size,
                identity=IDENTITY,
                workers=workers,
            )

        best = best_of(
            {
                "sentencepiece, by line": lambda: raw.encode(lines, num_threads=1),
                "llmctl, by line": lambda: tokenizer.encode_batch(lines),
                "llmctl, documents": lambda: [tokenizer.encode_batch([text]) for text in documents],
                "llmctl, file to shards, 1 process": lambda: write(1),
                "llmctl, file to shards, 2 processes": lambda: write(2),
            },
            ROUNDS,
        )
    whole = best_of({"": lambda: raw.encode(start)}, 1)[""]
    part = len(start.encode()) / n_bytes
    best["sentencepiece, one string"] = (whole[0] / part, whole[1] / part)
    base = best["sentencepiece, by line"][0]
    n_pieces = len(list(chain.from_iterable(raw.encode(lines[:1000]))))
    print(f"{processor_name()}: {n_bytes / 1e6:.1f} MB, {len(documents):,} documents, {len(lines):,} lines, equal ids")
    print(f"vocabulary {tokenizer.vocab_size:,}, {n_pieces / 1000:.0f} pieces a line")
    for name, (seconds, passed) in best.items():
        print(
            f"{name:<38}{n_bytes / 1e6 / seconds:>7.2f} MB per CPU-second  {base / seconds:>5.2f}x  {passed:>6.1f} s passed"
        )


if __name__ == "__main__":
    main()
