"""Fine-tuning and translation on public data sets: prepare files, run commands, print one JSON line per result.

    python benchmarks/tasks.py --data DATA --models MODELS --work WORK [NAME ...]

DATA contains the published data sets in the folders named below; MODELS contains `minilm/` (a folder of
all-MiniLM-L6-v2) and `smollm2.gguf` (SmolLM2-135M-Instruct). Every command is printed before it runs, to repeat it by
hand. Splits are random with a fixed seed.
"""

import argparse
import csv
import gzip
import json
import math
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
LLMCTL = [sys.executable, "-P", "-m", "llmctl"]
WINDOW_TOKENS = 1024
"""Window length for WikiText-2."""


class Bench:
    """Folders of the benchmark, and helpers that run commands."""

    def __init__(self, data: Path, models: Path, work: Path) -> None:
        self.data, self.models, self.work = data, models, work
        work.mkdir(parents=True, exist_ok=True)

    def run(self, *arguments: object) -> dict[str, Any]:
        """Run a command and return its JSON output with the wall and CPU time."""
        command = [str(argument) for argument in arguments]
        print("$ llmctl " + " ".join(command), file=sys.stderr, flush=True)
        begun, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [*LLMCTL, *command, "--json"], cwd=self.work, stdout=subprocess.PIPE, text=True, check=True
        )
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_seconds = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
        record: dict[str, Any] = json.loads(done.stdout)
        return record | {"wall_seconds": round(time.monotonic() - begun), "cpu_seconds": round(cpu_seconds)}

    def finetune(self, name: str, recipe: str, *arguments: object) -> dict[str, Any]:
        """Fine-tune with a recipe and return the main metrics."""
        record = self.run("finetune", "-r", RECIPES / "finetune" / recipe, *arguments, "-o", name, "-f")
        return trained(record)

    def text(self, name: str, *path: str) -> Path:
        """Unpack a gzipped file into the work folder."""
        out = self.work / name
        if not out.exists():
            out.write_bytes(gzip.decompress(self.data.joinpath(*path).read_bytes()))
        return out

    def rows(self, name: str, rows: Sequence[Sequence[str]]) -> Path:
        """Write rows as tab-separated lines."""
        out = self.work / name
        clean = ("\t".join(" ".join(cell.split()) for cell in row) for row in rows)
        out.write_text("".join(line + "\n" for line in clean), encoding="utf-8")
        return out


def trained(record: dict[str, Any]) -> dict[str, Any]:
    """Return the main metrics of a training run."""
    figures = ("accuracy", "f1", "mcc", "spearman", "bleu", "chrf", "loss", "perplexity", "bits_per_byte")
    kept = {key: record["after"][key] for key in figures if key in record["after"]}
    before = {key: record["before"][key] for key in ("loss", "accuracy") if key in record["before"]}
    shares = {"parameters": record["n_parameters"], "trained": record.get("n_trained", record["n_parameters"])}
    times = {key: record[key] for key in ("steps", "seconds", "cpu_seconds")}
    return {**kept, "before": before, **shares, **times}


def measured(record: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics of an evaluation by model."""
    return {row["model"]: row["figures"] for row in record["models"]} | {"cpu_seconds": record["cpu_seconds"]}


def sst2(bench: Bench, method: str) -> dict[str, Any]:
    """Fine-tune MiniLM on the 6,920 sentences of SST-2."""
    train = bench.text("sst2-train.tsv", "sst2", "train.tsv.gz")
    dev = bench.text("sst2-dev.tsv", "sst2", "dev.tsv.gz")
    return bench.finetune(f"sst2-{method}", f"sst2-{method}.yaml", bench.models / "minilm", train, "--val", dev)


def stsb(bench: Bench) -> dict[str, Any]:
    """Evaluate MiniLM on STS-B, without training."""
    test = bench.data / "stsb" / "stsb-en-test.csv"
    names = ("--set", "columns.names=text,pair,label")
    return measured(bench.run("evaluate", bench.models / "minilm", "-d", test, "--task", "similarity", *names))


def thucnews(bench: Bench) -> tuple[list[list[str]], list[list[str]]]:
    """Return 8,000 training and 2,000 validation headlines, (text, label)."""
    lines = (bench.data / "thucnews-titles" / "dev.txt").read_text(encoding="utf-8").splitlines()
    names = (bench.data / "thucnews-titles" / "class.txt").read_text(encoding="utf-8").split()
    rows = [[text, names[int(label)]] for text, label in (line.split("\t") for line in lines if line.strip())]
    random.Random(0).shuffle(rows)
    return rows[:8000], rows[8000:]


def hotels(bench: Bench) -> tuple[list[list[str]], list[list[str]]]:
    """Return 90 % of the hotel reviews for training and 10 % for validation, (text, label)."""
    content = gzip.decompress((bench.data / "chnsenticorp-htl" / "ChnSentiCorp_htl_all.csv.gz").read_bytes()).decode()
    rows = [[row["review"], row["label"]] for row in csv.DictReader(content.splitlines()) if row["review"].strip()]
    random.Random(0).shuffle(rows)
    cut = len(rows) * 9 // 10
    return rows[:cut], rows[cut:]


def pairs(bench: Bench) -> list[tuple[str, str]]:
    """Return the Tatoeba pairs, (Chinese, English), in the order of their English sentences."""
    lines = bench.text("cmn.txt", "tatoeba-cmn-eng", "cmn.txt.gz").read_text(encoding="utf-8").splitlines()
    return [(chinese, english) for english, chinese, _ in (line.split("\t") for line in lines)]


def chinese_text(bench: Bench) -> Path:
    """Write Chinese text, one document per line, without the validation data of the tasks."""
    out = bench.work / "chinese.txt"
    texts = [text for text, _ in thucnews(bench)[0]] + [text for text, _ in hotels(bench)[0]]
    texts += [chinese for chinese, _ in pairs(bench)]
    with (bench.data / "stsb" / "stsb-zh-train.csv").open(encoding="utf-8") as file:
        texts += [sentence for row in csv.reader(file) for sentence in row[:2]]
    tasks = json.loads((bench.data / "sft-demo" / "alpaca_zh_demo.json").read_text(encoding="utf-8"))[:900]
    texts += [f"{task['instruction']}{task['input']}{task['output']}" for task in tasks]
    unique = list(dict.fromkeys(" ".join(text.split()) for text in texts))
    random.Random(0).shuffle(unique)
    out.write_text("\n".join(unique), encoding="utf-8")
    return out


def chinese_encoder(bench: Bench) -> dict[str, Any]:
    """Pretrain a Chinese encoder on masked tokens."""
    recipe = RECIPES / "pretrain" / "chinese-mlm.yaml"
    return trained(bench.run("pretrain", "-r", recipe, chinese_text(bench), "-o", "zh-encoder", "-f"))


def chinese_task(bench: Bench, name: str, base: str) -> dict[str, Any]:
    """Fine-tune a Chinese classifier from the pretrained encoder, or from the same one with random weights."""
    train, val = {"thucnews": thucnews, "hotels": hotels}[name](bench)
    files = bench.rows(f"{name}-train.tsv", train), bench.rows(f"{name}-val.tsv", val)
    if base == "fresh" and not (bench.work / "zh-fresh").exists():
        # The same shape and tokenizer: one step with a negligible learning rate keeps the initial weights.
        recipe = RECIPES / "pretrain" / "chinese-mlm.yaml"
        frozen = ("--steps", 1, "--set", "optim.lr=1e-12", "--set", "optim.muon_lr=1e-12")
        tokenizer = ("--tokenizer", "zh-encoder")
        bench.run("pretrain", "-r", recipe, chinese_text(bench), *frozen, *tokenizer, "-o", "zh-fresh", "-f")
    model = "zh-encoder" if base == "pretrained" else "zh-fresh"
    return bench.finetune(f"{name}-{base}", f"{name}.yaml", model, files[0], "--val", files[1])


def chinese_chat(bench: Bench) -> dict[str, Any]:
    """Pretrain a Chinese decoder, then instruction-tune it: 900 training and 100 validation tasks."""
    recipe = RECIPES / "pretrain" / "chinese-clm.yaml"
    base = trained(bench.run("pretrain", "-r", recipe, chinese_text(bench), "-o", "zh-decoder", "-f"))
    tasks = json.loads((bench.data / "sft-demo" / "alpaca_zh_demo.json").read_text(encoding="utf-8"))
    files = []
    for name, part in (("train", tasks[:900]), ("val", tasks[900:])):
        file = bench.work / f"zh-chat-{name}.jsonl"
        file.write_text("".join(json.dumps(task, ensure_ascii=False) + "\n" for task in part), encoding="utf-8")
        files.append(file)
    tuned = bench.finetune("zh-chat", "chinese-chat.yaml", "zh-decoder", files[0], "--val", files[1])
    return {"decoder": base, "chat": tuned}


def multi30k(bench: Bench) -> dict[str, Any]:
    """Train a small original Transformer on English-German captions from scratch."""
    files = [
        bench.text(f"{part}.{side}", "multi30k-en-de", f"{part}.{side}.gz")
        for part in ("train", "val")
        for side in ("en", "de")
    ]
    train, val = f"{files[0]}:{files[1]}", f"{files[2]}:{files[3]}"
    held_out = ("--set", f"data.val_paths={val}")
    record = bench.run("pretrain", "-r", RECIPES / "pretrain" / "multi30k.yaml", train, *held_out, "-o", "en-de", "-f")
    beams = bench.run("evaluate", "en-de", "-d", val, "--task", "translate", "--beams", 4)
    return trained(record) | {"beams": measured(beams)}


def tatoeba(bench: Bench) -> dict[str, Any]:
    """Train the same Transformer on Chinese-English; an English sentence is on one side of the split only."""
    groups: dict[str, list[str]] = {}
    for chinese, english in pairs(bench):
        groups.setdefault(english, []).append(chinese)
    sentences = sorted(groups)
    random.Random(0).shuffle(sentences)
    parts = {"val": sentences[:1000], "train": sentences[1000:]}
    files = {
        name: bench.rows(f"zh-en-{name}.tsv", [[chinese, english] for english in part for chinese in groups[english]])
        for name, part in parts.items()
    }
    held_out = ("--set", f"data.val_paths={files['val']}")
    recipe = RECIPES / "pretrain" / "tatoeba.yaml"
    record = bench.run("pretrain", "-r", recipe, files["train"], *held_out, "-o", "zh-en", "-f")
    beams = bench.run("evaluate", "zh-en", "-d", files["val"], "--task", "translate", "--beams", 4)
    return trained(record) | {"beams": measured(beams)}


def smollm2(bench: Bench) -> Path:
    """Return SmolLM2 imported from its GGUF file."""
    out = bench.work / "smollm2"
    if not out.exists():
        subprocess.run([*LLMCTL, "import", bench.models / "smollm2.gguf", "-o", out], check=True)
    return out


def smollm2_lora(bench: Bench) -> dict[str, Any]:
    """Fine-tune SmolLM2 with LoRA on a small instruction set: 150 training and 25 validation tasks."""
    lines = (bench.data / "sft-demo" / "seed_tasks.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    files = []
    for name, part in (("train", lines[:150]), ("val", lines[150:])):
        files.append(bench.work / f"seed-{name}.jsonl")
        files[-1].write_text("".join(part), encoding="utf-8")
    return bench.finetune("smollm2-lora", "smollm2-lora.yaml", smollm2(bench), files[0], "--val", files[1])


def wikitext(bench: Bench) -> dict[str, Any]:
    """Measure the perplexity on WikiText-2 validation, and that of transformers on the same weights and windows."""
    text = bench.text("wikitext-valid.txt", "wikitext-2", "valid.txt.gz")
    record = bench.run("evaluate", smollm2(bench), "-d", text, "--task", "text", "--seq-len", WINDOW_TOKENS)
    return {"ours": measured(record), "transformers": transformers_perplexity(bench, text)}


def transformers_perplexity(bench: Bench, text: Path) -> dict[str, float]:
    """Return the loss and perplexity of transformers in the non-overlapping windows of its guide."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = bench.work / "smollm2-hf"
    if not out.exists():
        subprocess.run([*LLMCTL, "export", smollm2(bench), "--to", "hf", "-o", out], check=True)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(out)(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    nats, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, ids.shape[1] - 1, WINDOW_TOKENS):
            window = ids[:, start : start + WINDOW_TOKENS]
            loss = model(window, labels=window).loss  # mean over all tokens of the window but the first
            nats += float(loss) * (window.shape[1] - 1)
            count += window.shape[1] - 1
    return {"loss": nats / count, "perplexity": math.exp(nats / count), "n_labels": count}


RUNS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "sst2-full": lambda bench: sst2(bench, "full"),
    "sst2-lora": lambda bench: sst2(bench, "lora"),
    "stsb": stsb,
    "chinese-encoder": chinese_encoder,
    **{
        f"{name}-{base}": lambda bench, name=name, base=base: chinese_task(bench, name, base)
        for name in ("thucnews", "hotels")
        for base in ("pretrained", "fresh")
    },
    "chinese-chat": chinese_chat,
    "multi30k": multi30k,
    "tatoeba": tatoeba,
    "smollm2-lora": smollm2_lora,
    "wikitext": wikitext,
}
"""The runs by name; later ones use models that earlier ones leave in the work folder."""


def main(doc: str | None, runs: dict[str, Callable[[Bench], dict[str, Any]]]) -> None:
    """Run the benchmarks named on the command line, or all."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "models", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(runs))
    options = parser.parse_args()
    unknown = set(options.names) - set(runs)
    if unknown:
        parser.error(f"unknown benchmark `{min(unknown)}`; choose from {', '.join(runs)}")
    bench = Bench(options.data.resolve(), options.models.resolve(), options.work.resolve())
    for name in options.names or runs:
        print(json.dumps({"name": name, **runs[name](bench)}, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main(__doc__, RUNS)
