"""Codes of a run that writes a GGUF file: chosen on the grids of ggml's blocks, types mixed under a size; scales trained if asked."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmctl.config import MIXED
from llmctl.converting.convert import read_gguf
from llmctl.converting.export_gguf import Ready, prepare, write_verified
from llmctl.converting.gguf_check import with_weights
from llmctl.files import link_or_copy, write_json
from llmctl.formats.artifact import GGUF
from llmctl.formats.gguf.container import read_gguf_header
from llmctl.formats.gguf.model import gguf_codes, gguf_state
from llmctl.formats.gguf.write import Planned, plan_blocks
from llmctl.formats.quantization import is_inside
from llmctl.model.parameters import parameter_shapes
from llmctl.model.transformer import LanguageModel
from llmctl.quant.gguf_schemes import BlockScheme
from llmctl.quant.grid import Codes as BlockCodes
from llmctl.quant.methods import AnyScheme
from llmctl.quantizing.calibrate import Calibrated
from llmctl.quantizing.codes import Codes, Facts, shown_losses
from llmctl.quantizing.fake_quant import block_learner, learned_blocks
from llmctl.quantizing.gguf_plan import modules_of
from llmctl.runs.progress import Say
from llmctl.training.inputs import Fitted


class GgufCodes(Codes):
    """Codes in ggml's blocks; the file is written and verified as soon as they are chosen, and again when they are trained."""

    chosen, learned = "chosen.gguf", "learned.gguf"
    file = GGUF

    def ready(self) -> Ready:
        """Return what the file says of the model."""
        return prepare(self.source, Path(self.config.model))

    @property
    def has_chosen(self) -> bool:
        """Whether an earlier start of this run chose the codes: the record is written after the file."""
        return self.record_of(self.chosen).exists()

    def record_of(self, file: str) -> Path:
        """Return where the record of a file that was written is."""
        return (self.folder / file).with_suffix(".json")

    def keep(self, model: LanguageModel, plan: dict[str, AnyScheme], calibrated: Calibrated, say: Say) -> None:
        """Write the file and verify it."""
        del model
        say("writing and verifying the GGUF file")
        blocks = {name: scheme for name, scheme in plan.items() if isinstance(scheme, BlockScheme)}
        self._write(self.chosen, blocks, calibrated.codes, shown_losses(calibrated))

    def _write(
        self, file: str, schemes: Mapping[str, BlockScheme], codes: Mapping[str, BlockCodes], lost: Mapping[str, float]
    ) -> None:
        """Write a file, verify it, and write its record."""
        kind = self.config.weights.gguf
        wanted = plan_blocks(self.shape, "f16" if kind == MIXED else kind)
        blocks = dict(wanted)
        for there, module in modules_of(self.shape).items():
            if scheme := schemes.get(module):
                blocks[there] = Planned(scheme.name, scheme.name if kind == MIXED else wanted[there].wanted)
        path, shown = self.folder / file, self.folder.parent / self.file
        record = write_verified(self.ready(), path, blocks, self.source.state(), codes, kind=kind, shown=shown)
        inside = {name: scheme for name, scheme in schemes.items() if is_inside(name)}
        shapes = {name: parameter_shapes(self.shape)[f"{name}.weight"] for name in inside}
        bits = sum(scheme.size_bits(*shapes[name]) for name, scheme in inside.items())
        record["bits_per_weight_layers"] = bits / max(sum(map(math.prod, shapes.values())), 1)
        write_json(self.record_of(file), {**record, "lost": lost})

    def learner(self) -> LanguageModel:
        """Return the model whose scales are trained, starting from the chosen codes."""
        header = read_gguf_header(self.folder / self.chosen)
        model = block_learner(self.original(), gguf_state(header, self.shape), gguf_codes(header, self.shape))
        model.train()
        return model

    def keep_learned(self, fitted: Fitted) -> None:
        """Write the file of the trained scales next to that of the chosen codes, and verify it."""
        chosen = gguf_codes(read_gguf_header(self.folder / self.chosen), self.shape)
        codes = learned_blocks({name: tensor.cpu() for name, tensor in fitted.weights.items()}, chosen)
        schemes = {name: scheme for name, (scheme, _) in chosen.items()}
        self._write(self.learned, schemes, codes, self._record(self.chosen)["lost"])

    def load(self, file: str, device: torch.device) -> LanguageModel:
        """Return the model that is in the file."""
        config, state, _, _ = read_gguf(self.folder / file)
        return with_weights(config, state).to(device)

    def _record(self, file: str) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self.record_of(file).read_text(encoding="utf-8"))
        return record

    def facts(self) -> Facts:
        """Return what the report says of the file."""
        record = self._record(self.final)
        return Facts(record["bytes"], record.pop("bits_per_weight_layers"), record.pop("lost"), {"gguf": record})

    def write(self, folder: Path, provenance: Mapping[str, Any]) -> None:
        """Put the file into the run folder: a second name of that in `parts/`, which takes no more space."""
        del provenance
        link_or_copy(self.folder / self.final, folder / self.file)
