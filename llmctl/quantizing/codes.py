"""The codes of a run that quantizes: chosen on calibration data, trained if asked, kept in `parts/`.

Codes are chosen once; a resumed run continues with the same.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llmctl.artifacts.load import is_bare, load_model
from llmctl.config import QuantizeConfig
from llmctl.converting.export_gguf import prepare
from llmctl.errors import ArtifactError
from llmctl.formats.artifact import WEIGHTS, Artifact, read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.formats.quantization import is_inside
from llmctl.losses.logits import is_native
from llmctl.machine import give_back_memory
from llmctl.model.transformer import LanguageModel
from llmctl.quant.methods import AnyScheme
from llmctl.quant.schemes import Scheme
from llmctl.quantizing.bit_allocation import (
    Budget,
    allocate,
    allocate_stored,
    budget_of,
    measure_costs,
    measure_table_costs,
    outputs_of,
)
from llmctl.quantizing.calibrate import Calibrated, calibrate, needs_data, refuse_unfinite
from llmctl.quantizing.fake_quant import learned_state, learner
from llmctl.quantizing.gguf_plan import budget_of as gguf_budget
from llmctl.quantizing.packed_state import stored_state
from llmctl.quantizing.report import layer_bits, stored_bytes
from llmctl.quantizing.settings import find_plan, other_groups
from llmctl.runs.progress import Say
from llmctl.training.inputs import Fitted
from llmctl.training.task_data import TaskData

SENSITIVITY_ROWS = 32
"""Rows on which the sensitivity of layers is measured."""

TABLE_BATCHES = 1
"""Batches on which that of embedding and head is: each of their candidates takes a pass."""


class Facts(NamedTuple):
    """A stored model: its bytes, the bits per weight of the matrices in its blocks, the output error of every layer.

    more: for the report and its closing lines.
    """

    n_bytes: int
    layer_bits: float
    lost: Mapping[str, float]
    more: Mapping[str, Any] = {}


def packable(plan: Mapping[str, AnyScheme]) -> dict[str, Scheme]:
    """Return a plan of our own schemes."""
    return {name: scheme for name, scheme in plan.items() if isinstance(scheme, Scheme)}


def find_budget(source: Artifact, plan: Mapping[str, AnyScheme], config: QuantizeConfig) -> Budget:
    """Return the bits to allocate under a target."""
    if config.weights.gguf:
        return gguf_budget(prepare(source, Path(config.model)), plan, config.weights.target_size)
    return budget_of(source.config, packable(plan), config.weights)


def shown_losses(found: Calibrated) -> dict[str, float]:
    """Return the output error of every layer to four digits."""
    return {name: float(f"{share:.4g}") for name, share in found.lost.items()}


def name_of(scheme: AnyScheme) -> str:
    """Return how a scheme is called among those that are allocated."""
    return f"{scheme.bits} bits" if isinstance(scheme, Scheme) else scheme.name


class Codes:
    """Codes of one run; `original` loads the model that is quantized, in float32 on the CPU: a copy that may be changed."""

    chosen, learned = "chosen.safetensors", "learned.safetensors"
    file = WEIGHTS

    def __init__(
        self,
        config: QuantizeConfig,
        data: TaskData,
        source: Artifact,
        original: Callable[[], LanguageModel],
        folder: Path,
    ) -> None:
        self.config, self.data, self.source, self.original, self.folder = config, data, source, original, folder
        self.shape = source.config
        self.plan = find_plan(self.shape, config)

    @property
    def learns(self) -> bool:
        """Whether codes are trained after they have been chosen."""
        return self.config.weights.method == "learned"

    @property
    def final(self) -> str:
        """The file in `parts/` that the run ends with."""
        return self.learned if self.learns else self.chosen

    @property
    def has_chosen(self) -> bool:
        """Whether an earlier start of this run chose the codes."""
        return (self.folder / self.chosen).exists()

    def choose(self, say: Say) -> None:
        """Choose the codes on calibration data, unless an earlier start of this run did."""
        if self.has_chosen:
            return
        weights = self.config.weights
        for line in other_groups(self.shape, self.plan, self.config):
            say(line)
        method = "guided" if self.learns else weights.method
        give_back_memory()  # of encoding the data
        model = self.original()
        refuse_unfinite(model, self.config.model)
        # Before calibration, which replaces the model's weights by dequantized ones.
        self.refuse_unfinite_outputs(model)
        plan = self._allocated(model, say)
        batches = self.data.some_batches(model.config, weights.calibration_rows) if needs_data(plan, method) else []
        if is_bare(self.source):  # it predicts no labels
            batches = [{name: tensor for name, tensor in batch.items() if name != "labels"} for batch in batches]
        calibrated = calibrate(model, plan, method, batches, say, is_narrow=is_native(torch.bfloat16))
        self.keep(model, plan, calibrated, say)

    def refuse_unfinite_outputs(self, model: LanguageModel) -> None:
        """Refuse a model whose finite weights compute numbers that are not.

        Raises: ArtifactError.
        """
        row = self.data.some_batches(model.config, 1)[0]
        if not bool(outputs_of(model, row)[0].isfinite().all()):
            raise ArtifactError(
                f"the outputs of `{self.config.model}` are not finite",
                "its weights are damaged or too large: train it again",
            )

    def keep(self, model: LanguageModel, plan: dict[str, AnyScheme], calibrated: Calibrated, say: Say) -> None:
        """Write the chosen codes; `model` has their weights."""
        del say
        schemes = packable(plan)
        write_artifact(
            self.folder / self.chosen,
            self.shape,
            stored_state(model, calibrated, schemes),
            files=self.data.files(),
            provenance={"lost": shown_losses(calibrated)},
            schemes=schemes,
            force=True,
        )

    def _allocated(self, model: LanguageModel, say: Say) -> dict[str, AnyScheme]:
        """Return the scheme of every layer; under a target, bits are allocated by measured sensitivity."""
        weights = self.config.weights
        if not (weights.target_bpw or weights.target_size):
            return dict(self.plan)
        budget = find_budget(self.source, self.plan, self.config)
        say(f"measuring the sensitivity of {len(budget.choices)} layers")
        batches = self.data.some_batches(model.config, min(weights.calibration_rows, SENSITIVITY_ROWS))
        layers = {name: schemes for name, schemes in budget.choices.items() if is_inside(name)}
        costs = measure_costs(model, layers, batches, self.config.train.seed, say)
        tables = {name: schemes for name, schemes in budget.choices.items() if name not in layers}
        if tables:
            costs |= measure_table_costs(model, tables, batches[:TABLE_BATCHES])
        if weights.target_size and not weights.gguf:
            chosen = allocate_stored(self.shape, self.plan, costs, budget)
        else:
            chosen = allocate(costs, budget.shapes, budget.bits, budget.rest_bits)
        say(
            "layers: "
            + ", ".join(f"{count} in {name}" for name, count in Counter(map(name_of, chosen.values())).items())
        )
        return self.plan | chosen

    def learner(self) -> LanguageModel:
        """Return the model whose codes are trained, starting from the chosen ones."""
        chosen = read_artifact(self.folder / self.chosen)
        with_weights = self.config.weights.learn == "weights"
        model = learner(self.original(), chosen.packed_state(), chosen.schemes, weights=with_weights)
        model.train()
        return model

    def load(self, file: str, device: torch.device) -> LanguageModel:
        """Return a quantized model of this run, as it is used."""
        return load_model(self.folder / file, device=device.type, dtype="float32", packed=True).model

    def keep_learned(self, fitted: Fitted) -> None:
        """Write the trained codes next to the chosen ones."""
        chosen = read_artifact(self.folder / self.chosen)
        write_artifact(
            self.folder / self.learned,
            chosen.config,
            learned_state({name: tensor.cpu() for name, tensor in fitted.weights.items()}, chosen.schemes),
            files=self.data.files(),
            provenance=chosen.provenance,
            schemes=chosen.schemes,
            force=True,
        )

    def result(self) -> Artifact:
        """Return the quantized model."""
        return read_artifact(self.folder / self.final)

    def facts(self) -> Facts:
        """Return what the report says of the stored model."""
        result = self.result()
        return Facts(stored_bytes(result), layer_bits(result, result.schemes), result.provenance.get("lost", {}))

    def write(self, folder: Path, provenance: Mapping[str, Any]) -> None:
        """Write the quantized model into the run folder."""
        result = self.result()
        write_artifact(
            folder,
            result.config,
            result.packed_state(),
            files=self.data.files(),
            provenance=provenance,
            schemes=result.schemes,
            force=True,
        )
