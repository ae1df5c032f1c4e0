"""Teachers: frozen models in evaluation mode that are never saved or wrapped with the student.

Knows nothing of losses except the form of teacher outputs they take.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmctl.artifacts.load import Loaded, fitting_tokenizer, load_model
from llmctl.config import TaughtConfig
from llmctl.distilling.settings import read_teacher
from llmctl.errors import UsageError
from llmctl.formats.artifact import Artifact
from llmctl.losses.teachers import DenseTeacher
from llmctl.machine import DTYPES
from llmctl.model.transformer import LanguageModel
from llmctl.quant.int8 import to_int8
from llmctl.tables.dtypes import full_name
from llmctl.tokenizer.base import Tokenizer

SIGNALS = ("teacher_ids", "teacher_probs", "teacher_tail", "teacher_hidden")
"""Arrays of a batch that replace a teacher; see distilling/teacher_cache.py."""

READ = ("teacher_input_ids", "teacher_trained", "teacher_documents")
"""Arrays of a batch that the teacher reads, (B, S): the same conversations in its tokens, which of these are answers, and
their numbers in the row; see distilling/answer_alignment.py."""


def inputs_of(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the model inputs of a batch."""
    return {name: tensor for name, tensor in batch.items() if name not in ("labels", "targets", *SIGNALS, *READ)}


@dataclass(frozen=True)
class Seen:
    """A teacher's outputs: hidden states before the head (B, T, D), and queries, keys and values of a layer."""

    hidden_BTD: Tensor
    qkv: tuple[Tensor, Tensor, Tensor] | None = None


class Teacher:
    """A frozen model. Not an nn.Module, so that DDP and FSDP do not see it."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model.eval().requires_grad_(requires_grad=False)
        self._remembered: dict[bytes, Seen] | None = None

    def to(self, device: torch.device, dtype: str, training_dtype: torch.dtype) -> "Teacher":
        """Move the model to a device in a dtype: float32, bfloat16, int8 (the blocks' matrices), or auto (training's)."""
        self.model.to(device, training_dtype if dtype == "auto" else DTYPES.get(full_name(dtype), torch.float32))
        if dtype == "int8":
            for stack in self.model.stacks():
                to_int8(stack.layers)
        return self

    def remember(self) -> None:
        """Keep the hidden states of every batch: several models are measured on the same few."""
        self._remembered = {}

    @torch.no_grad()
    def see(self, inputs: Mapping[str, Any], layer: int = 0) -> Seen:
        """Run a batch; with a layer (from 1) also return its queries, keys and values."""
        if self._remembered is None or layer:
            return self._see(inputs, layer)
        key = b"".join(inputs[name].cpu().numpy().tobytes() for name in sorted(inputs))
        if key not in self._remembered:
            self._remembered[key] = self._see(inputs, layer)
        return self._remembered[key]

    def _see(self, inputs: Mapping[str, Any], layer: int) -> Seen:
        attended: dict[int, tuple[Tensor, Tensor, Tensor] | None] = {layer - 1: None}
        hidden_BTD = self.model.hidden(**inputs, attended=attended if layer else None)
        return Seen(hidden_BTD, attended[layer - 1])

    @torch.no_grad()
    def dense(self, hidden_ND: Tensor) -> DenseTeacher:
        """Return hidden states and head as losses take them."""
        head = self.model.lm_head
        return DenseTeacher(self.model.head_input(hidden_ND), head.weight, head.bias, self.model.config.logits_softcap)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the head."""
        return self.model.dtype


def tokenizer_sha256(artifact: Artifact) -> str | None:
    """Return the sha256 of a model's tokenizer, or None without one."""
    tokenizer = fitting_tokenizer(artifact)
    return tokenizer.sha256 if tokenizer is not None else None


def check_same_words(teacher: Artifact, other: Artifact) -> None:
    """Refuse teachers with different tokenizers; differently padded vocabularies are fine.

    Raises: UsageError naming both.
    """
    hashes = [tokenizer_sha256(artifact) for artifact in (teacher, other)]
    if hashes[0] != hashes[1]:
        shown = " and ".join("none" if found is None else found[:12] for found in hashes)
        raise UsageError(
            f"`{teacher.path}` and `{other.path}` have different tokenizers ({shown}): their predictions cannot be averaged",
            "teachers with one tokenizer",
        )


def load_more(first: Loaded, config: TaughtConfig) -> list[Teacher]:
    """Load further teachers with the tokenizer and family of the first.

    Raises: UsageError for one that differs; NotFoundError and ArtifactError.
    """
    teachers = []
    for name in config.teacher.more:
        check_same_words(first.artifact, read_teacher(config, name))
        other = load_model(Path(name), device="cpu", dtype="float32", backend=config.teacher.backend)
        here, there = first.model.config, other.model.config
        outputs = [(each.family, each.n_labels, each.head, each.problem) for each in (here, there)]
        if outputs[0] != outputs[1]:
            raise UsageError(
                f"`{name}` is {there.family} with {there.n_labels} labels, `{config.model}` {here.family} with {here.n_labels}",
                "averaged teachers must have the same outputs",
            )
        teachers.append(Teacher(other.model))
    return teachers


class Teachers:
    """The teachers of a run: the first one's original weights, and all teachers on the training device.

    Only one of the two is kept in memory: moving the teachers consumes the original, and asking for it again reloads it.
    """

    def __init__(self, config: TaughtConfig) -> None:
        self.config = config
        self.path = Path(config.model)
        self.artifact = read_teacher(config)
        self._original: Loaded | None = None
        self._computing: list[Teacher] | None = None

    def original(self) -> Loaded:
        """Return the first teacher in float32 on the CPU."""
        if self._original is None:
            self._original = load_model(self.path, device="cpu", dtype="float32", backend=self.config.teacher.backend)
        return self._original

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of all teachers."""
        return fitting_tokenizer(self.artifact)

    def own(self) -> LanguageModel:
        """Return the first teacher in float32 on the CPU, loaded anew for the caller to change."""
        return load_model(self.path, device="cpu", dtype="float32").model

    @property
    def computing(self) -> list[Teacher]:
        """All teachers: where `move` has put them, else in float32 on the CPU."""
        if self._computing is None:
            first = self.original()
            self._computing = [Teacher(first.model), *load_more(first, self.config)]
        return self._computing

    def move(self, device: torch.device, training_dtype: torch.dtype) -> None:
        """Move all teachers to where training is, in the dtype of `teacher.dtype`."""
        for teacher in self.computing:
            teacher.to(device, self.config.teacher.dtype, training_dtype)
        self._original = None

    def on_cpu(self) -> "Teachers":
        """Return these teachers in float32 on the CPU, reloaded if they have been moved."""
        if self._original is not None or self._computing is None:
            return self
        return Teachers(self.config)

    def free(self) -> None:
        """Release the memory of all teachers; the next use reloads them."""
        self._original = self._computing = None
