"""pretrain, composed from the parts: a corpus, a model, batches of an objective, the loop, and what a run leaves.

Other training commands stand beside this one: they differ in data, objective and which parameters train.
"""

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmctl.config import Family, ModelConfig, PretrainConfig
from llmctl.data.batches import Batches, CausalBatches, Ids, MaskedBatches, PairBatches, SpanBatches
from llmctl.data.masking import Masking
from llmctl.data.stream import PackedRows, PairRows
from llmctl.engine import checkpoint
from llmctl.engine.corpus import Corpus, prepare_corpus
from llmctl.engine.estimate import Shape, flops_per_token
from llmctl.engine.loop import State, Training, fit
from llmctl.engine.models import load_model
from llmctl.engine.objectives import OBJECTIVES, LabelPrediction
from llmctl.engine.outcome import Trained, finish, is_file, parameter_count
from llmctl.engine.progress import Progress, make_progress
from llmctl.engine.runs import Run, create_run, find_run, open_run
from llmctl.engine.runtime import Runtime, product_rate, start
from llmctl.engine.samples import make_sampler
from llmctl.errors import InterruptedRunError, LlmctlError, UsageError
from llmctl.files import ensure_writable, write_bytes
from llmctl.formats.artifact import Artifact
from llmctl.formats.families import family_for
from llmctl.model.presets import ALIASES, PRESETS, get_preset, preset_config
from llmctl.model.transformer import LanguageModel, initialise
from llmctl.recipe import Resolved, dump, load
from llmctl.tokenizer.base import Tokenizer

DEFAULT_STEPS = {"clm": 300, "mlm": 350, "span": 200, "seq2seq": 400}
"""Steps where no budget is given: about a minute on two cores with the embedded corpus and the default model."""


def pretrain(
    resolved: Resolved[PretrainConfig], *, command: str, out: Path | None, quiet: bool, verbose: bool = False
) -> Trained:
    """Train a model from raw text and leave it as a run folder, or as the single file `out`.

    Raises: LlmctlError of every kind; what is on disk by then stays valid and resumable.
    """
    config = with_budget(resolved.config)
    check(config)
    started = time.monotonic()
    progress = make_progress(quiet=quiet, verbose=verbose)
    run = create_run("pretrain", f"{config.objective}-{label(config)}", out=None if out and is_file(out) else out)
    try:
        clear(run.path)
        if out is not None:
            ensure_writable(out.parent)
        write_bytes(run.path / "recipe.yaml", dump(Resolved(config, resolved.origins)).encode())
        run.update(invocation=command, objective=config.objective)
        return train_in(run, config, progress, command=command, started=started, out=out)
    finally:
        progress.close()
        run.close()


def resume(name: str, *, command: str, quiet: bool, verbose: bool = False) -> Trained:
    """Go on with a run from its newest valid checkpoint, as if it had never stopped.

    Raises: NotFoundError for a run or checkpoint that is not there, BusyError if it is still running.
    """
    path = find_run(name)
    config = load(PretrainConfig, recipe=str(path / "recipe.yaml"), environment={}).config
    progress = make_progress(quiet=quiet, verbose=verbose)
    run = open_run(path)
    try:
        if run.record.get("status") == "finished":
            raise UsageError(f"run `{path}` is finished", "start a new run with -r and more steps")
        saved = None
        if checkpoint.published(path / "checkpoints"):
            saved, skipped = checkpoint.load_newest(path / "checkpoints")
            for line in skipped:
                progress.say(line)
            progress.say(f"resuming {path} at step {saved.state['step']} of {saved.state['total_steps']}")
        run.update(status="running")
        out = run.record.get("out")
        command = str(run.record.get("invocation", command))
        return train_in(
            run,
            config,
            progress,
            command=command,
            started=time.monotonic(),
            out=Path(out) if out else None,
            saved=saved,
        )
    finally:
        progress.close()
        run.close()


def train_in(
    run: Run,
    config: PretrainConfig,
    progress: Progress,
    *,
    command: str,
    started: float,
    out: Path | None,
    saved: checkpoint.Checkpoint | None = None,
) -> Trained:
    """Do the training of an open run, and record how it ended."""
    run.update(out=str(out) if out and is_file(out) else None)
    try:
        runtime = start(config.train)
        base = load_base(config)
        corpus = prepare_corpus(config, run.path / "data", base.tokenizer if base else None, progress.say)
        check_corpus(config, corpus)
        model = base.model if base else build_model(config, corpus.tokenizer)
        training = assemble(run, config, runtime, model, corpus, progress, started)
        progress.say(
            f"{family_for(model.config).architecture}: {parameter_count(model):,} parameters, "
            f"{config.objective} in {str(runtime.dtype).removeprefix('torch.')} on {runtime.device.type}"
        )
        fitted = fit(training, saved)
        return finish(run, config, training, corpus, fitted, command=command, out=out, started=started)
    except InterruptedRunError:
        run.update(status="interrupted")
        raise
    except BaseException as error:
        if not isinstance(error, LlmctlError) and not isinstance(error, KeyboardInterrupt):
            run.update(status="failed", error=f"{type(error).__name__}: {error}")
        else:
            run.update(status="failed", error=str(error) or type(error).__name__)
        raise


def clear(folder: Path) -> None:
    """Remove what an earlier run left in a folder that is used again (`-o` with `-f`)."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        (folder / name).unlink(missing_ok=True)
    for name in ("checkpoints", "data"):
        shutil.rmtree(folder / name, ignore_errors=True)


def with_budget(config: PretrainConfig) -> PretrainConfig:
    """Give a run without a budget the default number of steps."""
    train = config.train
    if train.steps or train.tokens or train.minutes:
        return config
    return replace(config, train=replace(train, steps=DEFAULT_STEPS[config.objective]))


def check(config: PretrainConfig) -> None:
    """Refuse settings that exclude each other before anything is read.

    Raises: UsageError listing all of them.
    """
    train, data = config.train, config.data
    fits_micro = train.micro_batch_size == 0 or train.batch_size % train.micro_batch_size == 0
    checks = [
        (train.batch_size < 1, f"`train.batch_size` is {train.batch_size}, it must be at least 1"),
        (train.seq_len < 2, f"`train.seq_len` is {train.seq_len}, it must be at least 2"),
        (
            min(train.steps, train.tokens, train.minutes) < 0,
            "a budget (`train.steps`, `tokens`, `minutes`) is negative",
        ),
        (
            not fits_micro,
            f"`train.batch_size` {train.batch_size} is not divisible by `train.micro_batch_size` {train.micro_batch_size}",
        ),
        (not 0 < data.val_frac < 1, f"`data.val_frac` is {data.val_frac}, it must be between 0 and 1"),
        (not 0 < data.mask_frac < 1, f"`data.mask_frac` is {data.mask_frac}, it must be between 0 and 1"),
        (data.mean_span_tokens < 1, f"`data.mean_span_tokens` is {data.mean_span_tokens}, it must be at least 1"),
        (train.log_every < 1, f"`train.log_every` is {train.log_every}, it must be at least 1"),
        (train.loss_chunk_tokens < 1, f"`train.loss_chunk_tokens` is {train.loss_chunk_tokens}, it must be at least 1"),
        (config.optim.lr <= 0, f"`optim.lr` is {config.optim.lr}, it must be positive"),
    ]
    problems = [sentence for wrong, sentence in checks if wrong]
    if problems:
        raise UsageError("; ".join(problems), "--print-config shows every key with its meaning")


def check_corpus(config: PretrainConfig, corpus: Corpus) -> None:
    """Refuse text that is too short to learn from.

    Raises: UsageError with the numbers.
    """
    n_tokens = int(corpus.documents.lengths[corpus.train].sum())
    if len(corpus.train) == 0 or n_tokens < 2:
        raise UsageError(
            f"the training part of the data has {n_tokens} tokens", "give more text, or a smaller --set data.val_frac"
        )
    if config.objective == "mlm" and corpus.tokenizer.mask_id is None:
        raise UsageError(
            "the tokenizer has no mask token, which `--objective mlm` needs", "leave --tokenizer away to train one"
        )
    if config.objective == "span" and not corpus.tokenizer.sentinel_ids():
        raise UsageError(
            "the tokenizer has no <extra_id_0>, ... tokens, which `--objective span` needs",
            "llmctl tokenize train --set n_sentinels=32 makes one, or leave --tokenizer away",
        )


def load_base(config: PretrainConfig) -> Any:
    """Load the model that `model.preset` names if it is a path, else return None."""
    name = config.model.preset
    if name == "auto" or name.lower() in PRESETS or name.lower() in ALIASES:
        return None
    if not Path(name).exists():
        get_preset(name)  # raises, with the closest name
    base = load_model(Path(name), device="cpu", dtype="float32")
    check_family(config, base.model.config.family, name)
    if base.tokenizer is None:
        raise UsageError(f"`{name}` has no tokenizer, so its training cannot go on", "give it one with --tokenizer")
    return base


def model_config(config: PretrainConfig) -> ModelConfig:
    """Return the shape to train: the preset in the objective's family, with the overrides, not yet a vocabulary."""
    name = "tiny" if config.model.preset == "auto" else config.model.preset
    family = config.model.overrides.get("family", OBJECTIVES[config.objective].families[0])
    shape = preset_config(name, family if get_preset(name).dims_only else None)
    return replace(shape, **config.model.overrides)


def check_family(config: PretrainConfig, family: Family, name: str) -> None:
    """Refuse a model that the objective cannot train.

    Raises: UsageError naming both.
    """
    allowed = OBJECTIVES[config.objective].families
    if family not in allowed:
        fitting = [row for row, entry in OBJECTIVES.items() if family in entry.families]
        raise UsageError(
            f"`{name}` is of the family {family}, but `--objective {config.objective}` trains {' or '.join(allowed)}",
            f"--objective {' or '.join(fitting)} trains it",
        )


def build_model(config: PretrainConfig, tokenizer: Tokenizer) -> LanguageModel:
    """Build and initialise the model for a tokenizer: its vocabulary and ids, and a context of at least a row."""
    shape = model_config(config)
    check_family(config, shape.family, config.model.preset)
    wanted = config.model.overrides.get("vocab_size", 0)
    if wanted and wanted < tokenizer.vocab_size:
        raise UsageError(
            f"`model.vocab_size` {wanted} is smaller than the tokenizer's {tokenizer.vocab_size}",
            "leave model.vocab_size away, or lower tokenizer.vocab_size",
        )
    context = shape.max_positions
    if "max_positions" not in config.model.overrides:
        context = max(context, config.train.seq_len)
    if context < config.train.seq_len:
        raise UsageError(
            f"`train.seq_len` {config.train.seq_len} is longer than `model.max_positions` {context}",
            f"--set model.max_positions={config.train.seq_len}",
        )
    bos = -1 if tokenizer.bos_id is None else tokenizer.bos_id
    pad = -1 if tokenizer.pad_id is None else tokenizer.pad_id
    shape = replace(
        shape,
        vocab_size=wanted or tokenizer.vocab_size,
        max_positions=context,
        pad_id=pad,
        bos_id=bos,
        eos_id=-1 if tokenizer.eos_id is None else tokenizer.eos_id,
        mask_id=-1 if tokenizer.mask_id is None else tokenizer.mask_id,
        decoder_start_id=max(pad, 0) if shape.family == "encoder_decoder" else -1,
    )
    model = LanguageModel(shape)
    initialise(model, config.train.seed)
    return model


def assemble(
    run: Run,
    config: PretrainConfig,
    runtime: Runtime,
    model: LanguageModel,
    corpus: Corpus,
    progress: Progress,
    started: float,
) -> Training:
    """Put together what the loop works with."""
    token_bytes = np.zeros(model.config.vocab_size, dtype=np.int32)
    known = corpus.tokenizer.token_bytes()
    token_bytes[: len(known)] = known
    objective = LabelPrediction(model, torch.from_numpy(token_bytes), config.train.loss_chunk_tokens)
    minutes = config.train.minutes
    flops = label_flops(config, model.config)
    return Training(
        objective=objective,
        model=model,
        train=make_batches(config, corpus, model.config, shuffle=True),
        held_out=make_batches(config, corpus, model.config, shuffle=False),
        config=config.train,
        optim=config.optim,
        runtime=runtime,
        folder=run.path,
        progress=progress,
        resume_command=f"llmctl pretrain --resume {run.path}",
        flops_per_token=flops,
        peak_flops=product_rate(runtime.dtype, runtime.device.type) if flops else 0.0,
        deadline=started + minutes * 60 if minutes else None,
        sample=make_sampler(config, corpus, model, Artifact(run.path, "", model.config, {}, {})),
        state=State(),
    )


def label_flops(config: PretrainConfig, model: ModelConfig) -> float:
    """Return the model's FLOPs per position of a row; 0 for an encoder-decoder, whose two sides differ in length."""
    if model.family == "encoder_decoder":
        return 0.0
    per_token = flops_per_token(model, config.train.seq_len)
    # The head works where labels are, and nowhere else.
    unlabelled = 1 - config.data.mask_frac if config.objective == "mlm" else 0.0
    return per_token - 6 * Shape.of(model).head * unlabelled


def make_batches(config: PretrainConfig, corpus: Corpus, model: ModelConfig, *, shuffle: bool) -> Batches:
    """Return the objective's batches over the training or the held-out part."""
    train, data = config.train, config.data
    tokenizer = corpus.tokenizer
    selection = corpus.train if shuffle else corpus.held_out
    special = tokenizer.token_bytes() == 0
    ids = Ids(
        pad=max(model.pad_id, 0),
        eos=max(model.eos_id, 0),
        decoder_start=max(model.decoder_start_id, 0),
        special=special,
        sentinels=np.array(tokenizer.sentinel_ids(), dtype=np.int64),
    )
    if config.objective == "seq2seq":
        assert corpus.targets is not None
        rows = PairRows(
            corpus.documents, corpus.targets, selection, seed=train.seed, batch_size=train.batch_size, shuffle=shuffle
        )
        return PairBatches(rows, ids, train.seq_len)
    packed = PackedRows(
        corpus.documents,
        selection,
        seq_len=train.seq_len,
        overlap=int(config.objective == "clm"),
        seed=train.seed,
        shuffle=shuffle,
        isolate=data.isolate,
    )
    if config.objective == "clm":
        return CausalBatches(packed, ids)
    # Held-out rows are masked by another stream than training rows, the same at every evaluation.
    seed = train.seed * 2 + int(not shuffle)
    if config.objective == "span":
        return SpanBatches(packed, ids, frac=data.mask_frac, mean_span_tokens=data.mean_span_tokens, seed=seed)
    word_starts = tokenizer.word_starts() if data.whole_word else None
    return MaskedBatches(packed, ids, Masking(max(model.mask_id, 0), data.mask_frac, special, word_starts), seed)


def label(config: PretrainConfig) -> str:
    """Return a short name for the run folder."""
    return "tiny" if config.model.preset == "auto" else Path(config.model.preset).name.removesuffix(".safetensors")
