"""Quantization on public data: every scheme and method on the same model and held-out text, one JSON line each.

    python benchmarks/quantization.py --data DATA --models MODELS --work WORK [NAME ...]

DATA and MODELS have the layout described in `tasks.py`; `wiki` uses the teacher of `distill.py half`, or trains it. Every
command is printed before it runs, to repeat it by hand. The published weights of SmolLM2 are on a 4-bit grid, which favors
formats with that grid: `smollm2` first moves them off the grid by a short training run.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from distill import make_teacher, wiki
from tasks import RECIPES, Bench, main, measured, smollm2

PART_BYTES = {"wiki": 120_000, "smollm2": 32_000}
"""Bytes of held-out text: only the beginning of the validation text, to save time."""

METHODS = ("nearest", "hqq", "weighted", "awq", "gptq", "awq-gptq", "guided")

LARGE_SETTINGS = (
    *("weights.calibration_rows=64", "train.seq_len=256"),
    *("train.steps=100", "train.batch_size=4", "train.eval_every=50"),
)
"""Calibration and training settings of the larger model, reduced to save time."""

STUDIED = ("nearest", "awq", "gptq", "guided", "learned")
PUBLISHED = ["--group", "64", "--set", "weights.scale_bits=16"]
"""Group size and scales as other tools use them."""

ROWS: dict[str, list[str]] = {
    "int8": ["--bits", "8"],
    "int8, float tables": ["--bits", "8", "--embedding", "float"],
    **{f"int8 {method}": ["--bits", "8", "--method", method] for method in ("gptq", "guided", "learned")},
    **{f"w8a8 {method}": ["--scheme", "w8a8", "--method", method] for method in ("nearest", "gptq", "guided")},
    **{f"int6 {method}": ["--bits", "6", "--method", method] for method in ("nearest", "guided")},
    **{f"int5 {method}": ["--bits", "5", "--method", method] for method in ("nearest", "guided")},
    **{f"int4 g32 {method}": ["--bits", "4", "--method", method] for method in STUDIED},
    "int4 g32 learned weights": ["--bits", "4", "--method", "learned", "--set", "weights.learn=weights"],
    **{f"int4 g64 {method}": ["--bits", "4", "--group", "64", "--method", method] for method in ("gptq", "guided")},
    **{
        f"int4 g64 s16 {method}": ["--bits", "4", *PUBLISHED, "--method", method]
        for method in ("nearest", "hqq", "weighted", "awq", "gptq", "awq-gptq", "guided")
    },
    **{f"int4-sym g32 {method}": ["--scheme", "int4-sym", "--method", method] for method in ("gptq", "guided")},
    **{
        f"mixed {bits} {method}": ["--bits", "4", "--target-bpw", bits, "--method", method]
        for bits, method in (("4.3", "guided"), ("4.6", "guided"), ("4.6", "learned"))
    },
    **{f"int3 g32 {method}": ["--bits", "3", "--method", method] for method in STUDIED},
    "int3 g64 guided": ["--bits", "3", "--group", "64", "--method", "guided"],
    "mixed 3.6 guided": ["--bits", "3", "--target-bpw", "3.6"],
}


WIDE = {
    f"int{bits} g{group} {method}": ["--bits", str(bits), "--group", str(group), "--method", method]
    for bits in (4, 3)
    for group in (128, 32)
    for method in STUDIED
}
"""For a model whose rows divide into groups of 128; those of the other models do not."""


def held_out(bench: Bench, name: str) -> Path:
    """Return the first part of the validation text."""
    part = bench.work / f"valid-{name}.txt"
    part.write_bytes(wiki(bench)[1].read_bytes()[: PART_BYTES[name]])
    return part


def row(bench: Bench, model: object, out: str, calib: Path, val: Path, *options: object) -> dict[str, Any]:
    """Quantize once and return the main metrics."""
    record = bench.run("quantize", model, "--calib", calib, "--val", val, *options, "-o", out, "-f")
    report = record["report"]
    before, after = report["models"]["before"], report["models"]["after"]
    figures = {name: after[name] for name in ("perplexity", "kl", "agreement", "bytes") if name in after}
    change = {"perplexity_change": after["perplexity"] / before["perplexity"] - 1} if "perplexity" in after else {}
    bits = {name: report[name] for name in ("bits_per_weight", "bits_per_weight_layers")}
    speed = {name: report[name] for name in ("reading_ratio", "writing_ratio") if name in report}
    return {
        "before": before.get("perplexity"),
        **figures,
        **change,
        **bits,
        **speed,
        "cpu_seconds": record["cpu_seconds"],
    }


def each(
    bench: Bench, model: str, calib: Path, val: Path, names: str, *options: object, rows: dict[str, list[str]] = ROWS
) -> None:
    """Print a line for every scheme and method whose name starts with `names`."""
    for name, own in rows.items():
        out = slug(name)
        if not out.startswith(names):
            continue
        metrics = row(bench, model, f"quantized-{out}", calib, val, *own, *options)
        print(json.dumps({"model": model, "row": name, **metrics}), flush=True)


def slug(name: str) -> str:
    """Return a name usable as a folder."""
    return "-".join(name.replace(",", "").split())


def decoder(bench: Bench, names: str = "") -> dict[str, Any]:
    """Quantize the WikiText-2 decoder that is the teacher in `distill.py`."""
    make_teacher(bench, "wiki-teacher", "wikitext.yaml")
    train, _ = wiki(bench)
    each(bench, "wiki-teacher", train, held_out(bench, "wiki"), names, "--set", "train.seq_len=128")
    return {}


def wide(bench: Bench, names: str = "") -> dict[str, Any]:
    """Quantize a 3.9 M parameter decoder with group sizes 32 and 128."""
    make_teacher(bench, "wiki-256", "wikitext-256.yaml")
    train, _ = wiki(bench)
    part = held_out(bench, "wiki")
    each(bench, "wiki-256", train, part, names, "--set", "train.seq_len=128", rows=WIDE)
    return {}


def off_grid(bench: Bench) -> tuple[str, Path, Path]:
    """Return SmolLM2 off its 4-bit grid, the calibration text and the held-out text."""
    train, _ = wiki(bench)
    part = held_out(bench, "smollm2")
    if not (bench.work / "smollm2-off").exists():
        recipe = RECIPES / "finetune" / "smollm2-off-grid.yaml"
        bench.run("finetune", smollm2(bench), train, "-r", recipe, "--val", part, "-o", "smollm2-off")
    return "smollm2-off", train, part


def large(bench: Bench, names: str = "") -> dict[str, Any]:
    """Quantize SmolLM2 off its 4-bit grid, with a short training for `learned`."""
    options = [option for setting in LARGE_SETTINGS for option in ("--set", setting)]
    each(bench, *off_grid(bench), names, *options)
    return {}


def best(bench: Bench) -> dict[str, Any]:
    """Quantize the same model to 4.6 bits with a longer recipe."""
    model, train, part = off_grid(bench)
    return row(bench, model, "quantized-best", train, part, "-r", RECIPES / "quantize" / "smollm2-mixed.yaml")


def sentences(bench: Bench) -> dict[str, Any]:
    """Quantize MiniLM to 8 and 4 bits and evaluate on STS-B."""
    teacher, calib = bench.models / "minilm", bench.text("train.en", "multi30k-en-de", "train.en.gz")
    results = {}
    for name, options in (("int8", ("--bits", 8)), ("w8a8", ("--scheme", "w8a8")), ("int4", ("--bits", 4))):
        bench.run("quantize", teacher, "--calib", calib, *options, "-o", f"minilm-{name}", "-f")
    names = ("--set", "columns.names=text,pair,label")
    test = bench.data / "stsb" / "stsb-en-test.csv"
    models = (teacher, "minilm-int8", "minilm-w8a8", "minilm-int4")
    results["stsb"] = measured(bench.run("evaluate", *models, "-d", test, "--task", "similarity", *names))
    return results


KINDS = ("int8", "w8a8", "int6", "int5", "int4-g32", "int4-g64", "int4-sym", "mixed", "int3")

RUNS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "wiki": decoder,
    "smollm2": large,
    "smollm2-best": best,
    "minilm": sentences,
    "wiki-wide": wide,
    **{f"wiki-{kind}": partial(decoder, names=kind) for kind in KINDS},
    **{f"smollm2-{kind}": partial(large, names=kind) for kind in KINDS},
}
"""The runs by name; those that end in a scheme run only its rows."""


if __name__ == "__main__":
    main(__doc__, RUNS)
