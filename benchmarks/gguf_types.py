"""What every GGUF type costs a model: size, bits, and how far its predictions of a text move from the original's.

    python benchmarks/gguf_types.py MODEL TEXT [--dither]

Rows of 256 tokens are spread over the text. `--dither` first moves every weight by a random part of a four-bit step: a
model that was published on a 4-bit grid flatters every format with that grid.
"""

import gzip
import sys
import tempfile
from pathlib import Path

import torch

from llmctl.engine.convert import import_model
from llmctl.engine.export_gguf import export_gguf
from llmctl.engine.gguf_proof import distance, logits_of
from llmctl.engine.models import load_model
from llmctl.formats.artifact import read_artifact, write_artifact
from llmctl.formats.gguf_write import TYPES

ROW_TOKENS, N_ROWS = 256, 12


def dithered(source: Path, out: Path) -> Path:
    """Return a copy of a model whose weights are off the grid of Q4_1."""
    artifact, generator = read_artifact(source), torch.Generator().manual_seed(0)
    state = artifact.state()
    for name, weight in state.items():
        if weight.dim() > 1 and name != "lm_head.weight":
            groups = weight.view(weight.shape[0], -1, 32)
            step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
            groups += (torch.rand(groups.shape, generator=generator) - 0.5) * step
    return write_artifact(out, artifact.config, state, files=artifact.files, provenance={})


def main() -> None:
    source, text = Path(sys.argv[1]), Path(sys.argv[2])
    content = gzip.decompress(text.read_bytes()) if text.suffix == ".gz" else text.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source = dithered(source, work / "dithered") if "--dither" in sys.argv else source
        original = load_model(source, device="cpu")
        assert original.tokenizer is not None
        ids = original.tokenizer.encode(content.decode()[:200_000])
        step = max(ROW_TOKENS, len(ids) // N_ROWS)
        rows = [ids[start : start + ROW_TOKENS] for start in range(0, len(ids) - ROW_TOKENS, step)]
        before = logits_of(original.model, rows)
        for kind in TYPES:
            record = export_gguf(source, work / "m.gguf", kind=kind, force=True)
            back = load_model(import_model(work / "m.gguf", work / "back", force=True), device="cpu")
            kl, top1 = distance(before, logits_of(back.model, rows))
            size = f"{record['bytes'] / 1e6:.1f} MB, {record['bits_per_weight']:.2f} bits per weight"
            print(f"{kind:<6} {size}, KL {kl:.3g} nats/token, {top1:.1%} same best token", flush=True)


main()
