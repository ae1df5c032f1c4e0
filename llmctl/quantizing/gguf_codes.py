"""Codes of a run that writes a GGUF file: chosen on the grids of ggml's blocks, types mixed under a size."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmctl.config import MIXED
from llmctl.converting.convert import read_gguf
from llmctl.converting.export_gguf import Ready, prepare, write_verified
from llmctl.converting.gguf_check import with_weights
from llmctl.files import atomic_path, write_json
from llmctl.formats.artifact import GGUF
from llmctl.formats.gguf.write import Planned, plan_blocks
from llmctl.formats.quantization import is_inside
from llmctl.model.parameters import parameter_shapes
from llmctl.model.transformer import LanguageModel
from llmctl.quant.gguf_schemes import BlockScheme
from llmctl.quant.methods import AnyScheme
from llmctl.quantizing.calibrate import Calibrated
from llmctl.quantizing.codes import Codes, Facts, shown_losses
from llmctl.quantizing.gguf_plan import modules_of
from llmctl.runs.progress import Say

RECORD = "export.json"


class GgufCodes(Codes):
    """Codes in ggml's blocks; the file is written and verified as soon as they are chosen."""

    chosen = file = GGUF

    def ready(self) -> Ready:
        """Return what the file says of the model."""
        return prepare(self.source, Path(self.config.model))

    def keep(self, model: LanguageModel, plan: dict[str, AnyScheme], calibrated: Calibrated, say: Say) -> None:
        """Write the file and verify it."""
        del model
        say("writing and verifying the GGUF file")
        kind = self.config.weights.gguf
        wanted = plan_blocks(self.shape, "f16" if kind == MIXED else kind)
        blocks = dict(wanted)
        for there, module in modules_of(self.shape).items():
            if isinstance(scheme := plan.get(module), BlockScheme):
                blocks[there] = Planned(scheme.name, scheme.name if kind == MIXED else wanted[there].wanted)
        path = self.folder / self.chosen
        shown = self.folder.parent / self.file
        state = self.source.state()
        record = write_verified(self.ready(), path, blocks, state, calibrated.codes, kind=kind, shown=shown)
        inside = {name: scheme for name, scheme in plan.items() if is_inside(name)}
        shapes = {name: parameter_shapes(self.shape)[f"{name}.weight"] for name in inside}
        bits = sum(scheme.size_bits(*shapes[name]) for name, scheme in inside.items())
        record["bits_per_weight_layers"] = bits / max(sum(map(math.prod, shapes.values())), 1)
        write_json(self.folder / RECORD, {**record, "lost": shown_losses(calibrated)})

    def load(self, file: str, device: torch.device) -> LanguageModel:
        """Return the model that is in the file."""
        config, state, _, _ = read_gguf(self.folder / file)
        return with_weights(config, state).to(device)

    def facts(self) -> Facts:
        """Return what the report says of the file."""
        record = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
        return Facts(record["bytes"], record.pop("bits_per_weight_layers"), record.pop("lost"), {"gguf": record})

    def write(self, folder: Path, provenance: Mapping[str, Any]) -> None:
        """Put the file into the run folder."""
        del provenance
        with atomic_path(folder / self.file) as temporary:
            shutil.copyfile(self.folder / self.chosen, temporary)
