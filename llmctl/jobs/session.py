"""An open run, as a job sees it: prepare the data once, train parts one after the other, write the result.

A job is a function of a session and a config that reads from top to bottom. The session takes care of several
processes, checkpoints, resuming and memory; it knows nothing of what is trained.
"""

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from llmctl.distributed.runtime import Runtime
from llmctl.families.table import family_for
from llmctl.files import write_bytes
from llmctl.jobs.dry_run import fitting_rows
from llmctl.jobs.finish import Product, Trained, finish
from llmctl.jobs.startup import check_space, compare_processes, newest_checkpoint, time_limit
from llmctl.machine import name_of, product_rate
from llmctl.model.flops import Rows
from llmctl.model.transformer import LanguageModel
from llmctl.preparing.corpus import CORPUS, Corpus, keep_corpus, open_corpus
from llmctl.recipe import Resolved, dump, nested, values_of
from llmctl.runs import checkpoint
from llmctl.runs.folder import Run
from llmctl.runs.progress import Progress
from llmctl.training.batch import BatchSource
from llmctl.training.evaluation import measure_only
from llmctl.training.freezing import freeze
from llmctl.training.generation_scores import Score
from llmctl.training.inputs import Fitted, Training
from llmctl.training.loop import fit
from llmctl.training.objectives import Objective
from llmctl.training.samples import Sampler

Result = TypeVar("Result")


@dataclass(frozen=True)
class Part:
    """A model to train, with all that the loop needs.

    objective, batches: called when memory for them is needed; `batches` takes `shuffle=`. rows: of a step, to predict
    memory. config: with the part's `train` and `optim`. identity: what all processes must agree on. name: of its folder in
    `parts/`; the run's own model has none. has_own_budget: its minutes count from its own start. trains: else the model is
    only measured, on all held-out rows or on evenly spaced ones of `max_tokens`. keeps_start: the untrained model is the
    result if training made it worse.
    """

    model: LanguageModel
    objective: Callable[[], Objective]
    batches: Callable[..., BatchSource]
    rows: Rows
    config: Any
    identity: Mapping[str, str]
    name: str = ""
    metric: str = "loss"
    flops_per_token: float = 0.0
    sample: Sampler | None = None
    score: Score | None = None
    has_own_budget: bool = False
    keeps_start: bool = False
    trains: bool = True
    max_tokens: int = 0


@dataclass
class Session:
    """A run that is open in this process."""

    run: Run
    config: Any
    objective: str
    runtime: Runtime
    progress: Progress
    command: str
    invocation: str
    started: float
    resumes: bool = False
    show_example: bool = False
    trained: Trained | None = None

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.run.path

    def say(self, text: str) -> None:
        """Print a line of progress."""
        self.progress.say(text)

    def lead(self, action: Callable[[], Result]) -> Result:
        """Let the first process act while the others wait; return its result in all of them."""
        return self.runtime.lead(action)

    def prepare(self, make: Callable[[Path], Corpus], name: str = "data") -> Corpus:
        """Return the run's encoded data; the first process makes it, unless it did so before a restart."""
        folder = self.folder / name

        def write() -> None:
            if not (folder / CORPUS).is_file():
                keep_corpus(make(folder), folder)

        self.lead(write)
        return open_corpus(folder)

    def fit(self, part: Part) -> Fitted:
        """Train a part from its newest checkpoint, or from its beginning."""
        # Before memory is predicted: frozen weights have no optimizer state.
        n_frozen = freeze(part.model, part.config.train.freeze)
        part = self._with_micro_batch(part)
        compare_processes(self.runtime, self.config, part.identity, self.progress)
        check_space(self.run, part.model, part.config.optim.name)
        folder = self.folder / "parts" / part.name if part.name else self.folder
        # A part without a checkpoint starts from its beginning, also when the run resumes.
        saved = newest_checkpoint(folder, self.runtime, self.progress) if self.resumes else None
        training = self._assemble(part, folder, saved)
        self.say(
            f"{family_for(part.model.config).architecture}: {part.model.n_parameters:,} parameters"
            f"{f', {n_frozen:,} of them frozen' if n_frozen else ''}, "
            f"{self.objective} in {name_of(self.runtime.dtype)} on {self.runtime.device.type}"
            f"{f': {part.name}' if part.name else ''}"
        )
        return fit(training, saved) if part.trains else measure_only(training, part.max_tokens)

    def finish(self, product: Product) -> None:
        """Write the model and everything else that a finished run leaves; in the first process."""

        def write() -> None:
            self.trained = finish(
                product,
                run=self.run,
                config=self.config,
                objective=self.objective,
                invocation=self.invocation,
                started=self.started,
                runtime=self.runtime,
                progress=self.progress,
            )

        self.lead(write)

    def _with_micro_batch(self, part: Part) -> Part:
        """Replace a micro-batch size of -1 by the largest that fits into memory; the global batch stays."""
        train = part.config.train
        if train.micro_batch_size >= 0:
            return part
        if self.config.train.micro_batch_size < 0:
            size = min(self.runtime.gather(fitting_rows(part.config, part.model.config, part.rows, self.runtime)))
            # Chosen to fit into the predicted memory: return what is freed, so that the prediction holds.
            settled = replace(self.config.train, micro_batch_size=size, return_memory=True)
            self.config = replace(self.config, train=settled)
            if self.run.lock is not None:  # a resumed run takes the same size
                write_bytes(self.folder / "recipe.yaml", dump(Resolved(self.config, {})).encode())
            self.say(f"micro-batches of {size} of the {train.batch_size} rows of a step")
        size = self.config.train.micro_batch_size
        train = replace(train, micro_batch_size=size, return_memory=True)
        return replace(part, config=replace(part.config, train=train))

    def _assemble(self, part: Part, folder: Path, saved: checkpoint.Checkpoint | None) -> Training:
        """Put together what the loop works with."""
        config = part.config
        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic() if part.has_own_budget else self.started
        seconds = saved.state.get("seconds") if saved else 0.0
        used_seconds = seconds if isinstance(seconds, (int, float)) else 0.0  # the loop refuses such a state
        rate = product_rate(self.runtime.dtype, self.runtime.device.type) if part.flops_per_token else 0.0
        return Training(
            objective=part.objective(),
            model=part.model,
            train=part.batches(shuffle=True),
            held_out=part.batches(shuffle=False),
            config=config.train,
            optim=config.optim,
            runtime=self.runtime,
            folder=folder,
            progress=self.progress,
            resume_command=f"llmctl {self.command} --resume {shlex.quote(str(self.folder))}",
            flops_per_token=part.flops_per_token,
            peak_flops=rate,
            deadline=started + config.train.minutes * 60 - used_seconds if config.train.minutes else None,
            limit=time_limit(config.train.limit_minutes, started),
            sample=part.sample,
            score=part.score,
            metric=part.metric,
            keeps_start=part.keeps_start,
            recipe=nested(config),
            trackers=self.runtime.make_trackers(
                config.train.track, folder, values_of(config), saved.state.get("trackers", {}) if saved else {}
            ),
        )


def identity(corpus: Corpus, **more: str) -> dict[str, str]:
    """Return what all processes must agree on, besides the recipe."""
    return {"data": str(corpus.provenance.get("sha256")), "tokenizer": corpus.tokenizer.sha256, **more}
