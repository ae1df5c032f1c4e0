"""Distillation on public data: train teachers, distill them, and print one JSON line per result.

    python benchmarks/distill.py --data DATA --models MODELS --work WORK [NAME ...]

DATA and MODELS have the layout described in `tasks.py`. Every command is printed before it runs, to repeat it by hand.
Compared runs share the teacher, the pruned student and the rows.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks import RECIPES, Bench, main, measured, smollm2, trained

RECIPE = RECIPES / "distill"
VALID_BYTES = 60_000
"""Bytes of held-out text for the large teacher: only the beginning of the validation text, to save time."""


def wiki(bench: Bench) -> tuple[Path, Path]:
    """Return WikiText-2's training and validation text."""
    return bench.text("wiki-train.txt", "wikitext-2", "train.txt.gz"), bench.text(
        "wiki-valid.txt", "wikitext-2", "valid.txt.gz"
    )


def distilled(record: dict[str, Any]) -> dict[str, Any]:
    """Return the main metrics of a distillation."""
    report = record["report"]
    names = ("loss", "perplexity", "bits_per_byte", "bleu", "kl", "agreement", "overlap", "calibration_error")
    sides = {"teacher": report["models"]["teacher"], "student": report["models"]["student"]}
    sides["cut"] = report["student_before_training"]
    figures = {side: {name: row[name] for name in names if name in row} for side, row in sides.items()}
    shares = {name: report[name] for name in ("parameters_frac", "speed_ratio", "flops", "steps")}
    layers = {name: value for name, value in report["cut"].items() if name.endswith("layers")}
    times = {name: record[name] for name in ("seconds", "cpu_seconds")}
    return {**figures, **shares, **layers, **times, "baseline": report.get("baseline")}


def make_teacher(bench: Bench, name: str, recipe: str) -> None:
    """Train a teacher on WikiText-2 unless it exists."""
    if not (bench.work / name).exists():
        train, valid = wiki(bench)
        held_out = ("--set", f"data.val_paths={valid}")
        print(
            json.dumps(
                {
                    "name": name,
                    **trained(bench.run("pretrain", "-r", RECIPES / "pretrain" / recipe, train, *held_out, "-o", name)),
                }
            )
        )


def half(bench: Bench, name: str, *more: object) -> dict[str, Any]:
    """Distill the WikiText-2 decoder to half of its parameters."""
    make_teacher(bench, "wiki-teacher", "wikitext.yaml")
    train, valid = wiki(bench)
    recipe = RECIPE / "wikitext-half.yaml"
    return distilled(
        bench.run("distill", "wiki-teacher", "-r", recipe, "-d", train, "--val", valid, *more, "-o", name, "-f")
    )


def signals(bench: Bench, kind: str, *more: object) -> dict[str, Any]:
    """Distill from a cache of teacher outputs of this kind."""
    make_teacher(bench, "wiki-teacher", "wikitext.yaml")
    train, valid = wiki(bench)
    recipe = RECIPE / "wikitext-half.yaml"
    folder = f"signals-{kind}"
    plain = ("--set", "loss.match=none")  # a cache has no hidden states to match
    made = bench.run(
        "distill",
        "cache",
        "wiki-teacher",
        "-r",
        recipe,
        "-d",
        train,
        "--val",
        valid,
        "--kind",
        kind,
        *plain,
        *more,
        "-o",
        folder,
    )
    return {"bytes_per_token": made["bytes_per_token"]} | half(
        bench, f"half-{kind}", *plain, "--set", f"teacher.cache={folder}"
    )


def encoder(bench: Bench) -> dict[str, Any]:
    """Distill the WikiText-2 encoder to half of its layers."""
    make_teacher(bench, "wiki-encoder", "wikitext-mlm.yaml")
    train, valid = wiki(bench)
    recipe = RECIPE / "wikitext-encoder.yaml"
    return distilled(
        bench.run("distill", "wiki-encoder", "-r", recipe, "-d", train, "--val", valid, "-o", "encoder-half", "-f")
    )


def sentences(bench: Bench) -> dict[str, Any]:
    """Distill MiniLM to half of its layers on unlabeled sentences, and evaluate both on STS-B."""
    import csv

    rows: list[str] = []
    with (bench.data / "stsb" / "stsb-en-train.csv").open(encoding="utf-8") as file:
        for row in csv.reader(file):
            rows += row[:2]
    rows += bench.text("train.en", "multi30k-en-de", "train.en.gz").read_text(encoding="utf-8").splitlines()
    text = bench.work / "sentences.txt"
    unique = dict.fromkeys(" ".join(row.split()) for row in rows if row.strip())
    text.write_text("\n".join(unique), encoding="utf-8")
    teacher = bench.models / "minilm"
    record = bench.run("distill", teacher, "-r", RECIPE / "minilm.yaml", "-d", text, "-o", "minilm-3", "-f")
    names = ("--set", "columns.names=text,pair,label")
    test = bench.data / "stsb" / "stsb-en-test.csv"
    checked = measured(bench.run("evaluate", teacher, "minilm-3", "-d", test, "--task", "similarity", *names))
    report = record["report"]
    shares = {name: report[name] for name in ("parameters_frac", "speed_ratio", "steps")}
    return {"stsb": checked, **shares, "cpu_seconds": record["cpu_seconds"]}


def large(bench: Bench) -> dict[str, Any]:
    """Prune SmolLM2 to half of its parameters and distill on WikiText-2."""
    train, valid = wiki(bench)
    part = bench.work / "wiki-valid-part.txt"
    part.write_bytes(valid.read_bytes()[:VALID_BYTES])
    recipe = RECIPE / "smollm2-half.yaml"
    return distilled(
        bench.run("distill", smollm2(bench), "-r", recipe, "-d", train, "--val", part, "-o", "smollm2-half", "-f")
    )


def captions(bench: Bench, name: str, *more: object) -> dict[str, Any]:
    """Distill the caption translator of `tasks.py multi30k`, or of a shorter run, to a smaller decoder."""
    files = [
        bench.text(f"{part}.{side}", "multi30k-en-de", f"{part}.{side}.gz")
        for part in ("train", "val")
        for side in ("en", "de")
    ]
    train, val = f"{files[0]}:{files[1]}", f"{files[2]}:{files[3]}"
    recipe = RECIPE / "captions.yaml"
    return distilled(bench.run("distill", "en-de", "-r", recipe, "-d", train, "--val", val, *more, "-o", name, "-f"))


RUNS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "half": lambda bench: half(bench, "half", "--baseline"),
    "half-seed-1": lambda bench: half(bench, "half-seed-1", "--seed", 1),
    "half-seed-2": lambda bench: half(bench, "half-seed-2", "--seed", 2),
    "half-logits": lambda bench: half(bench, "half-logits", "--set", "loss.match=none"),
    "half-ce": lambda bench: half(bench, "half-ce", "--set", "loss.weight=0", "--set", "loss.match=none"),
    "half-sampled": lambda bench: signals(bench, "sampled"),
    "half-topk": lambda bench: signals(bench, "topk"),
    "encoder": encoder,
    "minilm": sentences,
    "smollm2": large,
    "captions-ce": lambda bench: captions(bench, "captions-ce", "--set", "loss.weight=0"),
    "captions": lambda bench: captions(bench, "captions"),
    "captions-seq": lambda bench: captions(bench, "captions-seq", "--loss", "seq", "--set", "teacher.beams=1"),
}
"""The runs by name; the teacher of `captions` is the model that `tasks.py multi30k` leaves in the work folder."""


if __name__ == "__main__":
    main(__doc__, RUNS)
