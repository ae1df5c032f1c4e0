"""The compiled step, where a compiler is at hand: right, kept under its own name, and never in the way."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmctl.benchmarking import compiled_step_check as native_check
from llmctl.benchmarking.compiled_step_check import (
    LARGEST_ERRORS,
    compile_and_check,
    error_of,
    errors_of,
    prepare_library,
)
from llmctl.benchmarking.random_models import random_model
from llmctl.cli import run
from llmctl.config import ModelConfig
from llmctl.inference.prefix import Prefix
from llmctl.inference.session import Session
from llmctl.kernels import compile as compile_module
from llmctl.kernels import compiled_step as native
from llmctl.kernels import product_table as products
from llmctl.kernels.build import BuildError, build_all, find_compiler
from llmctl.kernels.compile import (
    COMPILED,
    PACKAGED,
    library_path,
    own_verdicts,
    verdict,
    write_verdict,
)
from llmctl.kernels.compiled_step import Tiles, compiled_kinds, find_library, load_library, make_native, variant_of
from llmctl.kernels.decoder import decoding_by, make_decoder
from llmctl.kernels.product_table import Measured, random_layer
from llmctl.losses.logits import is_native
from llmctl.model.cache import CACHES
from llmctl.model.decode import Decoder
from llmctl.quant.linear import QuantLinear
from llmctl.quant.schemes import SCHEMES

WANTS = {
    "haswell": {"avx2", "fma", "bmi2", "movbe"},
    "alderlake": {"avx2", "fma", "bmi2", "movbe", "avx_vnni", "gfni"},
    "x86-64-v4": {"avx2", "fma", "bmi2", "movbe", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"},
    "x86-64": {"sse2"},
}
"""What a processor must have to run what is compiled for another."""

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not there")
SHAPE = {"vocab_size": 96, "d_model": 64, "n_layers": 2, "n_heads": 2, "d_ff": 128, "max_positions": 32}


def features() -> set[str]:
    """Return what this processor says it can do; nothing where it is no x86."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return set(next((line for line in lines if line.startswith("flags")), "").split())


@pytest.fixture(autouse=True)
def wanted(monkeypatch):
    monkeypatch.delenv("LLMCTL_NATIVE", raising=False)


@pytest.fixture(scope="module")
def library(compiled):
    return load_library(compiled("native"))


@pytest.fixture(scope="session")
def packaged(shelf):
    """Return the library of all instruction sets, and their names."""
    path, names = shelf / "_decode.so", shelf / "names.txt"
    if not names.is_file():
        names.write_text(" ".join(build_all(path)))
    return path, names.read_text().split()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMCTL_CACHE", str(tmp_path))
    return tmp_path


def script(path: Path, text: str) -> str:
    """Write an executable file and return its path."""
    path.write_text(text)
    path.chmod(0o700)
    return str(path)


@pytest.fixture
def compiler(compiled, tmp_path_factory, monkeypatch) -> None:
    """Let the compiler remember, as ccache does: it gives the library that g++ made of the same sources."""
    text = f"#!/bin/sh\nfor target; do :; done\ncp '{compiled('native')}' \"$target\"\n"
    monkeypatch.setenv("CXX", script(tmp_path_factory.mktemp("compiler") / "c++", text))


def place_package(monkeypatch, path: Path) -> None:
    """Let the library of the package be at a path."""
    for module in (native, compile_module):
        monkeypatch.setattr(module, "packaged_path", lambda: path)


class Counted:
    """A compiled step that counts its calls."""

    def __init__(self, step) -> None:
        self.step, self.calls, self.parts = step, [], []

    def __call__(self, tokens_B, cache, memory_documents_BS):
        self.calls.append(len(tokens_B))
        return self.step(tokens_B, cache, memory_documents_BS)

    def read(self, ids_BT, cache, documents_BT, *, is_last: bool):
        logits_BV = self.step.read(ids_BT, cache, documents_BT, is_last=is_last)
        self.parts.append(logits_BV is not None)
        return logits_BV


GPT = {"norm": "layernorm", "gated": False, "attention_bias": True, "mlp_bias": True, "tie_embeddings": False}
SHAPES = {
    "qwen2": {"attention_bias": True, "attention_output_bias": "no"},
    "qwen3": {"qk_norm": True},
    "llama-3": {"rope_scaling": "llama3", "rope_scaling_values": (8.0, 1.0, 4.0, 16.0), "attention_windows": ()},
    "mistral": {"attention_windows": (6,)},
    "gemma": {"activation": "gelu_tanh", "embedding_scale": 11.3},
    "gemma2": {"activation": "gelu_tanh", "norm_position": "both", "attention_softcap": 0.5, "logits_softcap": 0.7},
    "gemma3": {"activation": "gelu_tanh", "norm_position": "both", "qk_norm": True, "rope_thetas": (1e4, 1e6)},
    "phi3": {"rotary_dim": 16},
    "phi4-mini": {"rotary_dim": 16, "rope_scaling": "longrope"}
    | {"rope_scaling_values": (8.0, 1.1, *[1.0, 1.3] * 4, *[2.0, 3.0] * 4)},
    "granite": {"residual_scale": 0.22, "logits_scale": 0.125, "attention_scale": 0.1, "embedding_scale": 12.0},
    "smollm3": {"rope_thetas": (1e4, 0.0)},
    "olmo": {"norm": "layernorm", "norm_weight": False, "norm_bias": False},
    "olmo2": {"norm_position": "output", "qk_norm": True, "qk_norm_kind": "width"},
    "hunyuan": {"qk_norm": True, "qk_norm_kind": "rotated"},
    "cohere2": {"norm": "layernorm", "norm_bias": False, "parallel": "shared", "logits_scale": 0.25},
    "gpt-neox": GPT | {"parallel": "separate", "rotary_dim": 8, "activation": "gelu"},
    "gpt-j": GPT | {"parallel": "shared", "logits_bias": True, "activation": "gelu_tanh"},
    "gpt2": GPT | {"positions": "learned", "activation": "gelu_tanh"},
    "opt": GPT | {"positions": "learned", "position_offset": 2, "activation": "relu"},
    "xglm": GPT | {"positions": "sinusoidal", "activation": "gelu"},
    "bloom": GPT | {"positions": "alibi", "embedding_norm": True, "activation": "gelu_tanh"},
    "mpt": {"norm": "layernorm", "norm_bias": False, "positions": "alibi", "gated": False, "activation": "gelu"},
    "nemotron": GPT | {"activation": "relu2"},
    "post-norm": {"norm_position": "post", "norm": "layernorm"},
    "modernbert": {"first_norm": False, "norm": "layernorm", "norm_bias": False, "embedding_norm": True},
}
"""The blocks of published decoders."""


@needs_compiler
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4", "fp32/int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_decoder_has_the_logits_that_torch_gives(library, shape: str, precision: str):
    # Norms of heads enlarge what inputs in 8 bits lose.
    bound = LARGEST_ERRORS[precision] * (1.5 if precision in SCHEMES else 1.0)
    assert error_of(library, precision, **SHAPES[shape]) < bound


@needs_compiler
@pytest.mark.parametrize("shape", ["gemma3", "olmo2", "gpt-neox", "gpt-j", "bloom", "post-norm"])
def test_threads_wait_for_each_other(library, shape: str):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert error_of(library, "fp32", **SHAPES[shape]) < LARGEST_ERRORS["fp32"]
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"d_ff": 130},
        {"positions": "none"},
        {"n_kv_heads": 4},
        {"vocab_size": 97},
        {"n_kv_heads": 1, "head_dim": 20},
    ],
)
@pytest.mark.parametrize("precision", LARGEST_ERRORS)
def test_it_gives_the_logits_that_torch_gives(library, precision: str, fields: dict):
    if "d_ff" in fields and precision in SCHEMES:
        fields = {"d_ff": 192}
    if "head_dim" in fields and precision not in {"fp32", "bf16", "fp32/int8"}:
        fields = {"n_kv_heads": 1, "head_dim": 48}
    assert error_of(library, precision, **fields) < LARGEST_ERRORS[precision]


@needs_compiler
@pytest.mark.parametrize("processor", WANTS)
def test_narrower_processors_get_the_same(compiled, processor: str):
    """AVX2 or AVX-512 without products of bytes, AVX2 with them, and neither: what other machines compile."""
    if not WANTS[processor] <= features():
        pytest.skip(f"this processor does not run what is compiled for `{processor}`")
    library = load_library(compiled(processor))
    for precision, error in errors_of(library).items():
        assert error < LARGEST_ERRORS[precision]
    assert error_of(library, "int4", n_kv_heads=1, head_dim=48, vocab_size=97) < LARGEST_ERRORS["int4"]


@needs_compiler
@pytest.mark.parametrize("processor", ["native", *WANTS])
def test_weights_are_multiplied_out_to_the_last_bit(compiled, processor: str, monkeypatch):
    """On every processor, in every order of the halves of a byte: products with one input of 1 are weights."""
    if not WANTS.get(processor, set()) <= features():
        pytest.skip(f"this processor does not run what is compiled for `{processor}`")
    kinds = compiled_kinds(Tiles(load_library(compiled(processor))))
    schemes = [SCHEMES[name] for name in ("int8", "int6", "int5", "int4", "int4-sym", "int3", "int2")]
    schemes += [replace(SCHEMES[name], group=group) for name in ("int6", "int4") for group in (64, 128)]
    schemes.append(replace(SCHEMES["int5"], symmetric=True))
    for scheme in schemes:
        layer = random_layer(scheme, 37, 384, torch.Generator().manual_seed(3))
        for is_fast, dtype in (
            (True, torch.float32),
            (False, torch.float32),
            (False, torch.bfloat16),
            (False, torch.float16),
        ):
            monkeypatch.setattr(native, "is_native", lambda _, is_fast=is_fast: is_fast)
            narrow = torch.bfloat16 if is_fast or dtype == torch.bfloat16 else torch.float32
            found = kinds["compiled"].make(layer)(torch.eye(384, dtype=dtype))
            assert found.dtype == dtype
            assert torch.equal(found, layer.dequantized(narrow).T.to(dtype))
        assert kinds["compiled"].make(layer)(torch.ones(2, 3, 384)).shape == (2, 3, 37)


@needs_compiler
def test_products_of_what_is_compiled_are_measured_and_kept_apart(library, cache, monkeypatch):
    plain = Measured()
    monkeypatch.setattr(products, "find_library", lambda: library)
    table = Measured()
    assert table.machine != plain.machine
    times = table.times(SCHEMES["int4"], 256, 256, 64)
    assert "integers" in times
    assert "integers" not in plain.times(SCHEMES["int4"], 256, 256, 64)
    layer = random_layer(SCHEMES["int4"], 256, 256, torch.Generator().manual_seed(0))
    layer.table = table
    x = torch.randn(64, 256)
    torch.testing.assert_close(layer(x), x @ layer.dequantized(torch.float32).T, rtol=0.02, atol=0.02)


@needs_compiler
@pytest.mark.parametrize("n_threads", [2, 3])
def test_any_number_of_threads_gives_the_same(library, n_threads: int):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(n_threads)
        assert error_of(library, "fp32") < LARGEST_ERRORS["fp32"]
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize(
    "fields",
    [
        {"head_transform": True},
        {"n_experts": 4},
    ],
)
def test_models_that_it_does_not_know_are_left_to_torch(library, fields: dict):
    decoder = Decoder(random_model(ModelConfig(**(SHAPE | fields)), "fp32"))
    assert make_native(library, decoder) is None


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_scales_that_it_would_round_are_left_to_torch(library, precision: str, dtype: torch.dtype):
    """It takes bfloat16 scales: of others only what bfloat16 represents."""
    for ratio in (1, 1 + 2**-9 - 2**-10):
        model = random_model(ModelConfig(**SHAPE), precision)
        layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
        for layer in layers:
            scales = layer.weight_scale.to(dtype) * ratio
            layer.load_state_dict(layer.state_dict() | {"weight_scale": scales})
        assert (make_native(library, Decoder(model)) is None) == (ratio != 1)
        layer = layers[0]
        found = compiled_kinds(Tiles(library))["compiled"].make(layer)(torch.eye(layer.n_in))
        expected = (
            layer.dequantized(torch.bfloat16).float() if ratio == 1 and is_native(torch.bfloat16) else layer.weight
        )
        torch.testing.assert_close(found, expected.T, rtol=1e-6, atol=0)


@needs_compiler
@pytest.mark.parametrize("kv", CACHES)
@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("lengths", [(5,), (5, 5), (5, 3), (4,) * 6, (1, 4, 2, 6, 3, 5, 4), tuple(range(2, 19))])
def test_a_session_uses_it_where_it_can(library, precision: str, lengths: tuple[int, ...], kv: str):
    model = random_model(ModelConfig(**SHAPE), precision)
    with_it, without = Decoder(model), Decoder(model)
    step = make_native(library, with_it)
    assert step is not None
    with_it.native = Counted(step)
    prompts = [list(range(1, 1 + length)) for length in lengths]
    with torch.inference_mode():
        sessions = [Session(model, prompts, 8, decoder=decoder, excluded=[7], kv=kv) for decoder in (with_it, without)]
        logits = [session.begin() for session in sessions]
        for token in range(5):
            tokens_B = torch.full((len(lengths),), token)
            logits = [session.step(tokens_B) for session in sessions]
            assert (logits[0][:, 7] == float("-inf")).all()
            got, expected = (found.masked_fill(found.isinf(), 0) for found in logits)
            assert (got - expected).norm() < (
                0.03 if precision == "int4" else 0.01 if kv == "int8" else 1e-4
            ) * expected.norm()
            if token == 2 and len(lengths) > 1:
                for session in sessions:
                    session.select(torch.tensor([0, 0]))
                lengths = lengths[:2]
    assert len(with_it.native.calls) == 5
    assert all(with_it.native.parts) == (precision == "int4")


RAGGED = {
    "learned": {"positions": "learned", "norm": "layernorm"},
    "alibi": {"positions": "alibi"},
    "windows": {"attention_windows": (4, 0), "rope_thetas": (1e4, 1e6)},
    "relative": {"positions": "relative", "attention_scale": 1.0},
    "several heads": {"n_heads": 4, "n_kv_heads": 1, "head_dim": 20, "attention_softcap": 0.5},
}
T5 = {"positions": "relative", "attention_scale": 1.0, "activation": "relu", "gated": False}
BART = {"positions": "learned", "norm": "layernorm", "norm_position": "post", "gated": False}
PAIRS = {
    "t5": T5,
    "umt5": T5 | {"relative_bias_per_layer": True, "gated": True},
    "bart": BART | {"attention_bias": True, "mlp_bias": True, "embedding_norm": True, "logits_bias": True},
    "rope": {"n_kv_heads": 1},
}
"""Encoder-decoders."""


def differences(model, decoders, prompts, **options) -> list[float]:
    """Return the relative differences of the logits of two decoders, of the prompts and five tokens after them."""
    kept = []
    with torch.inference_mode():
        sessions = [Session(model, prompts, 8, decoder=decoder, **options) for decoder in decoders]
        kept.append([session.begin().float() for session in sessions])
        for token in range(5):
            tokens_B = torch.full((len(kept[-1][0]),), 3 + token)
            if token == 3 and len(tokens_B) > 1:
                for session in sessions:
                    session.select(torch.tensor([1, 0] + [1] * (len(tokens_B) - 2)))
            kept.append([session.step(tokens_B).float() for session in sessions])
    # `max` overlooks a NaN.
    return [float(((found - expected).norm() / expected.norm()).nan_to_num(float("inf"))) for found, expected in kept]


@needs_compiler
@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("fields", RAGGED.values(), ids=RAGGED)
def test_rows_of_unequal_length_have_their_own_positions(library, precision: str, fields: dict):
    if precision == "int4" and "head_dim" in fields:
        fields = fields | {"head_dim": 16}
    model = random_model(ModelConfig(**(SHAPE | fields)), precision)
    with_it, without = Decoder(model), Decoder(model)
    with_it.native = make_native(library, with_it)
    assert with_it.native is not None
    with_it.native.reads = True
    prompts = [list(range(1, 1 + length)) for length in (9, 2, 17, 1, 5, 11)]
    assert max(differences(model, (with_it, without), prompts)) < LARGEST_ERRORS[precision] * 1.5


@needs_compiler
@pytest.mark.parametrize("fields", [{}, {"attention_windows": (40, 0)}], ids=["full", "windows"])
def test_rows_that_are_padding_throughout_a_part_of_the_prompts_wait(library, fields: dict):
    """Prompts are read in parts of `READ_TOKENS`: the short ones begin after the first part."""
    model = random_model(ModelConfig(**(SHAPE | fields | {"max_positions": 600})), "int4")
    with_it, without = Decoder(model), Decoder(model)
    with_it.native = Counted(make_native(library, with_it))
    prompts = [[token % 90 for token in range(length)] for length in (580, 1, 300)]
    assert max(differences(model, (with_it, without), prompts)) < LARGEST_ERRORS["int4"]
    assert with_it.native.parts == [True, True]


@needs_compiler
@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_rows_without_a_token_are_left_to_torch(library, family: str):
    """They have no last token, and attention to no source divides 0 by 0."""
    model = random_model(ModelConfig(**(SHAPE | {"family": family})), "int4")
    with_it, without = Decoder(model), Decoder(model)
    with_it.native = make_native(library, with_it)
    for prompts in ([[], [1, 2, 3]], [[1, 2], []]):
        assert max(differences(model, (with_it, without), prompts)) < LARGEST_ERRORS["int4"]


@needs_compiler
@pytest.mark.parametrize("kv", CACHES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int4"])
@pytest.mark.parametrize("lengths", [(6,), (6, 6), (7, 3, 5, 1)])
@pytest.mark.parametrize("fields", PAIRS.values(), ids=PAIRS)
def test_encoder_decoders_attend_to_their_sources(
    library, fields: dict, lengths: tuple[int, ...], precision: str, kv: str
):
    model = random_model(ModelConfig(**(SHAPE | fields | {"family": "encoder_decoder"})), precision)
    with_it, without = Decoder(model), Decoder(model)
    with_it.native = Counted(make_native(library, with_it))
    bound = max(LARGEST_ERRORS[precision], 0.02 if kv == "int8" else 0.0)
    for copies in (1, 2):
        prompts = [list(range(1, 1 + length)) for length in lengths]
        assert max(differences(model, (with_it, without), prompts, copies=copies, kv=kv)) < bound
    assert len(with_it.native.calls) == 10


@needs_compiler
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int4"])
def test_it_goes_on_after_a_beginning_that_was_held(library, precision: str):
    model = random_model(ModelConfig(**SHAPE), precision)
    decoder, prefix = Decoder(model), Prefix()
    step = make_native(library, decoder)
    assert step is not None
    decoder.native = Counted(step)
    prompts = [[*range(1, 23), 30 + row] for row in range(4)]
    found = []
    with torch.inference_mode():
        for held in (None, prefix, prefix):
            session = Session(model, prompts, 4, decoder=decoder, prefix=held)
            logits = [session.begin(), *[session.step(torch.full((4,), token)) for token in range(3)]]
            found.append(torch.stack([part.float() for part in logits]))
    for got in found[1:]:
        assert (got - found[0]).norm() < LARGEST_ERRORS[precision] * found[0].norm()
    assert prefix.ids == list(range(1, 23))
    assert decoder.native.calls == [4] * 9


@needs_compiler
def test_it_is_used_once_it_is_compiled_and_wanted(compiler, cache, monkeypatch, capsys):
    model = random_model(ModelConfig(**SHAPE), "fp32")
    assert find_library() is None
    decoder = make_decoder(model)
    assert decoder is not None
    assert decoder.native is None
    assert "no C++ compiler" in decoding_by(decoder)
    assert compile_and_check() == library_path()
    decoder = make_decoder(model)
    assert decoder is not None
    assert decoder.native is not None
    assert decoding_by(decoder) == "compiled library (native)"
    monkeypatch.setenv("LLMCTL_NATIVE", "0")
    assert find_library() is None
    assert decoding_by(decoder) == "PyTorch (LLMCTL_NATIVE=0)"


@needs_compiler
def test_a_library_that_others_could_have_written_is_not_loaded(compiled, cache, capsys):
    path = Path(shutil.copy(compiled("native"), library_path()))
    assert find_library() is None  # it was not checked
    write_verdict(COMPILED)
    assert find_library() is not None
    cache.chmod(0o777)
    assert find_library() is None
    assert run(["doctor"]) == 0
    assert f"not used: `{cache}` can be written by others" in capsys.readouterr().out
    assert run(["doctor", "--compile"]) == 1
    assert "can be written by others" in capsys.readouterr().err
    cache.chmod(0o700)
    path.chmod(0o722)
    assert find_library() is None
    path.chmod(0o700)
    assert find_library() is not None


def test_a_file_that_is_no_library_is_left_alone(cache):
    library_path().write_bytes(b"no library")
    write_verdict(COMPILED)
    assert find_library() is None


@needs_compiler
def test_logits_that_are_no_numbers_are_wrong(library):
    assert error_of(library, "fp32", residual_scale=1e30) == float("inf")


@needs_compiler
def test_a_step_that_is_wrong_is_removed(compiler, cache, monkeypatch, capsys):
    monkeypatch.setattr(native_check, "LARGEST_ERRORS", {"fp32": 0.0})
    assert run(["doctor", "--compile"]) == 1
    assert "its logits are wrong (fp32 by" in capsys.readouterr().err
    assert not library_path().exists()


def test_without_a_compiler_it_says_so(cache, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(cache))
    monkeypatch.delenv("CXX", raising=False)
    assert run(["doctor", "--compile"]) == 7
    assert "no C++ compiler found" in capsys.readouterr().err


@needs_compiler
def test_what_the_compiler_complains_about_is_told(cache, monkeypatch, capsys, tmp_path):
    broken = tmp_path / "broken.cpp"
    broken.write_text("int main( {")
    monkeypatch.setattr(compile_module, "source_path", lambda: broken)
    assert run(["doctor", "--compile"]) == 1
    assert "error:" in capsys.readouterr().err
    assert not list(cache.glob("*.so"))


@needs_compiler
def test_it_is_compiled_at_the_first_use_and_only_once(compiler, cache, monkeypatch):
    lines: list[str] = []
    place_package(monkeypatch, cache / "none.so")
    prepare_library(lines.append)
    assert verdict() == COMPILED
    assert find_library() is not None
    assert len(lines) == 1
    assert "LLMCTL_NATIVE=0" in lines[0]
    written = library_path().stat().st_mtime_ns
    prepare_library(lines.append)
    assert len(lines) == 1
    assert library_path().stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("#!/bin/sh\nexit 3\n", "cannot compile the decoding library: exit status 3"),
        ("#!/bin/sh\nexit 0\n", "cannot compile the decoding library: it wrote no file"),
        (
            "#!/bin/sh\nprintf 'x.cpp: error: \\351\\n' >&2; exit 1\n",
            "cannot compile the decoding library: x.cpp: error: \ufffd",
        ),
        ("no program", "cannot be run: Exec format error"),
    ],
)
def test_a_compiler_that_fails_is_asked_once(cache, monkeypatch, text: str, reason: str):
    lines: list[str] = []
    place_package(monkeypatch, cache / "none.so")
    monkeypatch.setenv("CXX", script(cache / "compiler", text))
    prepare_library(lines.append)
    assert lines[-1] == f"not compiled: `{cache / 'compiler'}` {reason}"
    assert find_library() is None
    assert decoding_by(None) == f"PyTorch ({lines[-1].removeprefix('not compiled: ')})"
    own_verdicts().clear()  # as in the next process
    prepare_library(lines.append)
    assert len(lines) == 2
    assert list(cache.glob("*.so")) == []


def test_another_compiler_is_asked_too(cache, monkeypatch):
    """As the hint says: set CXX to another compiler. A library in the package may also have come since."""
    place_package(monkeypatch, cache / "none.so")
    for name in ("first", "second"):
        monkeypatch.setenv("CXX", script(cache / name, "#!/bin/sh\nexit 1\n"))
        assert verdict() == ""
        prepare_library(lambda _: None)
        assert verdict().startswith(f"`{cache / name}` cannot compile")
    (cache / "none.so").write_bytes(b"")
    assert verdict() == ""


def test_a_failure_of_the_machine_is_not_kept(cache, monkeypatch):
    place_package(monkeypatch, cache / "none.so")
    text = "#!/bin/sh\necho 'fatal error: error writing to /tmp/x.s: No space left on device' >&2\nexit 1\n"
    monkeypatch.setenv("CXX", script(cache / "compiler", text))
    prepare_library(lambda _: None)
    assert decoding_by(None).endswith("No space left on device)")
    own_verdicts().clear()
    assert verdict() == ""


INTERRUPTED = """
import os, signal
from llmctl.kernels.build import run_all
signal.signal(signal.SIGINT, signal.default_int_handler)
script = f"tail -f /dev/null > /proc/{os.getpid()}/fd/1 & head -c 200000 /dev/zero >&2; kill -INT {os.getpid()}; wait"
try:
    run_all({"": ["sh", "-c", script]})
except KeyboardInterrupt:
    print("interrupted")
"""
"""A compiler that starts another process, then interrupts; it writes more than a pipe takes, so that it is read by then."""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_an_interrupted_build_leaves_no_compiler_behind():
    """Nor what it has started, as g++ starts cc1plus: the end of its output comes when all are gone."""
    process = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=True, timeout=60
    )
    assert process.stdout == "interrupted\n"


def test_cxx_may_have_arguments(cache, monkeypatch):
    compiler = script(cache / "my compiler", "#!/bin/sh\n")
    monkeypatch.setenv("CXX", f"'{compiler}' -m64 ")
    assert find_compiler() == [compiler, "-m64"]
    for wrong in ("'g++", "no-such-compiler g++"):
        monkeypatch.setenv("CXX", wrong)
        with pytest.raises(BuildError, match="no C\\+\\+ compiler found"):
            find_compiler()


@pytest.mark.parametrize("name", [PACKAGED, COMPILED])
def test_a_library_that_is_gone_or_another_is_not_the_one_that_was_checked(cache, monkeypatch, name: str):
    path = cache / "package.so"
    place_package(monkeypatch, path)
    path = path if name == PACKAGED else library_path()
    path.write_bytes(b"first")
    write_verdict(name)
    assert verdict() == name
    path.write_bytes(b"another")
    assert verdict() == ""
    path.unlink()
    assert verdict() == ""


@needs_compiler
def test_a_cache_that_cannot_be_written_leaves_the_library_of_the_package(packaged, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMCTL_CACHE", str(tmp_path / "file" / "cache"))
    lines: list[str] = []
    place_package(monkeypatch, packaged[0])
    prepare_library(lines.append)
    assert (lines, verdict()) == ([], PACKAGED)
    assert find_library() is not None
    place_package(monkeypatch, tmp_path / "none.so")
    for _ in range(2):
        prepare_library(lines.append)
    assert len(lines) == 1  # before anything is compiled
    assert "cannot write" in lines[0]


def test_without_a_compiler_nothing_is_said_and_one_may_come_later(cache, monkeypatch):
    lines: list[str] = []
    place_package(monkeypatch, cache / "none.so")
    monkeypatch.setenv("CXX", "no-such-compiler")
    prepare_library(lines.append)
    assert (lines, verdict(), find_library()) == ([], "", None)
    monkeypatch.setenv("LLMCTL_NATIVE", "0")
    monkeypatch.delenv("CXX")
    prepare_library(lines.append)
    assert (lines, verdict()) == ([], "")


@needs_compiler
def test_the_library_of_the_package_comes_first(packaged, cache, monkeypatch):
    """One library with the instruction sets of many processors, which gives the same as one compiled for this one."""
    (path, variants), lines = packaged, []
    assert "base" in variants
    place_package(monkeypatch, path)
    prepare_library(lines.append)
    assert (lines, verdict()) == ([], PACKAGED)
    found = find_library()
    assert found is not None
    assert variant_of(found) in variants
    assert not library_path().exists()
    if {"avx2", "fma", "bmi2"} <= features():
        assert variant_of(found) != "base"
    # A library of other sources is not loaded: the structs may differ.
    monkeypatch.setattr(native, "source_hash", lambda: "another")
    assert find_library() is None


@needs_compiler
def test_no_instruction_set_leaks_into_another(packaged):
    """Functions that the linker could merge would run instructions that a processor may not have."""
    symbols = subprocess.run(["nm", str(packaged[0])], capture_output=True, text=True, check=False)
    if symbols.returncode:
        pytest.skip("nm is not there")
    merged = [line.split()[-1] for line in symbols.stdout.splitlines() if line.split()[-2] in ("W", "V", "u")]
    assert merged == []
