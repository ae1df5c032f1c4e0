"""The codes of a run that quantizes: chosen on calibration data, trained if asked, kept in `parts/`.

Codes are chosen once; a resumed run continues with the same.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from llmctl.artifacts.load import is_bare, load_model
from llmctl.config import QuantizeConfig
from llmctl.formats.artifact import Artifact, read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.losses.logits import is_native
from llmctl.machine import give_back_memory
from llmctl.model.transformer import LanguageModel
from llmctl.quant.schemes import Scheme
from llmctl.quantizing.bit_allocation import allocate, budget_of, measure_costs
from llmctl.quantizing.calibrate import calibrate, needs_data, refuse_unfinite
from llmctl.quantizing.fake_quant import learned_state, learner
from llmctl.quantizing.packed_state import stored_state
from llmctl.quantizing.settings import other_groups, plan_of
from llmctl.runs.progress import Say
from llmctl.training.inputs import Fitted
from llmctl.training.task_data import TaskData

SENSITIVITY_ROWS = 32
"""Rows on which the sensitivity of layers is measured."""

CHOSEN, LEARNED = "chosen.safetensors", "learned.safetensors"


class Codes:
    """Codes of one run; `original` loads the model that is quantized, in float32 on the CPU: a copy that may be changed."""

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
        self.plan: dict[str, Scheme] = plan_of(self.shape, config)

    @property
    def learns(self) -> bool:
        """Whether codes are trained after they have been chosen."""
        return self.config.weights.method == "learned"

    def choose(self, say: Say) -> None:
        """Choose the codes on calibration data, unless an earlier start of this run did."""
        if (self.folder / CHOSEN).exists():
            return
        weights = self.config.weights
        for line in other_groups(self.shape, self.plan, self.config):
            say(line)
        method = "guided" if self.learns else weights.method
        give_back_memory()  # of encoding the data
        model = self.original()
        refuse_unfinite(model, self.config.model)
        # Before calibration, which replaces the model's weights by dequantized ones.
        plan = self._allocated(model, say)
        batches = self.data.some_batches(model.config, weights.calibration_rows) if needs_data(plan, method) else []
        if is_bare(self.source):  # it predicts no labels
            batches = [{name: tensor for name, tensor in batch.items() if name != "labels"} for batch in batches]
        calibrated = calibrate(model, plan, method, batches, say, is_narrow=is_native(torch.bfloat16))
        write_artifact(
            self.folder / CHOSEN,
            self.shape,
            stored_state(model, calibrated, plan),
            files=self.data.files(),
            provenance={"lost": {name: float(f"{share:.4g}") for name, share in calibrated.lost.items()}},
            schemes=plan,
            force=True,
        )

    def _allocated(self, model: LanguageModel, say: Say) -> dict[str, Scheme]:
        """Return the scheme of every layer; under a target, bits are allocated by measured sensitivity."""
        weights = self.config.weights
        if not (weights.target_bpw or weights.target_size):
            return dict(self.plan)
        budget = budget_of(self.shape, self.plan, weights)
        say(f"measuring the sensitivity of {len(budget.choices)} layers")
        batches = self.data.some_batches(model.config, min(weights.calibration_rows, SENSITIVITY_ROWS))
        costs = measure_costs(model, budget.choices, batches, self.config.train.seed, say)
        chosen = allocate(costs, budget.shapes, budget.bits, budget.rest_bits)
        counts = Counter(scheme.bits for scheme in chosen.values())
        say("layers: " + ", ".join(f"{count} in {bits} bits" for bits, count in sorted(counts.items())))
        return self.plan | chosen

    def learner(self) -> LanguageModel:
        """Return the model whose codes are trained, starting from the chosen ones."""
        chosen = read_artifact(self.folder / CHOSEN)
        with_weights = self.config.weights.learn == "weights"
        model = learner(self.original(), chosen.packed_state(), chosen.schemes, weights=with_weights)
        model.train()
        return model

    def load(self, file: str, device: torch.device) -> LanguageModel:
        """Return a quantized model of this run, as it is used."""
        return load_model(self.folder / file, device=device.type, dtype="float32", packed=True).model

    def keep_learned(self, fitted: Fitted) -> None:
        """Write the trained codes next to the chosen ones."""
        chosen = read_artifact(self.folder / CHOSEN)
        write_artifact(
            self.folder / LEARNED,
            chosen.config,
            learned_state({name: tensor.cpu() for name, tensor in fitted.weights.items()}, chosen.schemes),
            files=self.data.files(),
            provenance=chosen.provenance,
            schemes=chosen.schemes,
            force=True,
        )

    def result(self) -> Artifact:
        """Return the quantized model."""
        return read_artifact(self.folder / (LEARNED if self.learns else CHOSEN))

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
