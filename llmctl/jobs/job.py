"""A training command's own part: what it reads, what it trains, and what it leaves.

`train.py` opens the run, brings the processes together, goes through the loop and records how it ended; it asks a job
for the rest. Commands differ in their job and in nothing else.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from llmctl.distributed.runtime import Runtime
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.flops import Rows
from llmctl.model.transformer import LanguageModel, with_tied
from llmctl.preparing.corpus import Corpus
from llmctl.runs.folder import Run
from llmctl.runs.progress import Say
from llmctl.training.batch import BatchSource
from llmctl.training.held_out import measure
from llmctl.training.loop import Fitted, Training
from llmctl.training.objectives import Objective
from llmctl.training.samples import Sampler


class Job(ABC):
    """The parts in which training commands differ, asked for from top to bottom.

    `runtime` is there from the beginning, `corpus` after `load`, `model` after `load` or `load_part`.
    """

    command: ClassVar[str]
    config_class: ClassVar[type]
    metric: str = "loss"
    corpus: Corpus
    model: LanguageModel
    runtime: Runtime

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    @abstractmethod
    def objective(self) -> str:
        """What is learned, in a word."""

    @property
    @abstractmethod
    def label(self) -> str:
        """A name for the run folder."""

    @abstractmethod
    def check(self) -> None:
        """Refuse settings that exclude each other, before anything is read."""

    @property
    def current(self) -> Any:
        """The config of the part that is trained now: the run's own, unless a job has parts that differ."""
        return self.config

    @property
    def trains(self) -> bool:
        """Whether there are steps to take; else `measured` is asked in place of the loop."""
        return True

    def measured(self, training: Training) -> Fitted:
        """Return what there is to say where nothing is trained: the figures on all held-out rows."""
        figures = measure(
            training.objective,
            training.objective,
            training.held_out,
            training.config,
            training.runtime,
            None,
            lambda: None,
            sharded=False,
        )
        if training.score:
            figures |= training.score(None)
        return Fitted({}, figures, training.state, 0, {})

    def parts(self) -> Sequence[str]:
        """Return the names of what is trained one after the other; the last, without a name, is the run's model."""
        return ("",)

    def prepare_part(self, part: str, run: Path, say: Say) -> None:
        """Make what a part begins with, if that takes time; the first process does it for all."""
        del part, run, say

    def load_part(self, part: str, run: Path, say: Say) -> None:
        """Have `model` be what a part trains."""
        del part, run, say

    def keep_part(self, part: str, run: Path, fitted: Fitted) -> None:
        """Keep what came out of a part that is not the last; the first process does it for all."""
        del part, run, fitted

    def has_part(self, part: str, run: Path) -> bool:
        """Tell whether `keep_part` has been here."""
        del part, run
        return False

    def conclude(self, fitted: Fitted, training: Training) -> None:
        """Measure what only makes sense when all is trained; in all processes, before anything is written."""
        del fitted, training

    def missed(self) -> str:
        """Return which gate was missed, or nothing."""
        return ""

    @abstractmethod
    def prepare(self, folder: Path, say: Say) -> None:
        """Read, split and encode the data into a folder; the first process does it for all."""

    @abstractmethod
    def load(self, folder: Path, say: Say) -> None:
        """Open the prepared data and build the model."""

    @abstractmethod
    def rows(self) -> Rows:
        """Return how long the rows of a step are, for predictions of memory."""

    @abstractmethod
    def make_objective(self) -> Objective:
        """Return the objective over the model."""

    @abstractmethod
    def make_batches(self, *, shuffle: bool) -> BatchSource:
        """Return the training batches, or those of the held-out part in order."""

    def flops(self) -> float:
        """Return the model's FLOPs per position; 0 where they cannot be told."""
        return 0.0

    def make_sampler(self, folder: Path) -> Sampler | None:
        """Return what writes samples at evaluations."""
        del folder
        return None

    def make_score(self, runtime: Runtime) -> Callable[[int | None], dict[str, float]] | None:
        """Return what adds figures that need the model to write."""
        del runtime
        return None

    def identity(self) -> dict[str, str]:
        """Return what all processes must have in common besides the recipe."""
        return {"data": str(self.corpus.provenance.get("sha256")), "tokenizer": self.corpus.tokenizer.sha256}

    def files(self) -> dict[str, bytes]:
        """Return what has to lie beside the model."""
        return self.corpus.tokenizer.files()

    def provenance(self) -> dict[str, Any]:
        """Return what the model file says of where it comes from, besides recipe and figures."""
        return {}

    def write(self, folder: Path, fitted: Fitted, provenance: Mapping[str, Any]) -> None:
        """Write the trained model into the run folder."""
        state = {name: tensor.float().cpu() for name, tensor in self.weights(fitted.weights).items()}
        write_artifact(folder, self.model.config, state, files=self.files(), provenance=provenance, force=True)

    def weights(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the model's whole state from the tensors that training gave back."""
        return with_tied(self.model.config, trained)

    def facts(self) -> dict[str, Any]:
        """Return what the summary says besides figures."""
        return {}

    def card_note(self, summary: Mapping[str, Any]) -> str:
        """Return a sentence for the model card."""
        del summary
        return ""

    @abstractmethod
    def closing(self, summary: Mapping[str, Any], run: Run) -> str:
        """Return the closing lines: what was made, its key number, and the next command to try."""
