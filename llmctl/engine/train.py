"""pretrain, composed from the parts: a corpus, a model, batches of an objective, the loop, and what a run leaves.

Other training commands stand beside this one: they differ in data, objective and which parameters train.
"""

import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmctl.config import ModelConfig, PretrainConfig
from llmctl.data.batches import Batches, CausalBatches, Ids, MaskedBatches, PairBatches, SpanBatches
from llmctl.data.masking import Masking
from llmctl.data.stream import PackedRows, PairRows
from llmctl.engine import checkpoint
from llmctl.engine.checks import check, check_corpus, check_family, model_config, refuse_changes, with_budget
from llmctl.engine.corpus import CORPUS, Corpus, keep_corpus, open_corpus, prepare_corpus
from llmctl.engine.estimate import Shape, flops_per_token
from llmctl.engine.loop import Training, fit
from llmctl.engine.models import load_model
from llmctl.engine.objectives import LabelPrediction
from llmctl.engine.outcome import Trained, finish, is_file, parameter_count
from llmctl.engine.parallel import check_layout
from llmctl.engine.plan import fitting_rows
from llmctl.engine.progress import Progress, make_progress
from llmctl.engine.runs import Run, create_run, find_run, open_run
from llmctl.engine.runtime import Runtime, is_out_of_memory, product_rate, start
from llmctl.engine.samples import make_sampler
from llmctl.engine.together import agree_on_start, compare_processes, losing_peers, note_begun, open_together
from llmctl.errors import (
    InterruptedRunError,
    LlmctlError,
    MemoryLimitError,
    OutputError,
    StoppedError,
    UsageError,
)
from llmctl.files import ensure_writable, write_bytes
from llmctl.formats.artifact import Artifact
from llmctl.formats.families import family_for
from llmctl.model.presets import ALIASES, PRESETS, get_preset
from llmctl.model.transformer import LanguageModel, initialise
from llmctl.recipe import Resolved, changed_keys, dump, load, nested
from llmctl.tokenizer.base import Tokenizer


def pretrain(
    resolved: Resolved[PretrainConfig], *, command: str, out: Path | None, quiet: bool, verbose: bool = False
) -> Trained | None:
    """Train a model from raw text and leave it as a run folder, or as the single file `out`.

    Returns None in all processes but the first.
    Raises: LlmctlError of every kind; what is on disk by then stays valid and resumable.
    """
    config = with_budget(resolved.config)
    check(config)
    started = time.monotonic()
    runtime = start(config.train, config.parallel)
    check_layout(config.train, config.parallel, runtime.world_size)
    begun = agree_on_start(runtime, "begin a run")
    if begun:  # the launcher has started all processes again
        return resume(begun, command=command, quiet=quiet, verbose=verbose, runtime=runtime)

    def create() -> Run:
        if out is not None:
            ensure_writable(out.parent)
        run = create_run("pretrain", f"{config.objective}-{label(config)}", out=None if out and is_file(out) else out)
        clear(run.path)
        write_bytes(run.path / "recipe.yaml", dump(Resolved(config, resolved.origins)).encode())
        run.update(invocation=command, objective=config.objective, out=str(out) if out and is_file(out) else None)
        note_begun(run.path)
        return run

    run = open_together(runtime, create)
    progress = make_progress(quiet=quiet or not runtime.is_main, verbose=verbose)
    try:
        return train_in(run, config, progress, runtime, command=command, started=started)
    finally:
        progress.close()
        run.close()


def resume(
    name: str,
    *,
    command: str,
    quiet: bool,
    verbose: bool = False,
    given: Mapping[str, Any] | None = None,
    allowed: Sequence[str] = (),
    runtime: Runtime | None = None,
) -> Trained | None:
    """Go on with a run from its newest valid checkpoint, as if it had never stopped.

    `given` are settings beside it, which must be the run's own unless `allowed` names them. Returns None in all
    processes but the first.
    Raises: NotFoundError for a run or checkpoint that is not there, BusyError if it is still running, UsageError for
    a changed recipe, ArtifactError if all its checkpoints are damaged.
    """
    path = find_run(name)
    saved_recipe = load(PretrainConfig, recipe=str(path / "recipe.yaml"), environment={}).config
    config = load(PretrainConfig, recipe=str(path / "recipe.yaml"), environment={}, flags=given or {}).config
    changes = changed_keys(saved_recipe, config)
    refuse_changes(path, changes, allowed)
    check(config)
    started = time.monotonic()
    if runtime is None:
        runtime = start(config.train, config.parallel)
        agree_on_start(runtime, f"go on with {path}")
    check_layout(config.train, config.parallel, runtime.world_size)

    def open_unfinished() -> Run:
        run = open_run(path)
        if run.record.get("status") == "finished":
            run.close()
            raise UsageError(f"run `{path}` is finished", "start a new run with -r and more steps")
        if changes:
            write_bytes(path / "recipe.yaml", dump(Resolved(config, {})).encode())
        run.update(status="running")
        note_begun(path)
        return run

    run = open_together(runtime, open_unfinished)
    progress = make_progress(quiet=quiet or not runtime.is_main, verbose=verbose)
    try:
        for key, (old, new) in changes.items():
            progress.say(f"changed: {key} {old} -> {new}")
        with losing_peers(runtime, run.path):
            saved = newest_checkpoint(run, runtime, progress)
        command = str(run.record.get("invocation", command))
        return train_in(run, config, progress, runtime, command=command, started=started, saved=saved)
    finally:
        progress.close()
        run.close()


def check_space(run: Run, config: PretrainConfig, model: LanguageModel) -> None:
    """Refuse to begin where not even one checkpoint would find room.

    Raises: OutputError with what is needed and what there is.
    """
    n_bytes = 4 * (2 if config.optim.name == "muon" else 3) * parameter_count(model)
    free = shutil.disk_usage(run.path).free
    if run.lock is not None and free < n_bytes:
        raise OutputError(
            f"a checkpoint takes {n_bytes / 1e6:,.0f} MB, `{run.path}` has {free / 1e6:,.0f} MB free",
            "free some space there, or choose another place with -o",
        )


def newest_checkpoint(run: Run, runtime: Runtime, progress: Progress) -> checkpoint.Checkpoint | None:
    """Return the checkpoint that the first process has found to be the newest valid one, None if there is none yet.

    Raises: ArtifactError if there are some and all are damaged.
    """
    folder, problem, name = run.path / "checkpoints", None, None
    if runtime.is_main and checkpoint.published(folder):
        try:
            saved, skipped = checkpoint.Store(folder).load_newest()
            name = saved.path.name
            for line in skipped:
                progress.say(line)
            progress.say(f"resuming {run.path} at step {saved.state['step']} of {saved.state['total_steps']}")
        except LlmctlError as error:
            problem = error
    runtime.wait_for_first(problem)
    name = runtime.first(name)
    return checkpoint.open_checkpoint(folder / name) if name else None


def train_in(
    run: Run,
    config: PretrainConfig,
    progress: Progress,
    runtime: Runtime,
    *,
    command: str,
    started: float,
    saved: checkpoint.Checkpoint | None = None,
) -> Trained | None:
    """Do the training of an open run, and record how it ended."""
    trained = None
    try:
        with losing_peers(runtime, run.path), naming_memory(runtime):
            base = load_base(config)
            corpus = prepare_together(config, run, runtime, base.tokenizer if base else None, progress)
            check_corpus(config, corpus)
            model = base.model if base else build_model(config, corpus.tokenizer)
            config = with_micro_batch(config, model, runtime, run, progress)
            compare_processes(runtime, config, corpus, progress)
            check_space(run, config, model)
            training = assemble(run, config, runtime, model, corpus, progress, started, saved)
            progress.say(
                f"{family_for(model.config).architecture}: {parameter_count(model):,} parameters, "
                f"{config.objective} in {str(runtime.dtype).removeprefix('torch.')} on {runtime.device.type}"
            )
            fitted = fit(training, saved)
            if runtime.is_main:
                trained = finish(run, config, training, corpus, fitted, command=command, started=started)
            runtime.wait_for_first()
    except (InterruptedRunError, StoppedError):
        run.update(status="interrupted")
        raise
    except BaseException as error:
        is_told = isinstance(error, (LlmctlError, KeyboardInterrupt))
        text = (str(error) or type(error).__name__) if is_told else f"{type(error).__name__}: {error}"
        run.update(status="failed", error=text)
        raise
    return trained


@contextmanager
def naming_memory(runtime: Runtime) -> Iterator[None]:
    """Turn the end of the memory into an error that says what needs less of it.

    Raises: MemoryLimitError.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryLimitError(
            f"the memory of {runtime.device.type} is used up ({str(error).strip().splitlines()[0][:160]})",
            "--batch-size auto fits micro-batches to the memory; --set parallel.activation_checkpointing=true and "
            "--parallel fsdp need less of it",
        ) from error


def prepare_together(
    config: PretrainConfig, run: Run, runtime: Runtime, tokenizer: Tokenizer | None, progress: Progress
) -> Corpus:
    """Open the run's encoded text; the first process has made it, now or before a restart."""
    folder, problem = run.path / "data", None
    if runtime.is_main and not (folder / CORPUS).is_file():
        try:
            keep_corpus(prepare_corpus(config, folder, tokenizer, progress.say), folder)
        except LlmctlError as error:
            problem = error
    runtime.wait_for_first(problem)
    return open_corpus(folder)


def with_micro_batch(
    config: PretrainConfig, model: LanguageModel, runtime: Runtime, run: Run, progress: Progress
) -> PretrainConfig:
    """Replace a micro-batch of -1 by the largest that the memory holds; the global batch stays."""
    if config.train.micro_batch_size >= 0:
        return config
    size = min(runtime.gather(fitting_rows(config, model.config, runtime)))
    # What was chosen to fit must take what was predicted, now and when the run goes on.
    config = replace(config, train=replace(config.train, micro_batch_size=size, return_memory=True))
    if run.lock is not None:  # a resumed run takes the same
        write_bytes(run.path / "recipe.yaml", dump(Resolved(config, {})).encode())
    progress.say(f"micro-batches of {size} of the {config.train.batch_size} rows of a step")
    return config


def clear(folder: Path) -> None:
    """Remove what an earlier run left in a folder that is used again (`-o` with `-f`)."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        (folder / name).unlink(missing_ok=True)
    for name in ("checkpoints", "data"):
        shutil.rmtree(folder / name, ignore_errors=True)


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
    saved: checkpoint.Checkpoint | None,
) -> Training:
    """Put together what the loop works with."""
    token_bytes = np.zeros(model.config.vocab_size, dtype=np.int32)
    known = corpus.tokenizer.token_bytes()
    token_bytes[: len(known)] = known
    objective = LabelPrediction(model, torch.from_numpy(token_bytes), config.train.loss_chunk_tokens)
    flops = label_flops(config, model.config)
    used_seconds = saved.state["seconds"] if saved else 0.0
    recipe = nested(config)
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
        resume_command=f"llmctl pretrain --resume {shlex.quote(str(run.path))}",
        flops_per_token=flops,
        peak_flops=product_rate(runtime.dtype, runtime.device.type) if flops else 0.0,
        deadline=started + config.train.minutes * 60 - used_seconds if config.train.minutes else None,
        limit=time_limit(config.train.limit_minutes, started),
        sample=make_sampler(config, corpus, model, Artifact(run.path, "", model.config, {}, {})),
        recipe=recipe,
        trackers=runtime.make_trackers(
            config.train.track, run.path, recipe, saved.state.get("trackers", {}) if saved else {}
        ),
    )


def time_limit(minutes: float, started: float) -> float | None:
    """Return the moment by which this process must have ended, on the clock of `started`: the user's or Slurm's."""
    if minutes:
        return started + 60 * minutes
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return time.monotonic() + int(end) - time.time() if end.isdigit() else None


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
