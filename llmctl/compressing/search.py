"""Find the plan of a compression: measure what each lever costs, predict, and try the best plans for real.

Everything that is measured is kept in a folder, so that a resumed run does not measure it again.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from llmctl.artifacts.load import Loaded, without_weights
from llmctl.artifacts.with_adapters import read_model
from llmctl.compressing.ground import Ground
from llmctl.compressing.levers import (
    HOPELESS,
    cut_to,
    kept_costs,
    measure_bits,
    measure_structure,
    measure_tables,
    structures,
)
from llmctl.compressing.plans import GPTQ_FRACTION, Plan, Sensitivity, described, find_plans, shape_of
from llmctl.compressing.room import WHOLE, Rooms
from llmctl.compressing.samples import frequencies, write_sample
from llmctl.compressing.settings import distill_config
from llmctl.compressing.timeline import Timeline
from llmctl.config import CompressConfig, DataConfig, ModelConfig
from llmctl.data.shards import is_shard_folder
from llmctl.distilling.cut_student import Cut
from llmctl.errors import UnsupportedModelError, UsageError
from llmctl.files import write_json
from llmctl.formats.artifact_write import write_artifact
from llmctl.losses.logits import is_native
from llmctl.machine import give_back_memory
from llmctl.model.transformer import LanguageModel, load_tensors
from llmctl.preparing.corpus import Corpus
from llmctl.preparing.trim_model import rows, with_pieces, write_trimmed
from llmctl.quant.methods import AnyScheme
from llmctl.quantizing.bit_allocation import allocate, allocate_stored
from llmctl.quantizing.calibrate import Calibrated, calibrate
from llmctl.quantizing.codes import packable
from llmctl.quantizing.packed_state import stored_state
from llmctl.runs.progress import Say
from llmctl.tokenizer.load import find_tokenizer
from llmctl.tokenizer.trim import Trimmed

VOCABULARIES = (98_304, 65_536, 49_152, 32_768, 24_576, 16_384, 12_288, 8192, 6144, 4096, 3072, 2048, 1024)
"""Sizes of smaller vocabularies that are measured."""

SMALLER = 0.9
"""Vocabularies of more than this fraction of the used pieces are not worth measuring."""

SAMPLE_TOKENS = 65_536
"""Training tokens of the sample that models are calibrated and refit on."""

TRIAL_METHOD = "gptq"
"""How trials are quantized; the result gets a better and slower method."""

SIZES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.3, 1.5, 1.75, 2.0)
"""Sizes of the frontier, as multiples of the one that is asked for."""

WORSE = 1.5
"""A plan whose predicted cost is more than so many times that of the best trial is not tried."""


@dataclass(frozen=True)
class Tried:
    """A plan, what it costs when it is carried out, and the same before its blocks were quantized."""

    plan: Plan
    cost: float
    cost_before_bits: float
    cut: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the trial for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Tried":
        """Return the trial that `to_dict` has written."""
        return cls(Plan(**record["plan"]), record["cost"], record["cost_before_bits"], record["cut"])


class Search:
    """The search of one compression.

    corpus: the data, encoded by the original model's tokenizer. folder: where measurements are kept.
    """

    def __init__(self, config: CompressConfig, corpus: Corpus, folder: Path, say: Say) -> None:
        self.config, self.corpus, self.folder, self.say = config, corpus, folder, say
        self.timeline = Timeline(say, 0.0)
        self.artifact = read_model(Path(config.model))
        tokenizer = find_tokenizer(self.artifact.files)
        assert tokenizer is not None
        self.tokenizer = tokenizer
        self.shape = self.artifact.config
        self.gptq_fraction = GPTQ_FRACTION
        self._vocabularies: dict[int, tuple[Trimmed, ModelConfig] | None] = {}

    def expect_all(self) -> None:
        """Count trials, training and quantizing to the time that is left, which a dry run does not come to."""
        train = self.config.train
        has_minutes = train.minutes and not (train.steps or train.tokens or train.epochs)
        self.timeline.trained_seconds = 60 * train.minutes if has_minutes else None
        self.timeline.plan("trial", max(1, self.config.plan.trials))
        self.timeline.plan("quantizing", 1)

    # --- vocabularies -------------------------------------------------------------------------------------------------------

    @cached_property
    def pieces(self) -> list[int]:
        """The ids that the data uses, the most frequent first."""
        return frequencies(self.corpus, self.shape.source_vocab_size or self.shape.vocab_size)

    def vocabulary(self, size: int) -> tuple[Trimmed, ModelConfig] | None:
        """Return the tokenizer and the config with a vocabulary of a size; None for the whole one."""
        if size not in self._vocabularies:
            whole = size == self.shape.vocab_size
            found = None if whole else with_pieces(self.artifact, self.tokenizer, self.pieces, size)
            self._vocabularies[size] = found
        return self._vocabularies[size]

    @property
    def measures_loss(self) -> bool:
        """Whether losses with different vocabularies compare: of masked tokens they do not, which are other ones then."""
        return self.ground.predicts_tokens and self.shape.family != "encoder"

    def sizes(self) -> Iterator[int]:
        """Yield the sizes of vocabularies to measure, the largest first: the whole one, all pieces of the data, and fewer."""
        yield self.shape.vocab_size
        if not self.changes_vocabulary:
            return
        try:
            used = with_pieces(self.artifact, self.tokenizer, self.pieces)
        except UnsupportedModelError as error:
            self.say(f"the vocabulary stays: {error}")
            return
        n_used = used[1].vocab_size
        if n_used < self.shape.vocab_size:
            self._vocabularies[n_used] = used
            yield n_used
        # Masked tokens and labels are compared on equal tokens only.
        if self.measures_loss or not (self.ground.predicts_tokens or self.ground.has_labels):
            yield from (size for size in VOCABULARIES if size < SMALLER * n_used)

    @property
    def changes_vocabulary(self) -> bool:
        """Whether the vocabulary may become smaller."""
        paths = self.config.data.paths
        is_encoded = any(is_shard_folder(Path(path)) for path in paths)
        return "vocabulary" not in self.config.keep and not self.shape.source_vocab_size and not is_encoded

    # --- the sample ---------------------------------------------------------------------------------------------------------

    @cached_property
    def sample(self) -> DataConfig:
        """The data that plans are measured on: of text, a sample; examples as they are."""
        if self.config.task != "text" or self.corpus.targets is not None:
            return self.config.data
        train, held_out = self.folder / "sample.jsonl", self.folder / "sample-held-out.jsonl"
        write_sample(self.corpus, self.corpus.train, SAMPLE_TOKENS, train)
        write_sample(self.corpus, self.corpus.held_out, self.config.plan.measure_tokens, held_out)
        return replace(self.config.data, paths=(str(train),), val_paths=(str(held_out),), text_key="text", split="file")

    @cached_property
    def ground(self) -> Ground:
        """The original model and its sample."""
        config = distill_config(self.config, Path(self.config.model), self.sample)
        base = Loaded(without_weights(self.shape), self.tokenizer, self.artifact)
        return Ground(config, base, self.folder / "sample")

    def ground_of(self, vocabulary: int) -> Ground:
        """Return the model with another vocabulary, and its sample."""
        if self.vocabulary(vocabulary) is None:
            return self.ground
        path = self.model_with(vocabulary)
        artifact = read_model(path)
        base = Loaded(without_weights(artifact.config), find_tokenizer(artifact.files), artifact)
        config = distill_config(self.config, path, self.sample)
        return Ground(config, base, self.folder / f"sample-{vocabulary}", self.ground)

    def model_with(self, vocabulary: int) -> Path:
        """Return the path of the model with a vocabulary, which is written unless it exists."""
        own = self.vocabulary(vocabulary)
        if own is None:
            return Path(self.config.model)
        path = self.folder / f"vocabulary-{vocabulary}"
        if not path.exists():
            write_trimmed(path, self.artifact, self.tokenizer, *own, force=True)
        return path

    def shape_of(self, plan: Plan) -> ModelConfig:
        """Return the shape of a plan's model."""
        return shape_of(self.shape, plan.vocabulary, plan.changes)

    @cached_property
    def rooms(self) -> Rooms:
        """What a size leaves for the bits of the blocks."""
        return Rooms(self)

    # --- measurements -------------------------------------------------------------------------------------------------------

    def measure(self) -> Sensitivity:
        """Return what each lever costs alone."""
        path = self.folder / "sensitivity.json"
        config, ground = self.config, self.ground
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        measured = Sensitivity(1.0, 0.0) if known is None else Sensitivity.from_dict(known)

        def keep() -> None:
            write_json(path, measured.to_dict())

        model = ground.teachers.original().model
        ground.remember()
        if known is None:
            total, measured.labels = ground.loss(model)
            measured.loss = total / max(measured.labels, 1.0) if self.measures_loss else 0.0
            keep()
        if not measured.vocabulary:
            measured.vocabulary[self.shape.vocab_size] = 0.0
        if not measured.tables:
            self.say("measuring the bits of embedding and head")
            measure_tables(ground, model, self.rooms.tables, measured)
            if not self.rooms.tables:
                measured.tables = {WHOLE: 0.0}
            keep()
        if not measured.bits and not self.rooms.is_whole:
            self.say("measuring the bits of the blocks")
            measure_bits(ground, model, self.rooms.blocks(self.shape), measured, config.plan.calibration_rows, self.say)
            keep()
        levers = structures(self.shape, config.keep, keeps_width=not ground.predicts_tokens)
        self._measure_vocabularies(model, measured, keep, levers)
        self.say("measuring pruned models")
        measure_structure(ground, model, levers, measured, config.plan, self._predicted, self.timeline, keep)
        return measured

    def known(self) -> Sensitivity:
        """Return what an earlier call of `measure` found."""
        return Sensitivity.from_dict(json.loads((self.folder / "sensitivity.json").read_text(encoding="utf-8")))

    def _measure_vocabularies(
        self,
        model: LanguageModel,
        measured: Sensitivity,
        keep: Callable[[], None],
        levers: Mapping[str, Sequence[Mapping[str, int]]],
    ) -> None:
        """Add what smaller vocabularies cost to the measurements, until it is hopeless.

        Raises: UsageError if even the smallest one with the strongest pruning does not fit.
        """
        for size in self.sizes():
            if size not in measured.vocabulary:
                try:
                    own = self.vocabulary(size)
                except UsageError:  # fewer than the pieces that must stay
                    break
                measured.vocabulary[size] = self._vocabulary_cost(model, size, own, measured)
                keep()
            best = self._predicted(measured)
            if best and measured.vocabulary[size] > HOPELESS * best[0].predicted:
                break
        self.rooms.refuse_impossible(measured, levers)

    def _vocabulary_cost(
        self, model: LanguageModel, size: int, own: tuple[Trimmed, ModelConfig] | None, measured: Sensitivity
    ) -> float:
        """Return what the model loses on the sample with another vocabulary, per original token."""
        if own is None or self.ground.has_labels or (self.ground.predicts_tokens and not self.measures_loss):
            return 0.0
        trimmed, config = own
        artifact = replace(self.artifact, config=config, files=trimmed.files)
        base = Loaded(without_weights(config), trimmed.tokenizer, artifact)
        ground = Ground(self.ground.config, base, self.folder / f"sample-{size}", self.ground)
        smaller = LanguageModel(config)
        load_tensors(smaller, rows(model.state_dict(), self.shape, config, trimmed.kept))
        if self.measures_loss:
            cost = max(ground.loss(smaller)[0] / max(measured.labels, 1.0) - measured.loss, 0.0)
        else:
            cost = ground.mean_divergence(smaller)
        self.say(f"vocabulary {size:,}: {cost:.4f}")
        return cost

    def _predicted(self, measured: Sensitivity) -> list[Plan]:
        """Return the plans, best first; none if no plan fits yet."""
        try:
            return self.plans(measured)
        except UsageError:
            return []

    def plans(self, measured: Sensitivity) -> list[Plan]:
        """Return the plans that fit, the best first.

        Raises: UsageError if none does.
        """
        rooms = self.rooms
        return find_plans(self.shape, measured, rooms.room_of, rooms.size, gptq_fraction=self.gptq_fraction)

    def frontier(self, measured: Sensitivity) -> list[Plan]:
        """Return the best plan at each of several sizes around the one that is asked for."""
        rooms, found = self.rooms, list[Plan]()
        for factor in SIZES:
            more = round((factor - 1) * rooms.size)
            with suppress(UsageError):
                plans = find_plans(
                    self.shape,
                    measured,
                    rooms.room_of,
                    rooms.size,
                    gptq_fraction=self.gptq_fraction,
                    more_bytes=more,
                )
                found.append(plans[0])
        return found

    # --- trials -------------------------------------------------------------------------------------------------------------

    def trials(self, measured: Sensitivity) -> list[Tried]:
        """Carry out the best plans without training; return them, the best first."""
        done: list[Tried] = []
        most = max(1, self.config.plan.trials)
        while len(done) < most:
            structures_done = {tried.plan.structure for tried in done}
            plans = [plan for plan in self.plans(measured) if plan.structure not in structures_done]
            best = min((tried.cost for tried in done), default=math.inf)
            if not plans or plans[0].predicted > WORSE * best:
                self.timeline.plan("trial", len(done) - most)
                break
            tried = self._trial(len(done) + 1, plans[0], measured)
            done.append(tried)
            self._learn_from(done, measured)
        return sorted(done, key=lambda tried: tried.cost)

    def _learn_from(self, done: Sequence[Tried], measured: Sensitivity) -> None:
        """Correct the predicted cost of bits by what trials have measured."""
        ratios = []
        for tried in done:
            expected = (tried.plan.predicted - tried.plan.fixed) / self.gptq_fraction
            if expected > 0:
                ratios.append(max(tried.cost - tried.cost_before_bits, 0.0) / expected)
        del measured
        if ratios:
            self.gptq_fraction = min(2.0, max(0.05, sum(ratios) / len(ratios)))

    def _trial(self, number: int, plan: Plan, measured: Sensitivity) -> Tried:
        path = self.folder / f"trial-{number}.json"
        if path.exists():
            self.timeline.plan("trial", -1)
            return Tried.from_dict(json.loads(path.read_text(encoding="utf-8")))
        self.timeline.begin()
        self.say(
            f"trial {number}: {described(plan.to_dict(), self.shape)}; predicted {plan.predicted:.3f} nats per token"
        )
        ground = self.ground_of(plan.vocabulary)
        model, report = ground.teachers.own(), {}
        if plan.changes:
            cut = cut_to(ground, model, plan.changes, self.config.plan, lambda _: None)
            model, report = self._keep_cut(number, ground, cut), cut.report
        before = self._cost(ground, model, measured)
        if not self.rooms.is_whole:
            schemes = self._schemes(model, plan, measured, report)
            batches = ground.batches(self.config.plan.calibration_rows)
            is_narrow = is_native(torch.bfloat16)
            codes = calibrate(model, schemes, TRIAL_METHOD, batches, lambda _: None, is_narrow=is_narrow)
            self._keep_file(number, ground, model, codes, schemes)
        cost = self._cost(ground, model, measured)
        give_back_memory()
        report = {name: value for name, value in report.items() if name != "channels"}
        tried = Tried(plan, cost, before, report)
        write_json(path, tried.to_dict())
        self.timeline.done("trial", f"trial {number}: cost {cost:.4f}")
        return tried

    def _keep_cut(self, number: int, ground: Ground, cut: Cut) -> LanguageModel:
        """Write a pruned model, from which a run goes on, and return it."""
        provenance = {"cut": cut.report}
        files = ground.data.files()
        write_artifact(self.cut_path(number), cut.config, cut.state, files=files, provenance=provenance, force=True)
        model = LanguageModel(cut.config)
        load_tensors(model, cut.state)
        return model.eval()

    def _keep_file(
        self, number: int, ground: Ground, model: LanguageModel, codes: Calibrated, schemes: Mapping[str, AnyScheme]
    ) -> None:
        """Write a trial's file: a model that can be used if the run is stopped."""
        if self.rooms.is_gguf:
            return
        own = packable(schemes)
        state, files = stored_state(model, codes, own), ground.data.files()
        write_artifact(self.file_path(number), model.config, state, files=files, provenance={}, schemes=own, force=True)

    def file_path(self, number: int) -> Path:
        """Return where the quantized model of a trial lies."""
        return self.folder / f"trial-{number}.safetensors"

    def cut_path(self, number: int) -> Path:
        """Return where the pruned model of a trial lies."""
        return self.folder / f"trial-{number}-cut.safetensors"

    def _cost(self, ground: Ground, model: LanguageModel, measured: Sensitivity) -> float:
        return cost_of(ground, model, measured)

    def _schemes(
        self, model: LanguageModel, plan: Plan, measured: Sensitivity, cut: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the scheme of every module of a trial's model."""
        budget = self.rooms.blocks(model.config, plan.table)
        costs = kept_costs(measured.layers, budget.choices, cut)
        schemes = self.rooms.plan_of(model.config, plan.table)
        if self.rooms.is_gguf:
            return {**schemes, **allocate(costs, budget.shapes, budget.bits, budget.rest_bits)}
        return {**schemes, **allocate_stored(model.config, schemes, costs, budget)}


def cost_of(ground: Ground, model: LanguageModel, measured: Sensitivity) -> float:
    """Return what a model with a ground's vocabulary costs: what the vocabulary does, and the divergence from the whole model."""
    if not (ground.predicts_tokens or ground.has_labels):  # compared with the original itself
        return ground.mean_divergence(model)
    vocabulary = measured.vocabulary.get(ground.base.model.config.vocab_size, 0.0)
    return vocabulary + ground.divergence(model) / max(measured.labels, 1.0)


def best_trial(folder: Path, tried: Sequence[Tried]) -> tuple[Tried, int]:
    """Return the best trial and its number."""
    best = min(tried, key=lambda one: one.cost)
    for path in sorted(folder.glob("trial-*.json")):
        if json.loads(path.read_text(encoding="utf-8"))["plan"] == best.plan.to_dict():
            return best, int(path.stem.partition("-")[2])
    raise AssertionError(f"no record of {best.plan}")
