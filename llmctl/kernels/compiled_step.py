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
from llmctl.model import decode
from llmctl.model.cache import Int8KVCache, KVCache
from llmctl.model.decode import Decoder, Dense, Native, join
from llmctl.model.positions import alibi_slopes, rope_tables
from llmctl.model.stack import Block
from llmctl.model.supports import EXPERTS, unsupported
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
        ("bias", ctypes.c_void_p),
    )


class CNorm(ctypes.Structure):
    """The struct `Norm` of decode.cpp."""

    _fields_ = (("kind", ctypes.c_int32), ("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p))


class CLayer(ctypes.Structure):
    """The struct `Layer` of decode.cpp."""

    _fields_ = (
        ("qkv", CMatrix),
        ("out", CMatrix),
        ("up", CMatrix),
        ("down", CMatrix),
        *((name, CNorm) for name in ("attention", "mlp", "attention_output", "mlp_output", "attention_sum", "mlp_sum")),
        *((name, CNorm) for name in ("query", "key")),
        ("window", ctypes.c_int64),
        ("rope", ctypes.c_int64),
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
        ("rotated", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("eps", "scale", "residual_scale", "softcap", "logits_softcap")),
        *((name, ctypes.c_int32) for name in ("activation", "gated", "parallel", "head_norm")),
        ("cache_kind", ctypes.c_int32),
        ("n_threads", ctypes.c_int32),
        ("layers", ctypes.POINTER(CLayer)),
        ("slopes", ctypes.c_void_p),
        ("norm", CNorm),
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


NAMED = decode.NAMED - EXPERTS - {"head_transform"}
CHOICES = decode.CHOICES | {"family": ("decoder",)}
"""What decode.cpp supports: decoders that `Decoder` does, but for mixtures of experts and a transformed head."""

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
PARALLEL = ("none", "shared", "separate")
HEAD_NORMS = {"head": 1, "rotated": 2, "width": 3}


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
        self.kinds = sorted(decoder.rope_kinds)
        self.rotated = config.rotary_dim or config.head_dim
        layers = (CLayer * len(decoder.layers))()
        for index, layer in enumerate(decoder.layers):
            kind = layer.block.rope
            layers[index] = CLayer(
                self._matrix(layer.attention.qkv),
                self._matrix(layer.attention.out),
                self._matrix(layer.up),
                self._matrix(layer.down),
                *self._norms(layer.block),
                layer.block.window,
                self.kinds.index(kind) if kind in self.kinds else -1,
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
            self.rotated,
            config.norm_eps,
            config.attention_scale,
            config.residual_scale,
            config.attention_softcap,
            config.logits_softcap,
            ACTIVATIONS.index(config.activation),
            config.gated,
            PARALLEL.index(config.parallel),
            HEAD_NORMS[config.qk_norm_kind] if config.qk_norm else 0,
            0,
            1,
            layers,
            self._keep(alibi_slopes(config.n_heads) * config.alibi_scale) if config.positions == "alibi" else None,
            self._norm(decoder.stack.norm, config.logits_scale) if config.norm_position != "post" else CNorm(),
            self._matrix(join([head])),
        )
        # Without a final norm, nothing carries the factor on the states before the head.
        self.is_whole &= config.norm_position != "post" or config.logits_scale == 1.0
        self.tables: list[tuple[Tensor, Tensor]] = []
        self.table_size = 0

    def __call__(self, tokens_B: Tensor, cache: KVCache) -> Tensor | None:
        """Return the logits (B, V) after one more token per row, or None for unsupported inputs."""
        B, position = len(tokens_B), cache.length
        kind = KINDS.get(str(cache.keys[0].dtype).removeprefix("torch."))
        if B > MOST_ROWS or tokens_B.device.type != "cpu" or kind is None:
            return None
        scales = (cache.key_scales, cache.value_scales) if isinstance(cache, Int8KVCache) else ([], [])
        x_BD = self._embed(tokens_B, position).float().contiguous()  # the library works in float32
        logits_BV = torch.empty(B, self.config.vocab_size)
        # Set per call: the same model can be used with different caches and thread counts.
        self.model.cache_kind, self.model.n_threads = kind, torch.get_num_threads()
        cos, sin = self._ropes(cache)
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

    def _embed(self, tokens_B: Tensor, position: int) -> Tensor:
        """Return what the first layer reads (B, D)."""
        config, stack = self.config, self.decoder.stack
        x_BD = self.decoder.model.embed(tokens_B)
        if config.positions in ("rope", "alibi", "none") and not (config.embedding_norm or config.n_token_types):
            return x_BD
        return stack.embed(x_BD[:, None], torch.full((1, 1), position), None)[:, 0]

    def _ropes(self, cache: KVCache) -> tuple[Any, Any]:
        """Return the addresses of the position's cosines and sines, R/2 of each, by kind."""
        half = self.rotated // 2
        if self.table_size != cache.max_len:
            self.table_size = cache.max_len
            self.tables = []
            for kind in self.kinds:
                cos_SR, sin_SR = rope_tables(self.config, torch.arange(cache.max_len), kind, cache.max_len)
                # The two halves of a head's table are equal: the library needs only one.
                self.tables.append((cos_SR[:, :half].contiguous(), sin_SR[:, :half].contiguous()))
        offset = cache.length * half * 4  # bytes: the position's row of the float32 table
        addresses = [[table.data_ptr() + offset for table in tables] for tables in zip(*self.tables, strict=True)]
        both = addresses or [[], []]
        kind_ = ctypes.c_void_p * max(1, len(self.kinds))
        return kind_(*both[0]), kind_(*both[1])

    def _norms(self, block: Block) -> tuple[CNorm, ...]:
        """Return the norms of a layer in the order of the struct."""
        none, attention = CNorm(), block.self_attn
        first = self._norm(block.input_layernorm)
        second = self._norm(block.post_attention_layernorm) if block.parallel != "shared" else none
        before = (first, second) if block.before else (none, none)
        after = (first, second) if block.after else (none, none)
        output = (first, second) if block.within and not block.before else (none, none)
        if block.before and block.within:
            output = self._norm(block.attention_output_layernorm), self._norm(block.mlp_output_layernorm)
        heads = (self._norm(attention.q_norm), self._norm(attention.k_norm)) if attention.qk_norm else (none, none)
        return (*before, *output, *after, *heads)

    def _norm(self, norm: Any, factor: float = 1.0) -> CNorm:
        """Return a norm, its output multiplied by a factor."""
        if isinstance(norm, nn.Identity):
            return CNorm()
        kind = 2 if isinstance(norm, nn.LayerNorm) else 1
        weight, bias = norm.weight, getattr(norm, "bias", None)
        if factor != 1.0 and weight is None:
            weight = torch.ones(norm.normalized_shape)
        numbers = [
            None if part is None else self._keep((part.detach().float() * factor).contiguous())
            for part in (weight, bias)
        ]
        return CNorm(kind, *numbers)

    def _keep(self, tensor: Tensor) -> int:
        self.kept.append(tensor)
        return tensor.data_ptr()

    def _matrix(self, product: Callable[[Tensor], Tensor]) -> CMatrix:
        if isinstance(product, Dense):
            weight_OI = product.weight_OI.detach()
            name = str(weight_OI.dtype).removeprefix("torch.")
            is_supported = len(weight_OI) >= ROWS
            if (
                is_supported
                and name in ("float32", "bfloat16")
                and weight_OI.is_contiguous()
                and weight_OI.device.type == "cpu"
            ):
                bias = self._bias(product.bias_O)
                return CMatrix(KINDS[name], 0, *weight_OI.shape, self._keep(weight_OI), None, None, bias)
        layer = getattr(product, "__self__", None)
        if isinstance(layer, QuantLinear):
            return self._coded(layer)
        self.is_whole = False
        return CMatrix()

    def _coded(self, layer: QuantLinear) -> CMatrix:
        is_known = is_known_code(layer.scheme, layer.n_out, layer.n_in) and layer.has_bfloat16_scales
        if not is_known or not layer.weight_packed.is_contiguous():
            self.is_whole = False
            return CMatrix()
        matrix = coded(layer, self.kept)
        matrix.bias = self._bias(layer.bias)
        return matrix

    def _bias(self, bias_O: Tensor | None) -> int | None:
        return None if bias_O is None else self._keep(bias_O.detach().float().contiguous())


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
