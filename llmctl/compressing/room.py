"""What a file size leaves for the bits of the blocks, in each format that a compression writes."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from llmctl.compressing.plans import Point as Setting
from llmctl.compressing.plans import Room, Sensitivity, combined, shape_of
from llmctl.config import EMBEDDINGS, MIXED, CompressConfig, ModelConfig, QuantizeConfig, WeightsConfig
from llmctl.converting.export_gguf import Ready, prepare, rest_bytes
from llmctl.converting.export_onnx import int8_bytes, overhead_bytes
from llmctl.errors import UsageError
from llmctl.formats.artifact import Artifact
from llmctl.formats.artifact_write import complete_files
from llmctl.formats.gguf.architectures import architecture_for
from llmctl.formats.gguf.write import metadata_bytes
from llmctl.formats.quantization import HEAD, TOKEN_TABLES, is_inside, packable_modules, stored_bytes
from llmctl.model.parameters import count, parameter_shapes
from llmctl.quant.gguf_schemes import BLOCK_SCHEMES
from llmctl.quant.methods import AnyScheme
from llmctl.quant.schemes import Scheme
from llmctl.quantizing.bit_allocation import Budget, candidates, other_bits, parse_size
from llmctl.quantizing.gguf_plan import candidates as block_candidates
from llmctl.quantizing.gguf_plan import planned_blocks
from llmctl.quantizing.settings import plan_of
from llmctl.tokenizer.header_files import file_metadata
from llmctl.tokenizer.trim import Trimmed

PART_BYTES = 90
"""Bytes of a tensor's entry in a file's header, besides the name of its module."""

PARTS = 5
"""Tensors of a quantized matrix at most: codes, scales, zero points, exponents, the shape."""

HEADER_BYTES = 5000
"""Configuration and provenance in a file's header, besides the names of modules."""

WHOLE = "float"
"""The scheme of tables where nothing is quantized."""

BLOCK_TABLES = ("Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q4_K", "IQ4_NL")


class Source(Protocol):
    """What the files of a compression are made from."""

    config: CompressConfig
    artifact: Artifact
    shape: ModelConfig

    def vocabulary(self, size: int) -> tuple[Trimmed, ModelConfig] | None:
        """Return the tokenizer and the config with a vocabulary of a size; None for the whole one."""


class Rooms:
    """The room of every shape under one size."""

    def __init__(self, source: Source) -> None:
        self.source, self.config = source, source.config
        self.size = parse_size(source.config.size, "--to")
        self._metadata: dict[int, int] = {}
        self._rooms: dict[tuple[ModelConfig, str], Room] = {}

    @property
    def is_whole(self) -> bool:
        """Whether all weights have the same bits: 16, or 8 in ONNX."""
        return self.config.format in ("hf", "onnx") or "bits" in self.config.keep

    @property
    def is_gguf(self) -> bool:
        """Whether a GGUF file is written."""
        return self.config.format == "gguf"

    @cached_property
    def onnx_overhead(self) -> int:
        """The bytes of an ONNX file besides its tensors: those of the whole model, the most."""
        return overhead_bytes(Path(self.config.model))

    @cached_property
    def tables(self) -> dict[str, dict[str, AnyScheme]]:
        """The schemes of embedding and head to choose from: name -> module -> scheme."""
        if self.is_whole:
            return {}
        shape = self.source.shape
        if not self.is_gguf:
            return {
                name: {module: one for module, one in self.plan_of(shape, name).items() if is_table(module)}
                for name in EMBEDDINGS
                if name != WHOLE
            }
        planned = planned_blocks(shape, MIXED)
        modules = [module for module in planned if is_table(module)]
        widths = [packable_modules(shape)[module][1] for module in modules]
        fitting = [name for name in BLOCK_TABLES if all(BLOCK_SCHEMES[name].fits(width) for width in widths)]
        return {name: dict.fromkeys(modules, BLOCK_SCHEMES[name]) for name in fitting}

    def weights(self, table: str) -> WeightsConfig:
        """Return the settings of the quantization with a scheme of the tables."""
        return replace(self.config.weights, scheme="int4", embedding=table)

    def plan_of(self, shape: ModelConfig, table: str) -> dict[str, AnyScheme]:
        """Return the scheme of every module, before bits are allocated."""
        if self.is_whole:
            return {}
        if not self.is_gguf:
            return dict(plan_of(shape, QuantizeConfig(weights=self.weights(table))))
        planned: dict[str, AnyScheme] = dict(planned_blocks(shape, MIXED))
        return planned | {name: BLOCK_SCHEMES[table] for name in planned if is_table(name)}

    def blocks(self, shape: ModelConfig, table: str = "") -> Budget:
        """Return the candidates of the layers in the blocks, and the bits that the size leaves for them."""
        table = table or next(iter(self.tables))
        plan = self.plan_of(shape, table)
        parameters = parameter_shapes(shape)
        shapes = {name: parameters[f"{name}.weight"] for name in plan}
        inside = {name: scheme for name, scheme in plan.items() if is_inside(name)}
        if self.is_gguf:
            choices = {name: block_candidates(shapes[name][1]) for name in inside}
            fixed = sum(plan[name].size_bits(*shapes[name]) for name in plan if name not in inside)
            rest = 8 * rest_bytes(shape, set(plan)) + fixed
        else:
            choices = candidates(inside, {name: shapes[name][1] for name in inside})  # type: ignore[arg-type]
            rest = other_bits(shape, plan, set(choices))  # type: ignore[arg-type]
        rest += 8 * self.overhead(shape)
        return Budget(choices, shapes, 8 * self.size - rest, rest)

    def overhead(self, shape: ModelConfig) -> int:
        """Return the bytes of a file that are no weights."""
        own = self.source.vocabulary(shape.vocab_size)
        files = own[0].files if own else self.source.artifact.files
        if self.is_gguf:
            if shape.vocab_size not in self._metadata:
                config = own[1] if own else self.source.shape
                self._metadata[shape.vocab_size] = gguf_metadata(
                    replace(self.source.artifact, config=config, files=files), Path(self.config.model)
                )
            return self._metadata[shape.vocab_size]
        if shape.vocab_size not in self._metadata:
            config = own[1] if own else self.source.shape
            entry = file_metadata(complete_files(config, files), compressed=not self.is_whole)
            self._metadata[shape.vocab_size] = len(json.dumps(entry))
        modules = packable_modules(shape)
        n_parts = 1 if self.is_whole else PARTS
        names = sum(
            n_parts * (PART_BYTES + len(name)) + len(name) for name in modules
        )  # the last: in the configuration
        others = [name for name in parameter_shapes(shape) if name.removesuffix(".weight") not in modules]
        return HEADER_BYTES + self._metadata[shape.vocab_size] + names + sum(PART_BYTES + len(name) for name in others)

    def room_of(self, shape: ModelConfig, table: str) -> Room:
        """Return the bits that the size leaves for the blocks of a shape."""
        if (shape, table) not in self._rooms:
            self._rooms[shape, table] = self._room_of(shape, table)
        return self._rooms[shape, table]

    def _room_of(self, shape: ModelConfig, table: str) -> Room:
        if self.config.format == "onnx":
            n_weights, overhead = count(shape), self.onnx_overhead
            bits = 8 * int8_bytes(shape) / n_weights
            return Room(8 * (self.size - overhead) / n_weights, bits, bits, n_weights, overhead)
        if self.is_whole:
            n_weights = count(shape)
            overhead = self.overhead(shape)
            bits = 8 * (self.size - overhead) / n_weights
            return Room(bits, 16.0, 16.0, n_weights, overhead)
        budget = self.blocks(shape, table)
        n_weights = sum(math.prod(budget.shapes[name]) for name in budget.choices)
        most = sum(max(one.size_bits(*budget.shapes[name]) for one in each) for name, each in budget.choices.items())
        rest = math.ceil(budget.rest_bits / 8)
        least = 8 * (self.smallest(shape, table) - rest)
        return Room(budget.bits / n_weights, least / n_weights, most / n_weights, n_weights, rest)

    def smallest(self, shape: ModelConfig, table: str) -> int:
        """Return the bytes of the smallest file of a shape."""
        if self.is_whole:
            return self.room_of(shape, table).smallest
        budget, plan = self.blocks(shape, table), self.plan_of(shape, table)
        least = {
            name: min(each, key=lambda one: one.size_bits(*budget.shapes[name]))
            for name, each in budget.choices.items()
        }
        if self.is_gguf:
            return math.ceil((budget.rest_bits + sum(one.size_bits(*budget.shapes[n]) for n, one in least.items())) / 8)
        schemes = {name: one for name, one in {**plan, **least}.items() if isinstance(one, Scheme)}
        fixed = sum(one.size_bits(*budget.shapes[name]) for name, one in schemes.items() if name not in least)
        return math.ceil((budget.rest_bits - fixed) / 8) + stored_bytes(schemes, shape)

    def refuse_impossible(self, measured: Sensitivity, levers: Mapping[str, Sequence[Mapping[str, int]]]) -> None:
        """Refuse a size that no setting of the levers reaches, and one of at least the model's own in 16 bits.

        Raises: UsageError with the smallest that is possible.
        """
        points = {name: [Setting(dict(settings[-1]), 0.0)] for name, settings in levers.items()}  # the strongest
        smallest = None
        for vocabulary in {max(measured.vocabulary), min(measured.vocabulary)}:
            for point in combined(points):
                shape = shape_of(self.source.shape, vocabulary, point.changes)
                for table in self.tables or (WHOLE,):
                    own = self.smallest(shape, table)
                    smallest = own if smallest is None else min(smallest, own)
        if smallest is not None and smallest > self.size:
            raise UsageError(
                f"`--to {self.config.size}`: the model cannot be compressed to {self.size / 1e6:,.3f} MB",
                f"--to {-(-smallest // 1000) / 1e3:.3f}MB is the smallest possible"
                + (f" with {', '.join(self.config.keep)} kept" if self.config.keep else ""),
            )


def is_table(module: str) -> bool:
    """Tell whether a module is an embedding or a head."""
    return module in (*TOKEN_TABLES, HEAD)


def gguf_metadata(artifact: Artifact, source: Path) -> int:
    """Return the bytes of a GGUF file's metadata."""
    ready: Ready = prepare(artifact, source)
    return metadata_bytes(ready.values, architecture_for(artifact.config).name)
