"""Pretraining as a job: raw text or pairs, a model from a preset or one that is there, and its objective."""

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmctl.config import PretrainConfig
from llmctl.distributed.runtime import Runtime
from llmctl.formats.artifact import Artifact
from llmctl.jobs.finish import xz_comparison
from llmctl.jobs.generation_scores import make_score
from llmctl.jobs.job import Job
from llmctl.model.flops import Rows
from llmctl.preparing.corpus import keep_corpus, open_corpus, prepare_corpus
from llmctl.runs.folder import Run
from llmctl.runs.progress import Say
from llmctl.training.batch import BatchSource
from llmctl.training.batches import label_flops, make_batches, rows_of
from llmctl.training.build_model import build_model, label, load_base
from llmctl.training.objectives import Objective, label_prediction
from llmctl.training.samples import Sampler, make_sampler, own_prompts
from llmctl.training.settings import check, check_corpus


class Pretraining(Job):
    """Train a model from raw text."""

    command = "pretrain"
    config_class = PretrainConfig
    config: PretrainConfig

    @property
    def objective(self) -> str:
        """The objective's name."""
        return self.config.objective

    @property
    def label(self) -> str:
        """The objective and the preset."""
        return f"{self.config.objective}-{label(self.config)}"

    def check(self) -> None:
        """Refuse settings that exclude each other."""
        check(self.config)

    def prepare(self, folder: Path, say: Say) -> None:
        """Read, split, tokenize and encode the text."""
        base = load_base(self.config)
        keep_corpus(prepare_corpus(self.config, folder, base.tokenizer if base else None, say), folder)

    def load(self, folder: Path, say: Say) -> None:
        """Open the encoded text and build the model for its tokenizer."""
        del say
        self.corpus = open_corpus(folder)
        check_corpus(self.config, self.corpus)
        base = load_base(self.config)
        self.model = base.model if base else build_model(self.config, self.corpus.tokenizer)

    def rows(self) -> Rows:
        """Return the rows of a step."""
        return rows_of(self.config, self.model.config)

    def make_objective(self) -> Objective:
        """Return label prediction."""
        return label_prediction(self.model, self.corpus, self.config.train)

    def make_batches(self, *, shuffle: bool) -> BatchSource:
        """Return the objective's batches."""
        return make_batches(self.config, self.corpus, self.model.config, shuffle=shuffle)

    def flops(self) -> float:
        """Return the FLOPs per position of a row."""
        return label_flops(self.config, self.model.config)

    def make_sampler(self, folder: Path) -> Sampler:
        """Return what continues, fills or answers the sample prompts."""
        return make_sampler(self.config, self.corpus, self.model, Artifact(folder, "", self.model.config, {}, {}))

    def make_score(self, runtime: Runtime) -> Callable[[int | None], dict[str, float]] | None:
        """Return what scores the targets that the model writes, where pairs are learned and `train.metric` asks for it."""
        return make_score(self, Artifact(Path(), "", self.model.config, {}, {}), runtime)

    def facts(self) -> dict[str, Any]:
        """Return what xz makes of the same text."""
        return xz_comparison(self.corpus)

    def card_note(self, summary: Mapping[str, Any]) -> str:
        """Return xz's figure in a sentence."""
        if "xz_bits_per_byte" not in summary:
            return ""
        return f"`xz -9` needs {summary['xz_bits_per_byte']:.3f} bits per byte for the same held-out text."

    def closing(self, summary: Mapping[str, Any], run: Run) -> str:
        """Return bits per byte before and after, and a prompt of the model's kind."""
        del run
        xz = f" (xz -9: {summary['xz_bits_per_byte']:.3f})" if "xz_bits_per_byte" in summary else ""
        verb = "fill" if self.config.objective == "mlm" else "generate"
        prompt = own_prompts(self.config, self.corpus)[0]
        before, after = summary["before"]["bits_per_byte"], summary["after"]["bits_per_byte"]
        return (
            f"{summary['n_parameters']:,} parameters, {summary['steps']:,} steps in {summary['seconds']:.0f} s: "
            f"{before:.3f} -> {after:.3f} bits/byte on held-out text{xz}\n"
            f"next: llmctl {verb} -m {shlex.quote(summary['model'])} {shlex.quote(prompt)}"
        )
