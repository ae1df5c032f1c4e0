"""Decoding steps and products of quantized weights in C++, in the library of the package or one compiled on this machine.

All decoding uses it, unless `LLMCTL_NATIVE=0`. It is optional: without it, decoding uses torch.
"""

import ctypes
import os
from collections.abc import Callable, Sequence, Sized
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmctl.files import exposed
from llmctl.kernels.build import source_hash
from llmctl.kernels.compile import COMPILED, PACKAGED, Library, library_path, packaged_path, verdict
from llmctl.losses.logits import is_native
from llmctl.model import decode
from llmctl.model.cache import Int8KVCache, KVCache
from llmctl.model.decode import Apart, Decoder, Dense, Layer, join
from llmctl.model.positions import rope_tables
from llmctl.model.stack import Block
from llmctl.model.supports import EXPERTS, unsupported
from llmctl.quant.linear import QuantLinear
from llmctl.quant.packing import pack
from llmctl.quant.products import Kind, Product, rows_of, unpacked
from llmctl.quant.schemes import GROUPS, Scheme
from llmctl.quant.weight import QuantWeight

MOST_ROWS = 64
"""The most rows (sequences) per step; for more, attention in torch is faster."""

READ_TOKENS = 512
"""Tokens of prompts that are processed together, so that their states stay in the CPU cache."""

BLOCK, TILE = 64, 32
"""Inputs that are quantized with one scale, and outputs that are stored together; as in matrix.h."""

INT4_BITS, MOST_BITS = 4, 6
"""Grouped codes up to the first width are stored two per byte, up to the second one per byte."""

KINDS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3, "bytes": 4}


class CMatrix(ctypes.Structure):
    """The struct `Matrix` of matrix.h."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("n_out", ctypes.c_int64),
        ("n_in", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("more", ctypes.c_void_p * 2),
        ("more_from", ctypes.c_int64 * 2),
    )


class CNorm(ctypes.Structure):
    """The struct `Norm` of decode.cpp."""

    _fields_ = (("kind", ctypes.c_int32), ("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p))


class CLayer(ctypes.Structure):
    """The struct `Layer` of decode.cpp."""

    _fields_ = (
        *((name, CMatrix) for name in ("qkv", "out", "up", "down", "cross_query", "cross_out")),
        *((name, CNorm) for name in ("attention", "mlp", "cross")),
        *((name, CNorm) for name in ("attention_output", "mlp_output", "cross_output")),
        *((name, CNorm) for name in ("attention_sum", "mlp_sum", "cross_sum")),
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
        ("layers", ctypes.POINTER(CLayer)),
        ("norm", CNorm),
        ("head", CMatrix),
    )


class CStep(ctypes.Structure):
    """The struct `Step` of decode.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n_rows", "n_places", "stop")),
        *((name, ctypes.c_void_p) for name in ("offsets", "starts")),
        *((name, ctypes.c_int32) for name in ("cache_kind", "memory_kind", "n_threads", "n_ropes")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "bias", "memory_keys", "memory_values")),
        ("n_memory", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("memory_lengths", "x", "logits")),
    )


def is_disabled() -> bool:
    """Tell whether the user does not want the library."""
    return os.environ.get("LLMCTL_NATIVE") == "0"


def find_library() -> Library | None:
    """Load the library that was checked on this machine, or return None if there is none or it is disabled."""
    if is_disabled():
        return None
    chosen = verdict()
    with suppress(OSError, AttributeError):
        if chosen == PACKAGED:
            return load_packaged()
        path = library_path()
        if chosen == COMPILED and path.is_file() and not exposed(path):  # it is code: its writers can do what we can
            return load_library(path)
    return None


def load_packaged() -> Library | None:
    """Load the library of the package, or return None if there is none or it is of other sources."""
    path = packaged_path()
    if not path.is_file():
        return None
    library = load_library(path)
    library.llmctl_source.restype = ctypes.c_char_p
    return library if library.llmctl_source().decode() == source_hash() else None


def variant_of(library: Library) -> str:
    """Return the instruction set that a library uses on this CPU; `native` if it is compiled for it."""
    library.llmctl_variant.restype = ctypes.c_char_p
    return str(library.llmctl_variant().decode())


def load_library(path: Path) -> Library:
    """Open a compiled library and declare its functions.

    Raises: OSError, AttributeError if it is not one of ours.
    """
    library = ctypes.CDLL(str(path))
    pointer, long, int_ = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    matrix = ctypes.POINTER(CMatrix)
    for name, kinds in {
        "step": [ctypes.POINTER(CModel), ctypes.POINTER(CStep)],
        "unpack": [matrix, long, long, int_, int_, pointer],
        "tiles": [matrix, int_, pointer, pointer, pointer],
        "product": [matrix, pointer, long, int_, pointer],
    }.items():
        function = getattr(library, f"llmctl_{name}")
        function.argtypes, function.restype = kinds, None
    return library


class Tiles:
    """Quantized weights in the library's order, each converted once however many use it."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.made: WeakKeyDictionary[QuantWeight, tuple[CMatrix, list[Tensor]]] = WeakKeyDictionary()

    def of(self, layer: QuantWeight) -> tuple[CMatrix, list[Tensor]]:
        """Return a weight as the library's struct, and the tensors it points into; bfloat16 must represent the scales."""
        if layer not in self.made:
            self.joined([layer])
        return self.made[layer]

    def joined(self, layers: Sequence[QuantWeight]) -> tuple[CMatrix, list[Tensor]]:
        """Return weights of one scheme as one, with concatenated outputs; all but the last fill their tiles."""
        kept: list[Tensor] = []
        sources = [coded(layer, kept) for layer in layers]
        first, n_in = sources[0], layers[0].n_in
        starts = [sum(layer.n_out for layer in layers[:index]) for index in range(len(layers) + 1)]
        n_groups, n_out = layers[0].scheme.n_groups(n_in), -(-starts[-1] // TILE) * TILE
        n_bytes = n_in // 2 if first.kind == KINDS["int4"] else n_in
        # Zeros in the last tile: what no output has is multiplied too.
        make = torch.empty if n_out == starts[-1] else torch.zeros
        codes = make(n_out, n_bytes, dtype=torch.uint8)
        scales = make(n_out, n_groups, dtype=torch.bfloat16)
        zeros = make(n_out, n_groups if first.zero else 0, dtype=torch.uint8)
        parts = [codes, scales, zeros]

        def matrix(start: int, n_out: int) -> CMatrix:
            pointers = [part[start:].data_ptr() if part.numel() else None for part in parts]
            return CMatrix(first.kind, first.group, n_out, n_in, *pointers)

        for layer, source, start in zip(layers, sources, starts, strict=False):
            own = matrix(start, layer.n_out)
            self.library.llmctl_tiles(source, torch.get_num_threads(), own.weight, own.scale, own.zero)
            self.made[layer] = own, parts
        return matrix(0, starts[-1]), parts


NAMED = decode.NAMED - EXPERTS - {"head_transform"}
CHOICES = decode.CHOICES
"""What decode.cpp supports: what `Decoder` does, but for mixtures of experts and a transformed head."""

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
PARALLEL = ("none", "shared", "separate")
HEAD_NORMS = {"head": 1, "rotated": 2, "width": 3}


def make_native(library: Library, decoder: Decoder, tiles: Tiles | None = None) -> "Step | None":
    """Return the compiled step of a decoder, or None for an unsupported model."""
    if unsupported(decoder.config, NAMED, CHOICES):
        return None
    step = Step(library, decoder, tiles or Tiles(library))
    return step if step.is_whole else None


class Step:
    """A model in the library's structs: pointers into tensors, which this object keeps alive."""

    def __init__(self, library: Library, decoder: Decoder, tiles: Tiles) -> None:
        self.library, self.decoder, self.config, self.tiles = library, decoder, decoder.config, tiles
        self.kept: list[Tensor] = []
        self.is_whole = True  # set to False by what the library does not support
        self.reads = decoder.config.family == "decoder"  # prompts too; set to False by a weight that is not quantized
        config = decoder.config
        self.singles = torch.arange(MOST_ROWS + 1)
        is_plain = config.positions not in ("learned", "sinusoidal")
        self.places_embeddings = not is_plain or config.embedding_norm or config.n_token_types > 0
        self.kinds = sorted(decoder.rope_kinds)
        self.rotated = config.rotary_dim or config.head_dim
        layers = (CLayer * len(decoder.layers))()
        for index, layer in enumerate(decoder.layers):
            layers[index] = self._layer(layer)
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
            layers,
            self._norm(decoder.stack.norm, config.logits_scale) if config.norm_position != "post" else CNorm(),
            self._matrix(join([head])),
        )
        # Without a final norm, nothing carries the factor on the states before the head.
        self.is_whole &= config.norm_position != "post" or config.logits_scale == 1.0
        self.tables: list[tuple[Tensor, Tensor]] = []
        self.biases: list[Tensor | None] = []
        self.table_size = 0
        self.memory: tuple[Tensor, Tensor] | None = None

    def __call__(self, tokens_B: Tensor, cache: KVCache, memory_documents_BS: Tensor | None = None) -> Tensor | None:
        """Return the logits (B, V) after one more token per row, or None for unsupported inputs."""
        starts_B = self._starts(tokens_B, cache)
        if starts_B is None:
            return None
        memory = self._memory(cache, memory_documents_BS, len(tokens_B))
        if memory is None:
            return None
        logits_BV = torch.empty(len(tokens_B), self.config.vocab_size)
        positions_B = cache.length - starts_B if self.places_embeddings else starts_B
        self._run(tokens_B, self.singles, positions_B, 1, starts_B, cache, logits_BV, memory)
        return logits_BV

    def read(self, ids_BT: Tensor, cache: KVCache, documents_BT: Tensor | None, *, is_last: bool) -> Tensor | None:
        """Append T tokens per row, of which padding has document 0.

        Returns the logits after the last ones (B, V) if `is_last`, else an empty tensor, and None for unsupported inputs,
        which are left as they are.
        """
        if not self.reads or len(ids_BT) > READ_TOKENS:
            return None
        (B, T), first = ids_BT.shape, cache.length
        documents_BS = cache.documents_BS.clone(), cache.ragged
        cache.mark(T, documents_BT)
        starts_B = self._starts(ids_BT[:, 0], cache, T)
        if starts_B is None or (is_last and bool((starts_B == first + T).any())):  # a row without a token has no logits
            cache.documents_BS, cache.ragged = documents_BS
            return None
        logits_BV = torch.empty(B, self.config.vocab_size) if is_last else torch.empty(0)
        size = max(1, READ_TOKENS // B)
        for start in range(0, T, size):
            stop = min(T, start + size)
            places_T = torch.arange(first + start, first + stop)
            is_token_BT = places_T >= starts_B[:, None]
            tokens_N, positions_N = ids_BT[:, start:stop][is_token_BT], (places_T - starts_B[:, None])[is_token_BT]
            offsets_B = F.pad(is_token_BT.sum(dim=1).cumsum(0), (1, 0))
            wanted = logits_BV if is_last and stop == T else None
            self._run(tokens_N, offsets_B, positions_N, stop - start, starts_B, cache, wanted, {})
        return logits_BV

    def _starts(self, tokens_B: Tensor, cache: KVCache, n_new: int = 0) -> Tensor | None:
        """Return the first place of every row, or None for what the library does not support."""
        is_known = str(cache.keys[0].dtype).removeprefix("torch.") in KINDS
        if len(tokens_B) > MOST_ROWS or tokens_B.device.type != "cpu" or not is_known:
            return None
        return cache.starts(n_new)

    def _run(
        self,
        tokens_N: Tensor,
        offsets_B: Tensor,
        positions_N: Tensor,
        n_places: int,
        starts_B: Tensor,
        cache: KVCache,
        logits_BV: Tensor | None,
        memory: dict[str, Any],
    ) -> None:
        """Append tokens to the next places of the cache; offsets: where each row's tokens begin among them."""
        scales = (cache.key_scales, cache.value_scales) if isinstance(cache, Int8KVCache) else ([], [])
        x_ND = self._embed(tokens_N, positions_N).float().contiguous()  # the library works in float32
        if self.table_size != cache.max_len:
            self._tabulate(cache.max_len)
        buffers = {
            "keys": cache.keys,
            "values": cache.values,
            "key_scales": scales[0],
            "value_scales": scales[1],
            "cos": [cos for cos, _ in self.tables],
            "sin": [sin for _, sin in self.tables],
            "bias": self.biases,
            **memory.get("buffers", {}),
        }
        pointers = {name: pointers_to(tensors) for name, tensors in buffers.items()}
        step = CStep(
            n_rows=len(starts_B),
            n_places=cache.max_len,
            stop=cache.length + n_places,
            offsets=offsets_B.data_ptr(),
            starts=starts_B.data_ptr(),
            cache_kind=KINDS[str(cache.keys[0].dtype).removeprefix("torch.")],
            n_threads=torch.get_num_threads(),
            n_ropes=len(self.tables),
            x=x_ND.data_ptr(),
            logits=None if logits_BV is None else logits_BV.data_ptr(),
            **{name: ctypes.addressof(array) for name, array in pointers.items()},
            **memory.get("sizes", {}),
        )
        self.library.llmctl_step(self.model, step)
        cache.advance(n_places)

    def _embed(self, tokens_N: Tensor, positions_N: Tensor) -> Tensor:
        """Return what the first layer reads (N, D)."""
        x_ND = self.decoder.model.embed(tokens_N)
        if not self.places_embeddings:
            return x_ND
        return self.decoder.stack.embed(x_ND[:, None], positions_N[:, None], None)[:, 0]

    def _memory(self, cache: KVCache, documents_BS: Tensor | None, n_rows: int) -> dict[str, Any] | None:
        """Return the fields of the encoder's output, or None if a row is empty or has other padding than at its end."""
        if self.config.family == "decoder":
            return {}
        pairs = [pair for pair in cache.cross if pair is not None]
        name = str(pairs[0][0].dtype).removeprefix("torch.") if pairs else ""
        if len(pairs) < len(cache.cross) or name not in ("float32", "bfloat16"):
            return None
        cache.cross[:] = pairs = [(keys.contiguous(), values.contiguous()) for keys, values in pairs]
        S = pairs[0][0].shape[2]
        if documents_BS is None:
            lengths_B = torch.full((n_rows,), S)
        elif self.memory is not None and self.memory[0] is documents_BS:  # the same tensor in all steps of a batch
            lengths_B = self.memory[1]
        else:
            lengths_B = (documents_BS != 0).sum(dim=1)
            expected_BS = (torch.arange(S) < lengths_B[:, None]).long()
            if not lengths_B.all() or not torch.equal(documents_BS, expected_BS):
                return None
            self.memory = documents_BS, lengths_B
        return {
            "buffers": {"memory_keys": [keys for keys, _ in pairs], "memory_values": [values for _, values in pairs]},
            "sizes": {"memory_kind": KINDS[name], "n_memory": S, "memory_lengths": lengths_B.data_ptr()},
            "kept": lengths_B,  # as long as its address
        }

    def _tabulate(self, n_positions: int) -> None:
        """Compute what depends on positions only: cosines and sines by kind, and what is added to scores by layer."""
        half, self.table_size = self.rotated // 2, n_positions
        self.tables = []
        for kind in self.kinds:
            cos_SR, sin_SR = rope_tables(self.config, torch.arange(n_positions), kind, n_positions)
            # The two halves of a head's table are equal: the library needs only one.
            self.tables.append((cos_SR[:, :half].contiguous(), sin_SR[:, :half].contiguous()))
        self.biases = []
        for layer in self.decoder.layers:
            bias_NS = self.decoder.stack.bias_by_distance(layer.block, n_positions)
            self.biases.append(None if bias_NS is None else bias_NS.float().contiguous())

    def _layer(self, layer: Layer) -> CLayer:
        block, kind, cross = layer.block, layer.block.rope, layer.cross
        if cross is not None:
            config = self.config
            self.is_whole &= not (config.qk_norm or config.attention_softcap or (block.before and block.within))
        return CLayer(
            self._matrix(layer.attention.qkv),
            self._matrix(layer.attention.out),
            self._matrix(layer.up),
            self._matrix(layer.down),
            CMatrix() if cross is None else self._matrix(cross.query),
            CMatrix() if cross is None else self._matrix(cross.out),
            *self._norms(block),
            block.window,
            self.kinds.index(kind) if kind in self.kinds else -1,
        )

    def _norms(self, block: Block) -> tuple[CNorm, ...]:
        """Return the norms of a layer in the order of the struct."""
        none, attention = CNorm(), block.self_attn
        first = self._norm(block.input_layernorm)
        second = self._norm(block.post_attention_layernorm) if block.parallel != "shared" else none
        both: tuple[CNorm, ...] = (first, second, self._norm(block.cross_attention_layernorm) if block.cross else none)
        nothing: tuple[CNorm, ...] = (none, none, none)
        output = both if block.within and not block.before else nothing
        if block.before and block.within:
            norms = block.attention_output_layernorm, block.mlp_output_layernorm
            output = (*(self._norm(norm) for norm in norms), none)
        heads = (self._norm(attention.q_norm), self._norm(attention.k_norm)) if attention.qk_norm else (none, none)
        return (*(both if block.before else nothing), *output, *(both if block.after else nothing), *heads)

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
        parts = product.layers if isinstance(product, Apart) else [getattr(product, "__self__", product)]
        floats = [part for part in parts if isinstance(part, Dense | nn.Linear)]
        coded = [part for part in parts if isinstance(part, QuantLinear)]
        # A tile's outputs are of one part.
        is_even = all(len(bare(part)) % TILE == 0 for part in floats[:-1]) if floats else True
        is_even &= all(part.n_out % TILE == 0 for part in coded[:-1])
        if len(floats) == len(parts) and is_even and (matrix := self._floats(floats)):
            return matrix
        if len(coded) == len(parts) and is_even and (matrix := self._codes(coded)):
            return matrix
        self.is_whole = False
        return CMatrix()

    def _floats(self, parts: "Sequence[Dense | nn.Linear]") -> CMatrix | None:
        """Return weights in floats with the same input as one, or None."""
        weights = [bare(part) for part in parts]
        name = str(weights[0].dtype).removeprefix("torch.")
        is_known = all(weight.is_contiguous() and weight.device.type == "cpu" for weight in weights)
        if name not in ("float32", "bfloat16") or not is_known or len({weight.dtype for weight in weights}) > 1:
            return None
        self.reads = False  # torch is faster with many rows of floats
        n_out, n_in = sum(map(len, weights)), weights[0].shape[1]
        biases = [part.bias_O if isinstance(part, Dense) else part.bias for part in parts]
        matrix = CMatrix(KINDS[name], 0, n_out, n_in, self._keep(weights[0]), None, None, self._bias(biases, weights))
        for index, weight in enumerate(weights[1:]):
            matrix.more[index] = self._keep(weight)
            matrix.more_from[index] = sum(map(len, weights[: index + 1]))
        return matrix

    def _codes(self, layers: Sequence[QuantLinear]) -> CMatrix | None:
        """Return quantized weights with the same input as one, or None."""
        is_known = all(is_known_code(layer.scheme, layer.n_in) and layer.has_bfloat16_scales for layer in layers)
        is_known &= all(layer.weight_packed.device.type == "cpu" for layer in layers)
        if not is_known or len({layer.scheme for layer in layers}) > 1:
            return None
        tiled, tensors = self.tiles.of(layers[0]) if len(layers) == 1 else self.tiles.joined(layers)
        matrix = type(tiled).from_buffer_copy(tiled)
        self.kept += tensors
        matrix.bias = self._bias([layer.bias for layer in layers], [range(layer.n_out) for layer in layers])
        return matrix

    def _bias(self, biases: Sequence[Tensor | None], outputs: Sequence[Sized]) -> int | None:
        """Return the address of concatenated biases; a part without one has zeros."""
        if all(bias_O is None for bias_O in biases):
            return None
        parts = [
            torch.zeros(len(own)) if bias_O is None else bias_O.detach().float()
            for bias_O, own in zip(biases, outputs, strict=True)
        ]
        return self._keep(torch.cat(parts))


def bare(part: "Dense | nn.Linear") -> Tensor:
    """Return a layer's weight (O, I)."""
    return (part.weight_OI if isinstance(part, Dense) else part.weight).detach()


def is_known_code(scheme: Scheme, n_in: int) -> bool:
    """Tell whether the library supports a quantized weight."""
    is_int8 = scheme.bits == 8 and scheme.symmetric and not scheme.group
    has_groups = scheme.bits <= MOST_BITS and scheme.group in GROUPS and n_in % scheme.group == 0
    return (is_int8 or has_groups) and n_in % BLOCK == 0


def coded(layer: QuantWeight, kept: list[Tensor]) -> CMatrix:
    """Return a quantized weight as the library's struct, row by row; the tensors it points into are appended to `kept`.

    bfloat16 must represent the scales.
    """
    scheme, weight, zeros = layer.scheme, layer.weight_packed.contiguous(), None
    kind = "int8" if not scheme.group else "int4" if scheme.bits <= INT4_BITS else "bytes"
    if scheme.group and not (scheme.symmetric and scheme.bits == INT4_BITS):
        zeros = layer.zeros()
        if scheme.bits != INT4_BITS:
            codes_OI = layer.codes().codes_OI
            weight = pack(codes_OI, INT4_BITS) if scheme.bits < INT4_BITS else codes_OI.contiguous()
    tensors = [weight, layer.weight_scale.bfloat16().contiguous(), zeros]
    kept += [tensor for tensor in tensors if tensor is not None]
    pointers = (tensor if tensor is None else tensor.data_ptr() for tensor in tensors)
    return CMatrix(KINDS[kind], scheme.group, layer.n_out, layer.n_in, *pointers)


def compiled_kinds(tiles: Tiles | None) -> dict[str, Kind]:
    """Return the kinds of products that use the library; empty without one.

    `integers` multiplies codes by inputs that are rounded to 8 bits. `compiled` dequantizes, to bfloat16 if x has it or
    the CPU is fast with it.
    """
    if tiles is None:
        return {}
    library = tiles.library

    def integers(layer: QuantWeight) -> Product:
        if not layer.has_bfloat16_scales:
            return unpacked(layer)
        matrix, tensors = tiles.of(layer)

        def product(x: Tensor, _: list[Tensor] = tensors) -> Tensor:
            rows_BI = x.reshape(-1, layer.n_in).float().contiguous()
            y_BO = torch.empty(len(rows_BI), layer.n_out)
            library.llmctl_product(matrix, rows_BI.data_ptr(), len(rows_BI), torch.get_num_threads(), y_BO.data_ptr())
            return y_BO.to(x.dtype).view(*x.shape[:-1], layer.n_out)

        return product

    def dequantized(layer: QuantWeight) -> Product:
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

    return {
        "integers": Kind(integers, lambda scheme, _, n_in: is_known_code(scheme, n_in)),
        "compiled": Kind(dequantized, lambda scheme, _, n_in: is_known_code(scheme, n_in) and not scheme.activations),
    }


def pointers_to(tensors: Sequence[Tensor | None]) -> Any:
    """Return a C array of the tensors' addresses."""
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    return (ctypes.c_void_p * max(1, len(addresses)))(*addresses)
