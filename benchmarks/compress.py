"""Compression to file sizes on public models and data, and the same with single levers: one JSON line per result.

    python benchmarks/compress.py --data DATA --models MODELS --work WORK [NAME ...]

DATA and MODELS have the layout described in `tasks.py`. Every command is printed before it runs, to repeat it by hand.
"""

import csv
from pathlib import Path
from typing import Any

from quantization import held_out, off_grid
from tasks import Bench, main, measured

ONLY_BITS = ("--keep", "vocabulary,depth,width")
ONLY_SHAPE = ("--keep", "vocabulary,bits")


def compressed(record: dict[str, Any]) -> dict[str, Any]:
    """Return plan, stages, bytes and time of a compression."""
    report = record["report"]
    kept = {name: report[name] for name in ("plan", "stages", "bytes", "bytes_before")}
    after = {name: value for name, value in report["models"]["after"].items() if name not in ("n_labels", "n_bytes")}
    return {**kept, "after": after, **{name: record[name] for name in ("wall_seconds", "cpu_seconds")}}


def smollm2(bench: Bench, size: str, *more: object) -> dict[str, Any]:
    """Compress SmolLM2 off its 4-bit grid."""
    model, train, part = off_grid(bench)
    name = f"smollm2-{size}-{len(more)}"
    budget = ("--minutes", "8", "--batch-size", "4", "--set", "plan.measure_tokens=6144")
    return compressed(
        bench.run("compress", model, "--to", size, "-d", train, "--val", part, *budget, *more, "-o", name, "-f")
    )


def sentences(bench: Bench) -> list[Path]:
    """Return the sentences of STS-B's training part, a line each, and the beginning of WikiText-2."""
    out = bench.work / "sts-train.txt"
    with (bench.data / "stsb" / "stsb-en-train.csv").open(encoding="utf-8", newline="") as file:
        lines = dict.fromkeys(text for row in csv.reader(file) for text in row[:2])
    out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    wiki = bench.work / "wiki-2m.txt"
    wiki.write_bytes(bench.text("wiki-train.txt", "wikitext-2", "train.txt.gz").read_bytes()[:2_000_000])
    return [out, wiki]


def minilm(bench: Bench, size: str, *more: object) -> dict[str, Any]:
    """Compress MiniLM, and evaluate it on STS-B."""
    texts = [part for path in sentences(bench) for part in ("-d", path)]
    lines = ("--set", "data.split=line", "--minutes", "2")
    model, name = bench.models / "minilm", f"minilm-{size}-{len(more)}"
    found = compressed(bench.run("compress", model, "--to", size, *texts, *lines, *more, "-o", name, "-f"))
    test = bench.data / "stsb" / "stsb-en-test.csv"
    names = ("--set", "columns.names=text,pair,label")
    return found | {"stsb": measured(bench.run("evaluate", name, model, "-d", test, "--task", "similarity", *names))}


def own_text(bench: Bench) -> dict[str, Any]:
    """Compress SmolLM2 with text that it generates itself and with WikiText-2; measure both on WikiText-2."""
    model, train, part = off_grid(bench)
    common = ("--to", "75MB", *ONLY_BITS, "--minutes", "0.1", "--trials", "1")
    bench.run("compress", model, *common, "-o", "smollm2-own", "-f")
    bench.run("compress", model, *common, "-d", train, "--val", part, "-o", "smollm2-wiki", "-f")
    held = held_out(bench, "smollm2")
    return measured(bench.run("evaluate", model, "smollm2-own", "smollm2-wiki", "-d", held, "--task", "text"))


RUNS = {
    **{f"smollm2-{size}": lambda bench, size=size: smollm2(bench, size) for size in ("90MB", "60MB", "45MB", "30MB")},
    **{
        f"smollm2-{size}-bits": lambda bench, size=size: smollm2(bench, size, *ONLY_BITS)
        for size in ("90MB", "60MB", "45MB")
    },
    "smollm2-60MB-shape": lambda bench: smollm2(bench, "60MB", *ONLY_SHAPE),
    **{f"minilm-{size}": lambda bench, size=size: minilm(bench, size) for size in ("20MB", "10MB", "5MB")},
    **{f"minilm-{size}-bits": lambda bench, size=size: minilm(bench, size, *ONLY_BITS) for size in ("20MB", "10MB")},
    "own-text": own_text,
}

if __name__ == "__main__":
    main(__doc__, RUNS)
