"""`llmctl pretrain`: raw text or pairs, a model from a preset or an existing one, and an objective."""

import shlex
from collections.abc import Mapping
from functools import partial
from typing import Any

from llmctl.artifacts.load import Loaded
from llmctl.config import PretrainConfig
from llmctl.formats.artifact import Artifact
from llmctl.jobs.finish import Product, whole_model, xz_comparison
from llmctl.jobs.job import Job
from llmctl.jobs.session import Part, Session, identity
from llmctl.preparing.corpus import Corpus, prepare_corpus
from llmctl.tables.objectives import OBJECTIVES
from llmctl.training.batches import label_flops, make_batches, rows_of
from llmctl.training.build_model import build_model, label, load_base
from llmctl.training.generation_scores import make_score
from llmctl.training.objectives import label_prediction
from llmctl.training.samples import make_sampler, own_prompts
from llmctl.training.settings import check, check_corpus, with_budget


def pretrain(session: Session, config: PretrainConfig) -> None:
    """Encode the text, build the model for its tokenizer, train, and write the model."""
    base = load_base(config)
    tokenizer = base.tokenizer if base else None
    corpus = session.prepare(lambda folder: prepare_corpus(config, folder, tokenizer, session.say))
    check_corpus(config, corpus)
    model = base.model if base else build_model(config, corpus.tokenizer)
    loaded = Loaded(model, corpus.tokenizer, Artifact(session.folder, "", model.config, {}, {}))
    metric = config.train.metric or "loss"
    part = Part(
        model=model,
        objective=lambda: label_prediction(model, corpus, config.train),
        batches=partial(make_batches, config, corpus, model.config),
        rows=rows_of(config, model.config),
        config=config,
        identity=identity(corpus),
        metric=metric,
        flops_per_token=label_flops(config, model.config),
        sample=make_sampler(config, corpus, loaded),
        score=make_score(loaded, corpus, metric, config.train.seq_len, session.runtime),
    )
    fitted = session.fit(part)
    session.finish(
        Product(
            model,
            corpus,
            fitted,
            metric,
            write=whole_model(model, fitted.weights, corpus.tokenizer.files()),
            facts=lambda: xz_comparison(corpus, config.train.minutes),
            note=note,
            closing=partial(closing, config, corpus),
        )
    )


def note(summary: Mapping[str, Any]) -> str:
    """Return what `xz` needs for the same text, for the model card."""
    if "xz_bits_per_byte" not in summary:
        return ""
    return f"`xz -9` needs {summary['xz_bits_per_byte']:.3f} bits per byte for the same held-out text."


def closing(config: PretrainConfig, corpus: Corpus, summary: Mapping[str, Any]) -> str:
    """Return bits per byte before and after, and a prompt of the model's kind."""
    xz = f" (xz -9: {summary['xz_bits_per_byte']:.3f})" if "xz_bits_per_byte" in summary else ""
    verb = "fill" if OBJECTIVES[config.objective].is_masked else "generate"
    before, after = summary["before"]["bits_per_byte"], summary["after"]["bits_per_byte"]
    return (
        f"{summary['n_parameters']:,} parameters, {summary['steps']:,} steps in {summary['seconds']:.0f} s: "
        f"{before:.3f} -> {after:.3f} bits/byte on held-out text{xz}\n"
        f"next: llmctl {verb} -m {shlex.quote(summary['model'])} {shlex.quote(own_prompts(config, corpus)[0])}"
    )


JOB = Job(
    command="pretrain",
    config_class=PretrainConfig,
    settle=with_budget,
    check=check,
    objective=lambda config: config.objective,
    label=lambda config: f"{config.objective}-{label(config)}",
    run=pretrain,
)
