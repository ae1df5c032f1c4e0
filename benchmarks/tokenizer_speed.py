"""Encoding speed of llmctl's tokenizer compared with raw sentencepiece, on the same model and text in one run.

    python benchmarks/tokenizer_speed.py [FILE ...]

Without files: the built-in corpus. Prints MB of UTF-8 text per second, the best of five alternating rounds.
"""

import os
import sys
import time

from sentencepiece import SentencePieceProcessor

from llmctl.config import TokenizerConfig
from llmctl.data.builtin import builtin_documents
from llmctl.data.sources import read_documents
from llmctl.tokenizer.train import train_tokenizer

ROUNDS = 5


def main() -> None:
    paths = sys.argv[1:]
    texts = list(read_documents(paths, split="line")) if paths else builtin_documents()
    n_bytes = sum(len(text.encode()) for text in texts)
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=8000))
    raw = SentencePieceProcessor(model_proto=tokenizer.files()["tokenizer.model"])
    assert tokenizer.encode_batch(texts) == raw.encode(texts)
    cores = os.cpu_count() or 1
    ways = {
        "sentencepiece, 1 thread": lambda: raw.encode(texts, num_threads=1),
        f"sentencepiece, {cores} threads": lambda: raw.encode(texts, num_threads=cores),
        f"llmctl encode_batch, {cores} threads": lambda: tokenizer.encode_batch(texts),
        "llmctl one text at a time": lambda: [tokenizer.encode(text) for text in texts],
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS):
        for name, run in ways.items():
            begun = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - begun)
    base = best["sentencepiece, 1 thread"]
    print(f"{n_bytes / 1e6:.1f} MB, {len(texts):,} texts, vocabulary {tokenizer.vocab_size:,}, equal ids")
    for name, seconds in best.items():
        print(f"{name:<36}{n_bytes / 1e6 / seconds:>8.2f} MB/s  {base / seconds:>6.2f}x")


main()
