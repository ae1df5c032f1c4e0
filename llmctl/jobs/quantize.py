"""Quantization as a job: a model, the same in few bits, and what that costs and brings, measured here.

Codes are chosen once and lie in `parts/`; a run that was stopped goes on with them.
"""

import math
import shlex
from collections import Counter
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from llmctl.artifacts.load import is_bare, load_model
from llmctl.artifacts.with_adapters import read_model
from llmctl.config import ModelConfig, QuantizeConfig
from llmctl.files import write_json
from llmctl.formats.artifact import Artifact, read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.jobs.compression import Taught
from llmctl.losses.logits import is_native
from llmctl.model.parameters import parameter_shapes
from llmctl.model.transformer import LanguageModel, load_tensors
from llmctl.quant.schemes import Scheme
from llmctl.quantizing.bit_allocation import allocate, candidates, check_budget, measure_costs, parse_size
from llmctl.quantizing.calibrate import calibrate, needs_data, refuse_unfinite
from llmctl.quantizing.fake_quant import learned_state, learner
from llmctl.quantizing.packed_state import stored_state
from llmctl.quantizing.report import make_report, render
from llmctl.quantizing.settings import check_quantize, plan_of
from llmctl.runs.folder import Run
from llmctl.runs.progress import Say
from llmctl.training.batch import to_device
from llmctl.training.loop import Fitted, Training
from llmctl.training.objectives import Objective

SENSITIVITY_ROWS = 32
"""Rows on which it is measured what bits are worth."""

CHOSEN, LEARNED = "chosen.safetensors", "learned.safetensors"


class Quantizing(Taught):
    """Hold a model's weights in few bits."""

    command = "quantize"
    reader = "the model is calibrated and measured on"
    config_class = QuantizeConfig
    config: QuantizeConfig

    @property
    def objective(self) -> str:
        """The scheme."""
        return f"quantize-{self.config.weights.scheme}"

    @property
    def trains(self) -> bool:
        """Whether codes are learned; else they are chosen and that is all."""
        return self.config.weights.method == "learned"

    def check(self) -> None:
        """Refuse settings that exclude each other, and a target that cannot be met."""
        check_quantize(self.config)
        if self.has_target:
            check_budget(*self.budget)

    @cached_property
    def plan(self) -> dict[str, Scheme]:
        """The scheme of every module that is held in few bits."""
        return plan_of(self.shape, self.config)

    @cached_property
    def shape(self) -> ModelConfig:
        """The model's shape, which stays."""
        return read_model(Path(self.config.model)).config

    # --- codes -------------------------------------------------------------------------------------------------------

    def prepare_part(self, part: str, run: Path, say: Say) -> None:
        """Choose the codes, unless an earlier start of this run has."""
        del part
        path = run / "parts" / CHOSEN
        if path.exists():
            return
        model = LanguageModel(self.shape)
        load_tensors(model, self.teacher.model.state_dict())
        refuse_unfinite(model, self.config.model)
        method, rows = self.method, self.config.weights.calibration_rows
        plan = self.shared_out(model, say)
        batches = self.batches(model, rows) if needs_data(plan, method) else []
        if is_bare(self.teacher.artifact):  # it predicts no labels
            batches = [{name: tensor for name, tensor in batch.items() if name != "labels"} for batch in batches]
        found = calibrate(model, plan, method, batches, say, is_narrow=is_native(torch.bfloat16))
        write_artifact(
            path,
            model.config,
            stored_state(model, found, plan),
            files=self.files(),
            provenance={"lost": {name: float(f"{share:.4g}") for name, share in found.lost.items()}},
            schemes=plan,
            force=True,
        )

    def shared_out(self, model: LanguageModel, say: Say) -> dict[str, Scheme]:
        """Return the plan, its bits shared out among the layers where there is a target."""
        plan = dict(self.plan)
        if not self.has_target:
            return plan
        choices, sizes, budget, rest = self.budget
        say(f"measuring what bits are worth in {len(choices)} layers")
        batches = self.batches(model, min(self.config.weights.calibration_rows, SENSITIVITY_ROWS))
        chosen = allocate(measure_costs(model, choices, batches, self.config.train.seed, say), sizes, budget, rest)
        counts = Counter(scheme.bits for scheme in chosen.values())
        say("layers: " + ", ".join(f"{count} in {bits} bits" for bits, count in sorted(counts.items())))
        return plan | chosen

    @property
    def has_target(self) -> bool:
        """Whether layers share bits out within a budget."""
        return bool(self.config.weights.target_bpw or self.config.weights.target_size)

    @property
    def budget(self) -> tuple[dict[str, list[Scheme]], dict[str, tuple[int, ...]], float, int]:
        """What layers may get, their shapes, the bits that they share out, and those of everything else."""
        weights, shapes = self.config.weights, parameter_shapes(self.shape)
        sizes = {name: shapes[f"{name}.weight"] for name in self.plan}
        choices = candidates(self.plan, {name: size[1] for name, size in sizes.items()})
        rest = other_bits(self.shape, self.plan, set(choices))
        if weights.target_size:
            return choices, sizes, 8 * parse_size(weights.target_size) - rest, rest
        return choices, sizes, weights.target_bpw * sum(math.prod(sizes[name]) for name in choices), rest

    @property
    def method(self) -> str:
        """How codes are chosen, before they are learned if they are."""
        method = self.config.weights.method
        return "guided" if method == "learned" else method

    def load_part(self, part: str, run: Path, say: Say) -> None:
        """Load the model in few bits."""
        del part, say
        self.run = run
        if self.trains:
            model = LanguageModel(self.shape)
            load_tensors(model, self.teacher.model.state_dict())
            chosen = read_artifact(run / "parts" / CHOSEN)
            weights = self.config.weights.learn == "weights"
            self.model = learner(model, chosen.packed_state(), chosen.schemes, weights=weights)
            self.model.train()
        else:
            self.load_packed(CHOSEN)

    def load_packed(self, name: str) -> None:
        """Load the model in few bits, as it is used."""
        path, device = self.run / "parts" / name, self.runtime.device.type
        self.model = load_model(path, device=device, dtype="float32", packed=True).model

    def make_objective(self) -> Objective:
        """Return the task's objective, with how far the model is from what it was; or what is learned of that."""
        self.move_teachers()
        self.model.to(self.runtime.device)
        measures = not self.trains and self.config.loss.name != "none"
        return self.objective_of(self.model, is_plain=False, measures=measures)

    def write(self, folder: Path, fitted: Fitted, provenance: Mapping[str, Any]) -> None:
        """Write the model in few bits into the run folder."""
        del fitted
        chosen = self.result
        write_artifact(
            folder,
            chosen.config,
            chosen.packed_state(),
            files=self.files(),
            provenance=provenance,
            schemes=chosen.schemes,
            force=True,
        )

    def files(self) -> dict[str, bytes]:
        """Return what lay beside the model."""
        return {**self.base.artifact.files, **super().files()}

    def provenance(self) -> dict[str, Any]:
        """Return what the model was made from, and for what."""
        objective = self.teacher.artifact.provenance.get("objective")
        told = {"quantised_from": self.corpus.provenance["teacher"]["sha256"], "weights": self.config.weights.scheme}
        return told | {"method": self.config.weights.method} | ({"objective": objective} if objective else {})

    # --- the report --------------------------------------------------------------------------------------------------

    def conclude(self, fitted: Fitted, training: Training) -> None:
        """Measure the model before and after, on the same held-out rows and on this machine."""
        runtime, original = training.runtime, self.teachers[0].model
        models = {"before": original}
        if self.trains:
            runtime.lead(partial(self.keep_learned, fitted))
            for name, file in (("chosen", CHOSEN), ("after", LEARNED)):
                self.load_packed(file)
                models[name] = self.model
        # The figures are to show the codes, not the rounding of what is multiplied by them.
        found = self.side_by_side(models, training, exact=self.trains)
        score = self.score_of(original, training)
        batch = to_device(self.make_batches(shuffle=False).batch(range(1)), runtime.device)
        self.report = make_report(
            {"before": original, "after": self.model},
            {**found, "before": found["before"] | score, "after": fitted.after | found.get("after", {})},
            batch=batch,
            schemes=self.result.schemes,
            source=self.teacher.artifact,
            result=self.result,
            settings=self.config,
            metric=training.metric,
            device=runtime.device,
        )
        if runtime.is_main:
            write_json(self.run / "report.json", self.report.record)

    @property
    def result(self) -> Artifact:
        """What came out."""
        return read_artifact(self.run / "parts" / (LEARNED if self.trains else CHOSEN))

    def keep_learned(self, fitted: Fitted) -> None:
        """Write the codes that were learned beside those that were chosen."""
        chosen = read_artifact(self.run / "parts" / CHOSEN)
        write_artifact(
            self.run / "parts" / LEARNED,
            chosen.config,
            learned_state({name: tensor.cpu() for name, tensor in fitted.weights.items()}, chosen.schemes),
            files=self.files(),
            provenance=chosen.provenance,
            schemes=chosen.schemes,
            force=True,
        )

    def score_of(self, model: LanguageModel, training: Training) -> dict[str, float]:
        """Return the figures for which a model writes; none for tasks without."""
        if training.score is None:
            return {}
        mine, self.model = self.model, model
        try:
            return training.score(None)
        finally:
            self.model = mine

    def facts(self) -> dict[str, Any]:
        """Return what the report says."""
        assert self.report is not None
        return {"source": self.config.model, "report": self.report.record}

    def card_note(self, summary: Mapping[str, Any]) -> str:
        """Return in a sentence what was done."""
        found = summary["report"]
        return (
            f"Weights in {found['bits_per_weight']:.2f} bits ({self.config.weights.scheme}, "
            f"{self.config.weights.method}); the whole report is in `report.json`."
        )

    def closing(self, summary: Mapping[str, Any], run: Run) -> str:
        """Return the report as a table, and a command to use the model."""
        assert self.report is not None
        model = shlex.quote(summary["model"])
        use = {"encoder": f'llmctl fill -m {model} "a <mask> text"'}.get(self.shape.family)
        use = use or f'llmctl generate -m {model} "a text"'
        if is_bare(self.teacher.artifact):
            use = f"llmctl evaluate {model} -d pairs.tsv --task similarity"
        if self.shape.n_labels:
            use = f'llmctl classify -m {model} "a text"'
        return "\n".join([*render(self.report.record), f"report: {run.path / 'report.json'}", f"next: {use}"])


def other_bits(config: ModelConfig, plan: Mapping[str, Scheme], inside: set[str]) -> int:
    """Return the bits of what is not shared out: tables, heads, vectors."""
    shapes = parameter_shapes(config)
    bits = sum(scheme.size_bits(*shapes[f"{name}.weight"]) for name, scheme in plan.items() if name not in inside)
    held = {f"{name}.weight" for name in plan}
    if config.tie_embeddings:
        held.add("lm_head.weight")
    return bits + sum(
        (16 if len(shape) > 1 else 32) * math.prod(shape) for name, shape in shapes.items() if name not in held
    )
