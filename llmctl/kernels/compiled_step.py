"""Decoding step in C++, compiled on this machine on request (`llmctl doctor --compile`).

The library is in the user's cache, under a name that depends on source, CPU and flags. Once compiled, all decoding uses
it, unless `LLMCTL_NATIVE=0`. It is optional: without it, decoding uses torch.
"""

import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmctl.files import exposed
from llmctl.kernels.compile import Library, library_path
from llmctl.losses.logits import is_native
from llmctl.model.cache import Int8KVCache, KVCache
from llmctl.model.decode import Decoder, Dense, Native, join
from llmctl.model.positions import rope_tables
from llmctl.model.shapes import rope_of
from llmctl.model.supports import CLASSIFIER, SIZES, TOKEN_IDS, TRAINING, unsupported
from llmctl.quant.linear import QuantLinear
from llmctl.quant.packing import pack
from llmctl.quant.products import Kind, Product, rows_of, unpacked
from llmctl.quant.schemes import GROUPS, Scheme
from llmctl.quant.weight import QuantWeight

MOST_ROWS = 4
"""The most rows (sequences) per step: weights are read once but multiplied row by row."""

BLOCK, ROWS = 64, 4
"""Inputs that are quantized with one scale, and outputs that are computed together; as in decode.cpp."""

INT4_BITS, MOST_BITS = 4, 6
"""Grouped codes up to the first width are stored two per byte, up to the second one per byte."""

KINDS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3, "bytes": 4}


class CMatrix(ctypes.Structure):
    """The struct `Matrix` of decode.cpp."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("n_out", ctypes.c_int64),
        ("n_in", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
    )


class CLayer(ctypes.Structure):
    """The struct `Layer` of decode.cpp."""

    _fields_ = (
        ("qkv", CMatrix),
        ("out", CMatrix),
        ("up", CMatrix),
        ("down", CMatrix),
        ("norm_attention", ctypes.c_void_p),
        ("norm_mlp", ctypes.c_void_p),
        ("window", ctypes.c_int64),
    )


class CModel(ctypes.Structure):
    """The struct `Model` of decode.cpp."""

    _fields_ = (
        ("n_layers", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("d_ff", ctypes.c_int64),
        ("n_heads", ctypes.c_int64),
        ("n_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("cache_kind", ctypes.c_int32),
        ("n_threads", ctypes.c_int32),
        ("layers", ctypes.POINTER(CLayer)),
        ("norm", ctypes.c_void_p),
        ("head", CMatrix),
    )


def find_library() -> Library | None:
    """Load the compiled library, or return None if there is none for this machine or it is disabled."""
    if os.environ.get("LLMCTL_NATIVE") == "0":
        return None
    path = library_path()
    if not path.is_file() or exposed(path):  # it is code: who can write it can do whatever we can
        return None
    with suppress(OSError, AttributeError):
        return load_library(path)
    return None


def load_library(path: Path) -> Library:
    """Open a compiled library and declare its functions.

    Raises: OSError, AttributeError if it is not one of ours.
    """
    library = ctypes.CDLL(str(path))
    library.llmctl_step.restype = None
    pointers = [ctypes.c_void_p] * 2
    longs = ctypes.c_int64, ctypes.c_int64
    library.llmctl_step.argtypes = [
        ctypes.POINTER(CModel),
        ctypes.c_void_p,
        ctypes.c_int64,
        *pointers,
        *pointers,
        *longs,
        *pointers,
        ctypes.c_void_p,
    ]
    library.llmctl_unpack.restype = None
    library.llmctl_unpack.argtypes = [
        ctypes.POINTER(CMatrix),
        *longs,
        ctypes.c_int32,
        ctypes.c_int32,
        ctypes.c_void_p,
    ]
    return library


NAMED = (
    SIZES
    | CLASSIFIER
    | TOKEN_IDS
    | TRAINING
    | {
        *("norm_eps", "rope_theta", "rope_scaling_values", "attention_scale", "attention_windows"),
        *("embedding_scale", "tie_embeddings"),  # outside of the library: it takes embeddings and a head's weight
    }
)
"""Fields that decode.cpp supports with any value; all others must have their default, which is Llama's block."""
CHOICES = {"positions": ("rope", "none"), "rope_scaling": ("none", "linear", "llama3", "yarn", "longrope")}


def make_native(library: Library, decoder: Decoder) -> Native | None:
    """Return the compiled step of a decoder, or None for an unsupported model."""
    config = decoder.config
    if unsupported(config, NAMED, CHOICES) or config.d_ff % ROWS:
        return None
    step = Step(library, decoder)
    return step if step.is_whole else None


class Step:
    """A model in the library's structs: pointers into tensors, which this object keeps alive."""

    def __init__(self, library: Library, decoder: Decoder) -> None:
        self.library, self.decoder, self.config = library, decoder, decoder.config
        self.kept: list[Tensor] = []
        self.is_whole = True  # set to False by a matrix that the library does not support
        config = decoder.config
        layers = (CLayer * len(decoder.layers))()
        for index, layer in enumerate(decoder.layers):
            layers[index] = CLayer(
                self._matrix(layer.attention.qkv),
                self._matrix(layer.attention.out),
                self._matrix(layer.up),
                self._matrix(layer.down),
                self._numbers(layer.block.input_layernorm),
                self._numbers(layer.block.post_attention_layernorm),
                layer.block.window,
            )
        head: nn.Module = decoder.model.lm_head
        self.layers = layers
        self.model = CModel(
            len(layers),
            config.d_model,
            config.d_ff,
            config.n_heads,
            config.n_kv_heads,
            config.head_dim,
            config.norm_eps,
            config.attention_scale,
            0,
            1,
            layers,
            self._numbers(decoder.stack.norm),
            self._matrix(join([head])),
        )
        self.tables: tuple[Tensor, Tensor] | None = None
        self.table_size = 0

    def __call__(self, tokens_B: Tensor, cache: KVCache) -> Tensor | None:
        """Return the logits (B, V) after one more token per row, or None for unsupported inputs."""
        B, position = len(tokens_B), cache.length
        kind = KINDS.get(str(cache.keys[0].dtype).removeprefix("torch."))
        if B > MOST_ROWS or tokens_B.device.type != "cpu" or kind is None:
            return None
        scales = (cache.key_scales, cache.value_scales) if isinstance(cache, Int8KVCache) else ([], [])
        x_BD = self.decoder.model.embed(tokens_B).float().contiguous()  # the library works in float32
        logits_BV = torch.empty(B, self.config.vocab_size)
        # Set per call: the same model can be used with different caches and thread counts.
        self.model.cache_kind, self.model.n_threads = kind, torch.get_num_threads()
        cos, sin = self._rope(cache)
        self.library.llmctl_step(
            self.model,
            x_BD.data_ptr(),
            B,
            pointers_to(cache.keys),
            pointers_to(cache.values),
            *map(pointers_to, scales),
            cache.max_len,
            position,
            cos,
            sin,
            logits_BV.data_ptr(),
        )
        cache.advance(1)
        return logits_BV

    def _rope(self, cache: KVCache) -> tuple[int | None, int | None]:
        if self.config.positions != "rope":
            return None, None
        if self.tables is None or self.table_size != cache.max_len:
            self.table_size = cache.max_len
            # The two halves of a head's table are equal: the library needs only one.
            cos_SH, sin_SH = rope_tables(
                self.config, torch.arange(cache.max_len), rope_of(self.config, 0), cache.max_len
            )
            half = self.config.head_dim // 2
            self.tables = cos_SH[:, :half].contiguous(), sin_SH[:, :half].contiguous()
        offset = cache.length * (self.config.head_dim // 2) * 4  # bytes: the position's row of the float32 table
        return self.tables[0].data_ptr() + offset, self.tables[1].data_ptr() + offset

    def _numbers(self, norm: nn.Module) -> int:
        assert isinstance(norm.weight, Tensor)
        return self._keep(norm.weight.detach().float().contiguous())

    def _keep(self, tensor: Tensor) -> int:
        self.kept.append(tensor)
        return tensor.data_ptr()

    def _matrix(self, product: Callable[[Tensor], Tensor]) -> CMatrix:
        if isinstance(product, Dense):
            weight_OI = product.weight_OI.detach()
            name = str(weight_OI.dtype).removeprefix("torch.")
            is_supported = product.bias_O is None and len(weight_OI) >= ROWS
            if (
                is_supported
                and name in ("float32", "bfloat16")
                and weight_OI.is_contiguous()
                and weight_OI.device.type == "cpu"
            ):
                return CMatrix(KINDS[name], 0, *weight_OI.shape, self._keep(weight_OI), None, None)
        layer = getattr(product, "__self__", None)
        if isinstance(layer, QuantLinear) and layer.bias is None:
            return self._coded(layer)
        self.is_whole = False
        return CMatrix()

    def _coded(self, layer: QuantLinear) -> CMatrix:
        is_known = is_known_code(layer.scheme, layer.n_out, layer.n_in) and layer.has_bfloat16_scales
        if not is_known or not layer.weight_packed.is_contiguous():
            self.is_whole = False
            return CMatrix()
        return coded(layer, self.kept)


def is_known_code(scheme: Scheme, n_out: int, n_in: int) -> bool:
    """Tell whether the library supports a quantized weight."""
    is_int8 = scheme.bits == 8 and scheme.symmetric and not scheme.group
    has_groups = scheme.bits <= MOST_BITS and scheme.group in GROUPS and n_in % scheme.group == 0
    return (is_int8 or has_groups) and n_out >= ROWS and n_in % BLOCK == 0


def coded(layer: QuantWeight, kept: list[Tensor]) -> CMatrix:
    """Return a quantized weight as the library's struct; the tensors it points into are appended to `kept`.

    bfloat16 must represent the scales.
    """
    scheme, weight, zeros = layer.scheme, layer.weight_packed, None
    kind = "int8" if not scheme.group else "int4" if scheme.bits <= INT4_BITS else "bytes"
    if scheme.group and not (scheme.symmetric and scheme.bits == INT4_BITS):
        codes_OI, (_, zeros_OG) = layer.codes()
        zeros = zeros_OG.contiguous()
        if scheme.bits < INT4_BITS:
            weight = pack(codes_OI, INT4_BITS)
        elif scheme.bits > INT4_BITS:
            # One code per byte; in every block, the even inputs before the odd ones, in the order of 4-bit codes.
            weight = codes_OI.view(layer.n_out, -1, BLOCK // 2, 2).transpose(2, 3).contiguous()
    tensors = [weight, layer.weight_scale.bfloat16().contiguous(), zeros]
    kept += [tensor for tensor in tensors if tensor is not None]
    pointers = (tensor if tensor is None else tensor.data_ptr() for tensor in tensors)
    return CMatrix(KINDS[kind], scheme.group, layer.n_out, layer.n_in, *pointers)


def compiled_kinds(library: Library | None) -> dict[str, Kind]:
    """Return the product kind that dequantizes with the library, to bfloat16 if x has it or the CPU is fast with it.

    Empty without a library.
    """
    if library is None:
        return {}

    def make(layer: QuantWeight) -> Product:
        if not layer.has_bfloat16_scales:
            return unpacked(layer)
        kept: list[Tensor] = []
        matrix, n_rows = coded(layer, kept), rows_of(layer)

        def product(x: Tensor, _: list[Tensor] = kept) -> Tensor:
            is_narrow = x.dtype == torch.bfloat16 or is_native(torch.bfloat16)
            inputs = x.bfloat16() if is_narrow else x.float()
            outputs, threads = [], torch.get_num_threads()
            for first in range(0, layer.n_out, n_rows):
                last = min(first + n_rows, layer.n_out)
                weight_PI = torch.empty(last - first, layer.n_in, dtype=inputs.dtype)
                kind = KINDS["bfloat16" if is_narrow else "float32"]
                library.llmctl_unpack(matrix, first, last, threads, kind, weight_PI.data_ptr())
                outputs.append(F.linear(inputs, weight_PI))
            return torch.cat(outputs, dim=-1).to(x.dtype)

        return product

    def fits(scheme: Scheme, n_out: int, n_in: int) -> bool:
        return is_known_code(scheme, n_out, n_in) and not scheme.activations

    return {"compiled": Kind(make, fits)}


def pointers_to(tensors: list[Tensor]) -> Any:
    """Return a C array of the tensors' addresses."""
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])
