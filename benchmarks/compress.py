"""Compression to file sizes on public models and data, and the same with single levers: one JSON line per result.

    python benchmarks/compress.py --data DATA --models MODELS --work WORK [NAME ...]

DATA and MODELS have the layout described in `tasks.py`. Every command is printed before it runs, to repeat it by hand.
"""

import csv
import gzip
import json
import random
import subprocess
from pathlib import Path
from typing import Any

from quantization import held_out, off_grid
from tasks import LLMCTL, Bench, main, measured

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


SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def g2p_files(bench: Bench) -> tuple[Path, list[tuple[str, str]]]:
    """Write g2p-bart-us with a tokenizer, and its dictionary as pairs; return the folder and the 300 test words.

    The published model has no tokenizer, only the letter and the phoneme of each id. Letters are written here as the
    phoneme with their id, so that one vocabulary serves both sides.
    """
    source, out = bench.data / "models" / "g2p-bart-us", bench.work / "g2p"
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    letters, phonemes = config["grapheme_chars"], config["phoneme_chars"]
    known = [
        *SPECIAL,
        *phonemes[len(SPECIAL) :],
        *letters[len(phonemes) :],
        *(chr(0xE000 + index) for index in range(max(len(letters), len(phonemes)), config["vocab_size"])),
    ]
    added = [
        {
            "id": index,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index, name in enumerate(SPECIAL)
    ]
    frame = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    frame.append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    specials = {name: {"id": name, "ids": [index], "tokens": [name]} for index, name in enumerate(SPECIAL[:3])}
    model = {
        "type": "BPE",
        "unk_token": "<unk>",
        "vocab": {name: index for index, name in enumerate(known)},
        "merges": [],
    }
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "post_processor": {"type": "TemplateProcessing", "single": frame, "pair": frame, "special_tokens": specials},
        "decoder": {"type": "Fuse"},
        "model": model,
    }
    out.mkdir(exist_ok=True)
    (out / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (out / "tokenizer_config.json").write_text(json.dumps(kind), encoding="utf-8")

    def spelled(word: str) -> str:
        return "".join(known[letters.index(letter)] if letter in letters else "<unk>" for letter in word)

    test = json.loads((source / "reference.json").read_text(encoding="utf-8"))["gold_sample"]["rows"]
    words: dict[str, Any] = json.loads(gzip.decompress((bench.data / "g2p-en-us" / "us_gold.json.gz").read_bytes()))
    texts = {word: said if isinstance(said, str) else said.get("DEFAULT") for word, said in words.items()}
    for word, _, _ in test:
        texts.pop(word, None)
    usable = {
        word: said for word, said in texts.items() if said and set(word) <= set(letters) and set(said) <= set(phonemes)
    }
    rows = [(spelled(word), said) for word, said in usable.items()]
    random.Random(0).shuffle(rows)
    bench.rows("g2p-val.tsv", rows[:2000])
    bench.rows("g2p-train.tsv", rows[2000:])
    return out, [(spelled(word), said) for word, said, _ in test]


def g2p(bench: Bench, size: str) -> dict[str, Any]:
    """Compress a BART that spells out pronunciation, and count the words that it says as the dictionary does."""
    model, test = g2p_files(bench)
    name, data = f"g2p-{size}", ("-d", "g2p-train.tsv", "--val", "g2p-val.tsv")
    found = compressed(bench.run("compress", model, "--to", size, *data, "--minutes", "3", "-o", name, "-f"))
    words = "".join(f"{word}\n" for word, _ in test)
    for one in (model, name):
        command = [*LLMCTL, "generate", "-m", str(one), "--temperature", "0", "-q"]
        said = subprocess.run(
            command, cwd=bench.work, input=words, stdout=subprocess.PIPE, text=True, check=True
        ).stdout
        right = [answer == gold for answer, (_, gold) in zip(said.split("\n"), test, strict=False)]
        found[f"exact_{Path(one).name}"] = sum(right) / len(test)
    return found


RUNS = {
    **{f"smollm2-{size}": lambda bench, size=size: smollm2(bench, size) for size in ("90MB", "60MB", "45MB", "30MB")},
    **{
        f"smollm2-{size}-bits": lambda bench, size=size: smollm2(bench, size, *ONLY_BITS)
        for size in ("90MB", "60MB", "45MB")
    },
    "smollm2-60MB-shape": lambda bench: smollm2(bench, "60MB", *ONLY_SHAPE),
    **{f"minilm-{size}": lambda bench, size=size: minilm(bench, size) for size in ("20MB", "10MB", "5MB")},
    **{f"minilm-{size}-bits": lambda bench, size=size: minilm(bench, size, *ONLY_BITS) for size in ("20MB", "10MB")},
    **{f"g2p-{size}": lambda bench, size=size: g2p(bench, size) for size in ("1500kB", "750kB", "375kB")},
    "own-text": own_text,
}

if __name__ == "__main__":
    main(__doc__, RUNS)
