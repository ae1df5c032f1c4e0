"""The dry run's prediction of a layout is within a tenth of what its processes take (`benchmarks/memory.py`: all rows)."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from llmctl.config import ModelConfig
from llmctl.model.flops import Rows
from llmctl.model.training_memory import activation_bytes
from llmctl.model.transformer import LanguageModel

if sys.platform != "linux":
    pytest.skip("needs /proc/self/clear_refs", allow_module_level=True)
PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "memory.py"
SPEC = importlib.util.spec_from_file_location("memory_benchmark", PATH)
assert SPEC is not None
assert SPEC.loader is not None
benchmark = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(benchmark)


SMALLER = {"d_model": 384, "n_layers": 4, "n_heads": 6}


@pytest.mark.parametrize(
    ("row", "size"),
    [
        ("decoder, adamw", SMALLER),
        ("decoder, 2 ranks fsdp, recomputed", SMALLER),
        ("decoder, 2 ranks deterministic", {}),
    ],
)
def test_the_prediction_is_within_a_tenth_of_the_peak(row: str, size: dict[str, int]):
    assert benchmark.is_close(row, **size)


@pytest.mark.parametrize(("packed", "tokens"), [(False, 128), (True, 320)])
def test_what_disentangled_attention_keeps_is_counted(packed: bool, tokens: int):
    """The tensors that torch saves for the backward pass, without parameters: gathered scores keep no table of distances."""
    shape = {"vocab_size": 50, "d_model": 128, "n_layers": 2, "n_heads": 2, "max_positions": 512, "gated": False}
    bert = {"norm": "layernorm", "norm_position": "post", "embedding_norm": True, "activation": "gelu"}
    distances = {"positions": "disentangled", "n_relative_buckets": 512, "max_relative_distance": 512}
    model = LanguageModel(ModelConfig(family="encoder", **shape, **bert, **distances)).train()
    own = {parameter.data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    documents = torch.arange(tokens).expand(4, -1) // (tokens // 2) + 1 if packed else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.hidden(torch.zeros(4, tokens, dtype=torch.long), documents_BT=documents)
    kept = sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in own)
    assert activation_bytes(model.config, Rows(4, tokens, packed=packed), 4, 4) == pytest.approx(kept, rel=0.1)
    del hidden
