"""Teachers beside the model that is trained: frozen, in evaluation mode, and never part of what is saved or wrapped.

Knows nothing of losses beyond the form in which they take a teacher.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmctl.artifacts.load import Loaded, fitting_tokenizer, load_model
from llmctl.artifacts.with_adapters import read_model
from llmctl.config import TaughtConfig
from llmctl.errors import UsageError
from llmctl.formats.artifact import Artifact
from llmctl.losses.teachers import DenseTeacher
from llmctl.machine import DTYPES
from llmctl.model.transformer import LanguageModel
from llmctl.quant.int8 import to_int8
from llmctl.tables.dtypes import full_name

SIGNALS = ("teacher_ids", "teacher_probs", "teacher_tail", "teacher_hidden")
"""Arrays of a batch that stand in for a teacher; see distilling/teacher_cache.py."""


def inputs_of(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what of a batch a model reads."""
    return {name: tensor for name, tensor in batch.items() if name not in ("labels", "targets", *SIGNALS)}


@dataclass(frozen=True)
class Seen:
    """What a teacher makes of a batch: hidden states under the head (B, T, D), and what a layer attends with."""

    hidden_BTD: Tensor
    qkv: tuple[Tensor, Tensor, Tensor] | None = None


class Teacher:
    """A frozen model. No module: wrappers that shard or exchange parameters must not see it."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model.eval().requires_grad_(requires_grad=False)

    def to(self, device: torch.device, dtype: str, training_dtype: torch.dtype) -> "Teacher":
        """Move it to a device in the dtype that is asked for: float32, bfloat16, int8 (the blocks' matrices), or auto."""
        self.model.to(device, training_dtype if dtype == "auto" else DTYPES.get(full_name(dtype), torch.float32))
        if dtype == "int8":
            for stack in self.model.stacks():
                to_int8(stack.layers)
        return self

    @torch.no_grad()
    def see(self, inputs: Mapping[str, Any], layer: int = 0) -> Seen:
        """Read a batch; with a layer from 1 also return its queries, keys and values."""
        attended: dict[int, tuple[Tensor, Tensor, Tensor] | None] = {layer - 1: None}
        hidden_BTD = self.model.hidden(**inputs, attended=attended if layer else None)
        return Seen(hidden_BTD, attended[layer - 1])

    @torch.no_grad()
    def dense(self, hidden_ND: Tensor) -> DenseTeacher:
        """Return the form in which losses take hidden states and the head over them."""
        head = self.model.lm_head
        return DenseTeacher(self.model.head_input(hidden_ND), head.weight, head.bias)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its head."""
        return self.model.dtype


def tokenizer_sha256(artifact: Artifact) -> str | None:
    """Return the hash of a model's tokenizer; None where it has none."""
    tokenizer = fitting_tokenizer(artifact)
    return tokenizer.sha256 if tokenizer is not None else None


def check_same_words(teacher: str, student: str) -> None:
    """Refuse two models whose token ids mean different things; a vocabulary that is padded differently is no matter.

    Raises: UsageError naming both.
    """
    hashes = [tokenizer_sha256(read_model(Path(name))) for name in (teacher, student)]
    if hashes[0] != hashes[1]:
        shown = " and ".join("none" if found is None else found[:12] for found in hashes)
        raise UsageError(
            f"`{teacher}` and `{student}` have different tokenizers ({shown}): what one says of a token tells the other nothing",
            "learn from the texts that the teacher writes instead: --loss seq",
        )


def load_more(first: Loaded, names: Sequence[str], model: str) -> list[Teacher]:
    """Load further teachers, of the first one's tokenizer and family.

    Raises: UsageError for one that differs; NotFoundError and ArtifactError.
    """
    teachers = []
    for name in names:
        check_same_words(model, name)
        other = load_model(Path(name), device="cpu", dtype="float32")
        here, there = first.model.config, other.model.config
        if (here.family, here.n_labels, here.problem) != (there.family, there.n_labels, there.problem):
            raise UsageError(
                f"`{name}` is {there.family} with {there.n_labels} labels, `{model}` {here.family} with {here.n_labels}",
                "teachers that are averaged must predict the same",
            )
        teachers.append(Teacher(other.model))
    return teachers


class Teachers:
    """The teachers of a run: the first as it was published, and all of them where they compute.

    Only one of the two is kept in memory: moving the teachers consumes the original, and asking for it again reloads it.
    """

    def __init__(self, config: TaughtConfig) -> None:
        self.config = config
        self.path = Path(config.model)
        self.artifact = read_model(self.path)
        self._original: Loaded | None = None
        self._computing: list[Teacher] | None = None

    def original(self) -> Loaded:
        """Return the first teacher in float32 on the CPU."""
        if self._original is None:
            self._original = load_model(self.path, device="cpu", dtype="float32")
        return self._original

    @property
    def computing(self) -> list[Teacher]:
        """All teachers: where `move` has put them, else in float32 on the CPU."""
        if self._computing is None:
            first = self.original()
            self._computing = [Teacher(first.model), *load_more(first, self.config.teacher.more, self.config.model)]
        return self._computing

    def move(self, device: torch.device, training_dtype: torch.dtype) -> None:
        """Move all teachers to where training is, in the dtype of `teacher.dtype`."""
        for teacher in self.computing:
            teacher.to(device, self.config.teacher.dtype, training_dtype)
        self._original = None

    def on_cpu(self) -> "Teachers":
        """Return these teachers in float32 on the CPU, whatever has been done to them."""
        if self._original is not None or self._computing is None:
            return self
        return Teachers(self.config)

    def free(self) -> None:
        """Release the memory of all teachers; the next use reloads them."""
        self._original = self._computing = None
