"""Distillation between tokenizers: SmolLM2 teaches a small decoder with 8,192 pieces of its own, one JSON line per result.

    python benchmarks/across_tokenizers.py --data DATA --models MODELS --work WORK [NAME ...]

DATA and MODELS have the layout described in `tasks.py`. All runs of a text have the same rows, steps and student (but for
the vocabulary of `same`, the teacher's). `gold` is the loss of TRL's GOLD (needs `trl`) in the same loop: its vocabularies
are given to it as bytes, since its own matching of names finds few pieces between sentencepiece and byte-level BPE.
"""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from distill import wiki
from quantization import held_out
from tasks import LLMCTL, Bench, main, smollm2

SHAPE = "layers=4,dim=192,heads=3,ffn=512"
STEPS = ("--steps", "200", "--batch-size", "4", "--seq-len", "256", "--lr", "3e-3", "--set", "train.eval_every=100")
MIXED = ("--set", "loss.weight=0.5")


def stories(bench: Bench) -> tuple[Path, Path]:
    """Write TinyStories without its damaged texts, a story per line: all but 40 to train on, and these."""
    path = bench.data / "tinystories-1k" / "tinystories_1000.json.gz"
    texts = [" ".join(text.split()) for text in json.loads(gzip.decompress(path.read_bytes())) if "â" not in text]
    parts = bench.work / "stories-train.txt", bench.work / "stories-valid.txt"
    for part, some in zip(parts, (texts[:-40], texts[-40:]), strict=True):
        part.write_text("".join(f"{text}\n" for text in some), encoding="utf-8")
    return parts


def run(bench: Bench, text: str, name: str, *more: object, same: bool = False) -> dict[str, Any]:
    """Distill the student on a text, and return its held-out bits per byte."""
    train, valid = (wiki(bench)[0], held_out(bench, "smollm2")) if text == "wiki" else stories(bench)
    tokenizer = bench.work / "tok8k"
    if not tokenizer.exists():
        texts = [str(path) for path in (wiki(bench)[0], stories(bench)[0])]
        command = [*LLMCTL, "tokenize", "train", *texts, "-o", str(tokenizer), "--vocab-size", "8192"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    own = () if same else ("--set", f"student.tokenizer={tokenizer}")
    common = ("--student", SHAPE, "--init", "random", "-d", train, "--val", valid, "--set", "data.split=line", *STEPS)
    record = bench.run("distill", smollm2(bench), *common, *own, *more, "-o", f"across-{text}-{name}", "-f")
    before, after = record["before"], record["after"]
    kept = {key: after[key] for key in ("loss", "perplexity", "bits_per_byte", "kl") if key in after}
    return {**kept, "before": before["bits_per_byte"], **{key: record[key] for key in ("steps", "cpu_seconds")}}


def gold(bench: Bench, text: str, name: str, *more: object) -> dict[str, Any]:
    """Distill with the loss of TRL's GOLD in our loop."""
    ours = LLMCTL.copy()
    LLMCTL[:] = [sys.executable, str(Path(__file__).resolve()), "with-gold"]
    try:
        return run(bench, text, name, *more)
    finally:
        LLMCTL[:] = ours


def with_gold() -> None:
    """Run llmctl with the loss of GOLD in the place of the projection."""
    from types import SimpleNamespace

    import numpy as np
    import torch
    from trl.experimental.gold.gold_trainer import ULDLoss

    from llmctl.__main__ import main as command_line
    from llmctl.distilling import build_objective
    from llmctl.distilling.across_tokenizers import AcrossTokenizers
    from llmctl.losses.base import IGNORE, Loss

    settings = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=True,
        uld_token_merge_strategy="bayesian",
        uld_use_hybrid_loss=True,
        uld_hybrid_matched_weight=1.0,
        uld_hybrid_unmatched_weight=1.0,
        beta=0.0,
    )

    class Gold(AcrossTokenizers):
        def forward(self, batch: dict[str, torch.Tensor]) -> Loss:
            if not self.training:
                return super().forward(batch)
            if not hasattr(self, "trl"):
                own, other = self.aligner.student_bytes, self.aligner.teacher_bytes
                names = [
                    SimpleNamespace(
                        get_vocab=lambda pieces=pieces: {
                            data.decode("latin-1"): index for index, data in enumerate(pieces) if data
                        }
                    )
                    for pieces in (own, other)
                ]
                settings.uld_distillation_weight = self.config.weight
                settings.uld_crossentropy_weight = 1 - self.config.weight
                self.trl = [ULDLoss(settings, *names)]
            ids_BT = batch["input_ids_BT"]
            aligned, hidden_BTD = self.read(batch), self.see(batch)[0]
            logits_BTV = self.model.head(hidden_BTD)
            with torch.no_grad():
                theirs_BSV = self.readers[0].model.head(aligned.states[0])
            documents = batch.get("documents_BT")
            documents = np.ones(ids_BT.shape, dtype=np.int64) if documents is None else documents.numpy()
            rows = [self.aligner.row(*pair) for pair in zip(ids_BT.numpy(), documents, strict=True)]
            losses = []
            for number, row in enumerate(rows):
                n, m = len(row.own_ends), len(row.ids)
                mine, other = ids_BT[number : number + 1, :n], torch.tensor([row.ids])
                offsets = [torch.tensor([[(0, int(end)) for end in ends]]) for ends in (row.own_ends, row.ends)]
                losses.append(
                    self.trl[0](
                        logits_BTV[number : number + 1, :n],
                        theirs_BSV[number : number + 1, :m],
                        mine,
                        other,
                        mine,
                        other,
                        student_byte_offsets=offsets[0],
                        teacher_byte_offsets=offsets[1],
                    )
                )
            labels = batch["labels"].flatten()
            labels = labels[labels != IGNORE]
            parts = {name: torch.zeros((), dtype=torch.float64) for name in self.parts}
            return Loss(
                torch.stack(losses).mean().double() * len(labels),
                torch.tensor(float(len(labels)), dtype=torch.float64),
                parts,
            )

    build_objective.AcrossTokenizers = Gold  # type: ignore[misc]
    sys.argv = ["llmctl", *sys.argv[2:]]
    command_line()


RUNS = {
    f"{text}-{name}": runner
    for text in ("wiki", "stories")
    for name, runner in {
        "data": lambda bench, text=text: run(bench, text, "data", "--set", "loss.weight=0"),
        "project": lambda bench, text=text: run(bench, text, "project"),
        "project-mixed": lambda bench, text=text: run(bench, text, "project-mixed", *MIXED),
        "alm": lambda bench, text=text: run(bench, text, "alm", "--set", "loss.across=alm", *MIXED),
        "uld": lambda bench, text=text: run(bench, text, "uld", "--set", "loss.across=uld", *MIXED),
        "gold": lambda bench, text=text: gold(bench, text, "gold"),
        "gold-mixed": lambda bench, text=text: gold(bench, text, "gold-mixed", *MIXED),
        "seq": lambda bench, text=text: run(bench, text, "seq", "--loss", "seq"),
        "same-data": lambda bench, text=text: run(bench, text, "same-data", "--set", "loss.weight=0", same=True),
        "same": lambda bench, text=text: run(bench, text, "same", same=True),
        "same-mixed": lambda bench, text=text: run(bench, text, "same-mixed", *MIXED, same=True),
    }.items()
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["with-gold"]:
        with_gold()
    else:
        main(__doc__, RUNS)
