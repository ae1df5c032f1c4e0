"""Cached decoding with as few torch operations per token as possible; same results as `LanguageModel.hidden`.

In a small model, a token's time goes into operator calls, not arithmetic. So query, key and value use one fused
product, gate and up another, and rotary tables are cached. Fused weights are moved, not copied: the model's own layers
become views of them and keep working. Knows nothing about sampling.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmctl.config import ModelConfig
from llmctl.model.attention import Attention, Mask, attend
from llmctl.model.cache import Int8KVCache, KVCache
from llmctl.model.positions import RopeKind, rope_tables
from llmctl.model.stack import ACTIVATIONS, Block, Experts, MaskKey, Stack
from llmctl.model.supports import BLOCK, BLOCK_CHOICES, EXPERTS, unsupported
from llmctl.model.transformer import LanguageModel
from llmctl.quant.joined import join_quantized
from llmctl.quant.linear import QuantLinear

Function = Callable[[Tensor], Tensor]
Rope = tuple[Tensor, Tensor]


class Native(Protocol):
    """A compiled step; its methods return None for cases that it does not support."""

    def __call__(self, tokens_B: Tensor, cache: KVCache, memory_documents_BS: Tensor | None, /) -> Tensor | None:
        """Append one token per row and return the logits of the next one (B, V)."""

    def read(self, ids_BT: Tensor, cache: KVCache, documents_BT: Tensor | None, *, is_last: bool) -> Tensor | None:
        """Append a part of prompts; return the logits of the next token (B, V) if `is_last`, else an empty tensor."""


FEW_QUERIES = 3
"""Query heads per key head below which half-precision attention on a CPU is computed in float32.

With one head, torch's bfloat16 kernel takes five times as long as converting all keys and values and multiplying in
float32; from three on the bfloat16 kernel is faster (measured).
"""


NAMED = BLOCK | {
    *(
        "relative_bias_per_layer",
        "rope_thetas",
        "rotary_dim",
        "rope_scaling_values",
        "residual_scale",
        "logits_softcap",
    ),
    *("attention_softcap", "qk_norm_kind", "alibi_scale"),
    *EXPERTS,
    "source_vocab_size",
}
CHOICES = BLOCK_CHOICES | {
    "query_layer": (False,),
    "family": ("decoder", "encoder_decoder"),
    "positions": ("rope", "learned", "sinusoidal", "alibi", "relative", "none"),
    "norm_position": ("pre", "post", "output", "both"),
    "rope_scaling": ("none", "linear", "llama3", "yarn", "longrope"),
    "rope_scaling_layers": ("all", "full"),
    "sinusoid_rates": ("interleaved", "halves"),
    "parallel": ("none", "shared", "separate"),
    "activation": ("silu", "gelu", "gelu_tanh", "relu", "relu2"),
    **dict.fromkeys(("attention_output_bias", "mlp_output_bias"), ("same", "yes", "no")),
    **dict.fromkeys(("norm_weight", "norm_bias", "first_norm", "head_transform_bias"), (False, True)),
}
"""The settings that `Layer` and `Decoder` implement; a model with any other uses `LanguageModel.hidden`."""


def covers(config: ModelConfig) -> bool:
    """Tell whether `Decoder` supports a model; others use `LanguageModel.hidden`."""
    return not unsupported(config, NAMED, CHOICES)


@dataclass(frozen=True)
class Step:
    """The inputs that all layers share while T positions are decoded.

    masks: by `Block.mask_key`; None when decoding one position of unpadded rows, which attend to a contiguous range of
    the cache. ropes: by `Block.rope`: cosines and signed sines (B or 1, T, 1, R).
    """

    cache: KVCache
    masks: dict[MaskKey, Mask] | None
    ropes: dict[RopeKind, Rope]
    memory_BSD: Tensor | None
    memory_mask: Mask | None


class Decoder:
    """A model's decoder, prepared for token-by-token generation.

    It takes over the model's weights, so the model must not be trained any more. fuses: whether projections of the same
    input become one product; a compiled step does not need that, and weights stay where they were loaded.
    """

    def __init__(self, model: LanguageModel, *, fuses: bool = True) -> None:
        assert covers(model.config)
        self.model, self.config = model, model.config
        self.stack: Stack = model.stacks()[-1]
        # The fused weights replace the model's parameters; as inference tensors they could not be used in autograd.
        with torch.inference_mode(mode=False), torch.no_grad():
            self.layers = [Layer(block, join if fuses else apart) for block in self.stack.layers]
        self.norm = norm_of(self.stack.norm) if model.config.norm_position != "post" else None
        rotates = self.config.positions == "rope"
        self.rope_kinds = {layer.block.rope for layer in self.layers if rotates and layer.block.rope[0]}
        # Computed for the whole cache once, then only sliced per token: kind -> (cosines, signed sines).
        self.tables: dict[RopeKind, Rope] = {}
        self.table_size: tuple[int, torch.dtype] | None = None
        self.native: Native | None = None

    def logits(
        self,
        tokens_B: Tensor,
        cache: KVCache,
        positions_B1: Tensor | None = None,
        memory_documents_BS: Tensor | None = None,
    ) -> Tensor:
        """Append one token per row and return the logits of the next one (B, V)."""
        if self.native is not None:
            logits_BV = self.native(tokens_B, cache, memory_documents_BS)
            if logits_BV is not None:
                return logits_BV
        hidden_BTD = self.hidden(
            tokens_B[:, None], cache, positions_BT=positions_B1, memory_documents_BS=memory_documents_BS
        )
        return self.model.head(hidden_BTD[:, -1])

    def read(
        self,
        ids_BT: Tensor,
        cache: KVCache,
        *,
        positions_BT: Tensor | None,
        documents_BT: Tensor | None,
        is_last: bool,
    ) -> Tensor:
        """Append a part of prompts; return the logits of the next token (B, V) if `is_last`, else an empty tensor."""
        if self.native is not None:
            logits_BV = self.native.read(ids_BT, cache, documents_BT, is_last=is_last)
            if logits_BV is not None:
                return logits_BV
        hidden_BTD = self.hidden(ids_BT, cache, positions_BT=positions_BT, documents_BT=documents_BT)
        return self.model.head(hidden_BTD[:, -1]) if is_last else hidden_BTD.new_empty(0)

    def hidden(
        self,
        ids_BT: Tensor,
        cache: KVCache,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        memory_BSD: Tensor | None = None,
        memory_documents_BS: Tensor | None = None,
    ) -> Tensor:
        """Return the last hidden states (B, T, D), like `LanguageModel.hidden` or, with an encoder, `decode`."""
        T = ids_BT.shape[1]
        documents_BS = cache.mark(T, documents_BT)
        x_BTD = self.model.embed(ids_BT)
        if documents_BS is None:
            positions_BT = None  # without padding, all rows are at the same position
        elif positions_BT is None:
            positions_BT = self.stack.positions(x_BTD, documents_BS, cache)
        # Rotary models without these add nothing to the token embeddings: the module call is skipped.
        if self.config.positions != "rope" or self.config.embedding_norm or self.config.n_token_types:
            embedded_BT = self.stack.positions(x_BTD, None, cache) if positions_BT is None else positions_BT
            x_BTD = self.stack.embed(x_BTD, embedded_BT, None)
        step = self._step(x_BTD, documents_BS, positions_BT, cache, memory_BSD, memory_documents_BS)
        for layer in self.layers:
            x_BTD = layer(x_BTD, step)
        cache.advance(T)
        return x_BTD if self.norm is None else self.norm(x_BTD)

    def _step(
        self,
        x_BTD: Tensor,
        documents_BS: Tensor | None,
        positions_BT: Tensor | None,
        cache: KVCache,
        memory_BSD: Tensor | None,
        memory_documents_BS: Tensor | None,
    ) -> Step:
        T = x_BTD.shape[1]
        ropes = self._ropes(positions_BT, T, cache, x_BTD.dtype)
        # The common case of generation: no mask at all.
        has_bias = self.config.positions in ("alibi", "relative")
        if T == 1 and documents_BS is None and memory_documents_BS is None and not has_bias:
            return Step(cache, None, ropes, memory_BSD, Mask())
        masks, memory_mask = self.stack.masks(x_BTD, documents_BS, memory_BSD, memory_documents_BS, cache)
        return Step(cache, masks, ropes, memory_BSD, memory_mask)

    def _ropes(
        self, positions_BT: Tensor | None, n_positions: int, cache: KVCache, dtype: torch.dtype
    ) -> dict[RopeKind, Rope]:
        if self.rope_kinds and self.table_size != (cache.max_len, dtype):
            self.table_size = cache.max_len, dtype
            all_S = torch.arange(cache.max_len, device=cache.documents_BS.device)
            for kind in self.rope_kinds:
                cos_SR, sin_SR = rope_tables(self.config, all_S, kind, cache.max_len)
                sin_SR[:, : sin_SR.shape[1] // 2].neg_()  # see SelfAttention: the sign of the rotated first half
                self.tables[kind] = cos_SR[:, None].to(dtype), sin_SR[:, None].to(dtype)
        if positions_BT is None:
            start = cache.length
            return {
                kind: (cos_S1R.narrow(0, start, n_positions), sin_S1R.narrow(0, start, n_positions))
                for kind, (cos_S1R, sin_S1R) in self.tables.items()
            }
        return {
            kind: (cos_S1R[positions_BT], sin_S1R[positions_BT]) for kind, (cos_S1R, sin_S1R) in self.tables.items()
        }


class Layer:
    """One transformer block; `join` makes one function of projections with the same input."""

    def __init__(self, block: Block, join: "Joiner") -> None:
        self.block = block
        self.attention = SelfAttention(block, join)
        self.cross = CrossAttention(block.cross_attn, block.layer) if block.cross else None
        self.plain_pre = block.before and not block.within and block.scale == 1.0 and block.parallel == "none"
        self.norms = [norm_of(block.input_layernorm)]
        if block.parallel != "shared":
            self.norms.append(norm_of(block.post_attention_layernorm))
        if block.before and block.within:
            self.output_norms = [norm_of(block.attention_output_layernorm), norm_of(block.mlp_output_layernorm)]
        self.cross_norm = norm_of(block.cross_attention_layernorm) if block.cross else None
        mlp = block.mlp
        self.experts = mlp if isinstance(mlp, Experts) else None
        if isinstance(mlp, Experts):
            return
        self.gated, self.activation = mlp.gated, ACTIVATIONS[mlp.activation]
        self.up = join([mlp.gate_proj, mlp.up_proj] if mlp.gated else [mlp.up_proj])
        self.down = join([mlp.down_proj])

    def __call__(self, x_BTD: Tensor, step: Step) -> Tensor:
        """Run the block."""
        if self.block.parallel != "none":
            return self._side_by_side(x_BTD, step)
        first, second = self.norms
        if self.plain_pre:
            x_BTD = x_BTD + self.attention(first(x_BTD), step)
            if self.cross is not None and self.cross_norm is not None:
                x_BTD = x_BTD + self.cross(self.cross_norm(x_BTD), step)
            return x_BTD + self._feed_forward(second(x_BTD))
        if self.block.after:
            x_BTD = first(x_BTD + self._scaled(self.attention(x_BTD, step)))
            if self.cross is not None and self.cross_norm is not None:
                x_BTD = self.cross_norm(x_BTD + self._scaled(self.cross(x_BTD, step)))
            return second(x_BTD + self._scaled(self._feed_forward(x_BTD)))
        if not self.block.within:
            x_BTD = x_BTD + self._scaled(self.attention(first(x_BTD), step))
            if self.cross is not None and self.cross_norm is not None:
                x_BTD = x_BTD + self._scaled(self.cross(self.cross_norm(x_BTD), step))
            return x_BTD + self._scaled(self._feed_forward(second(x_BTD)))
        if self.block.before:
            output, mlp_output = self.output_norms
            x_BTD = x_BTD + self._scaled(output(self.attention(first(x_BTD), step)))
            return x_BTD + self._scaled(mlp_output(self._feed_forward(second(x_BTD))))
        x_BTD = x_BTD + self._scaled(first(self.attention(x_BTD, step)))
        if self.cross is not None and self.cross_norm is not None:
            x_BTD = x_BTD + self._scaled(self.cross_norm(self.cross(x_BTD, step)))
        return x_BTD + self._scaled(second(self._feed_forward(x_BTD)))

    def _side_by_side(self, x_BTD: Tensor, step: Step) -> Tensor:
        h_BTD = self.norms[0](x_BTD)
        y_BTD = self.attention(h_BTD, step)
        h_BTD = self.norms[1](x_BTD) if self.block.parallel == "separate" else h_BTD
        return x_BTD + self._scaled(y_BTD + self._feed_forward(h_BTD))

    def _scaled(self, y_BTD: Tensor) -> Tensor:
        return y_BTD if self.block.scale == 1.0 else y_BTD * self.block.scale

    def _feed_forward(self, x_BTD: Tensor) -> Tensor:
        if self.experts is not None:
            return self.experts(x_BTD)
        h_BTF = self.up(x_BTD)
        if self.gated:
            gate_BTF, up_BTF = h_BTF.chunk(2, dim=-1)
            return self.down(self.activation(gate_BTF) * up_BTF)
        return self.down(self.activation(h_BTF))


class SelfAttention:
    """Self-attention of new positions to themselves and the cache."""

    def __init__(self, block: Block, join: "Joiner") -> None:
        attention = block.self_attn
        self.layer, self.window, self.scale = block.layer, block.window, attention.scale
        self.mask_key, self.rope = block.mask_key, block.rope
        self.heads = attention.n_heads, attention.n_kv_heads, attention.head_dim
        self.qkv = join([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = join([attention.o_proj])
        self.norms = (norm_of(attention.q_norm), norm_of(attention.k_norm)) if attention.qk_norm else None
        self.norm_kind, self.softcap = attention.norm_kind, attention.softcap

    def __call__(self, x_BTD: Tensor, step: Step) -> Tensor:
        """Attend, storing keys and values in the cache."""
        (B, T, _), (N, K, H) = x_BTD.shape, self.heads
        all_BTAH = self.qkv(x_BTD).view(B, T, N + 2 * K, H)
        # Query and key heads are processed together: both are normalized and rotated.
        both_BTAH = all_BTAH.narrow(2, 0, N + K)
        if self.norm_kind in ("head", "width"):
            both_BTAH = self._normed(both_BTAH)
        rope = step.ropes.get(self.rope)
        if rope is not None:
            # Rotary embedding as x * cos + swapped halves * sin; the minus sign is in the first half's sines.
            cos, sin = rope
            R = cos.shape[-1]
            rotated = both_BTAH if R == H else both_BTAH[..., :R]
            rotated = torch.addcmul(rotated * cos, rotated.roll(R // 2, -1), sin)
            both_BTAH = rotated if R == H else torch.cat([rotated, both_BTAH[..., R:]], dim=-1)
        if self.norm_kind == "rotated":
            both_BTAH = self._normed(both_BTAH)
        q_BTNH, k_BTKH, v_BTKH = both_BTAH.narrow(2, 0, N), both_BTAH.narrow(2, N, K), all_BTAH.narrow(2, N + K, K)
        cache, start, stop = step.cache, 0, step.cache.length + T
        cache.write(self.layer, k_BTKH.transpose(1, 2), v_BTKH.transpose(1, 2))
        if step.masks is None and self.window:  # without a mask, a window is a shorter range of the cache
            start = max(0, stop - self.window)
        mask = Mask() if step.masks is None else step.masks[self.mask_key]
        if self.softcap:
            keys_BKSH, values_BKSH = cache.read(self.layer, start, stop)
            q_BNTH = q_BTNH.transpose(1, 2)
            return self.out(attend(q_BNTH, keys_BKSH, values_BKSH, mask, self.scale, self.softcap))
        if T == 1 and isinstance(cache, Int8KVCache):  # avoids dequantizing the whole cache for one query
            return self.out(attend_int8(q_BTNH, *cache.coded(self.layer, start, stop), mask, self.scale))
        return self.out(attend_cached(q_BTNH, *cache.read(self.layer, start, stop), mask, self.scale))

    def _normed(self, both_BTAH: Tensor) -> Tensor:
        """Return normalized query and key heads: each by itself, or all heads together."""
        assert self.norms is not None
        parts = both_BTAH.split(list(self.heads[:2]), dim=2)
        flat = [part.flatten(2) if self.norm_kind == "width" else part for part in parts]
        normed = [norm(part).view_as(whole) for norm, part, whole in zip(self.norms, flat, parts, strict=True)]
        return torch.cat(normed, dim=2)


class CrossAttention:
    """Cross-attention to an encoder's output, whose keys and values are computed once."""

    def __init__(self, attention: Attention, layer: int) -> None:
        self.attention, self.layer = attention, layer
        self.query, self.out = join([attention.q_proj]), join([attention.o_proj])

    def __call__(self, x_BTD: Tensor, step: Step) -> Tensor:
        """Attend to the memory's keys and values, from the cache after the first call."""
        attention = self.attention
        q_BTNH = self.query(x_BTD).unflatten(-1, (attention.n_heads, attention.head_dim))
        if attention.qk_norm:
            q_BTNH = attention.q_norm(q_BTNH)
        pair = step.cache.cross[self.layer]
        if pair is None:
            assert step.memory_BSD is not None, (
                "cross-attention needs the encoder's output, or a cache that contains it"
            )
            pair = step.cache.cross[self.layer] = attention.keys_values(step.memory_BSD)
        assert step.memory_mask is not None
        return self.out(attend_cached(q_BTNH, *pair, step.memory_mask, attention.scale))


def attend_cached(q_BTNH: Tensor, keys_BKSH: Tensor, values_BKSH: Tensor, mask: Mask, scale: float) -> Tensor:
    """Return attention's output with concatenated heads (B, T, N*H).

    For a single position, the query heads that share keys are passed as positions of one head: torch's fused kernels do
    not support grouped queries in every precision, and its fallback is several times slower.
    """
    B, T, N, H = q_BTNH.shape
    if T > 1:
        return attend(q_BTNH.transpose(1, 2), keys_BKSH, values_BKSH, mask, scale)
    q_BKRH = q_BTNH.reshape(B, keys_BKSH.shape[1], -1, H)
    if q_BKRH.shape[2] < FEW_QUERIES and q_BKRH.device.type == "cpu":
        q_BKRH, keys_BKSH, values_BKSH = widened(q_BKRH), widened(keys_BKSH), widened(values_BKSH)
    tensor = of_groups(mask, keys_BKSH.shape[1], q_BKRH.dtype)
    y_BKRH = F.scaled_dot_product_attention(q_BKRH, keys_BKSH, values_BKSH, attn_mask=tensor, scale=scale)
    return y_BKRH.to(q_BTNH.dtype).reshape(B, 1, N * H)


def attend_int8(
    q_B1NH: Tensor, keys_BKSH: Tensor, k_BKS1: Tensor, values_BKSH: Tensor, v_BKS1: Tensor, mask: Mask, scale: float
) -> Tensor:
    """Return attention's output with concatenated heads (B, 1, N*H) for one position, over 8-bit keys and values.

    A position has one scale per key and value, so scores and probabilities are scaled instead of dequantizing all codes.
    """
    B, _, N, H = q_B1NH.shape
    # (B, K, R, H): the R query heads of each key head, as rows of one matrix product.
    q_BKRH = q_B1NH.reshape(B, keys_BKSH.shape[1], -1, H).float()
    # Codes are exact in float32, so scaling the products equals dequantizing first, up to rounding.
    scores_BKRS = (q_BKRH @ keys_BKSH.float().mT).mul_(k_BKS1.mT * scale)
    tensor = of_groups(mask, keys_BKSH.shape[1], scores_BKRS.dtype)
    if tensor is not None and tensor.dtype == torch.bool:
        scores_BKRS.masked_fill_(~tensor, float("-inf"))
    elif tensor is not None:
        scores_BKRS += tensor
    y_BKRH = scores_BKRS.softmax(dim=-1).mul_(v_BKS1.mT) @ values_BKSH.float()
    return y_BKRH.to(q_B1NH.dtype).reshape(B, 1, N * H)


def of_groups(mask: Mask, n_groups: int, dtype: torch.dtype) -> Tensor | None:
    """Return the mask of one position for query heads in groups: (.., K, R, S), or broadcastable to it."""
    tensor = mask.tensor
    if tensor is None or tensor.dtype == torch.bool:
        return tensor
    if tensor.dim() > 2 and tensor.shape[-3] > 1:  # a bias of each head
        tensor = tensor.unflatten(-3, (n_groups, -1)).squeeze(-2)
    return tensor.to(dtype)


def widened(x: Tensor) -> Tensor:
    """Convert half-precision tensors to float32; return others unchanged."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def norm_of(norm: nn.Module) -> Function:
    """Return a norm as a plain function, without the overhead of a module call."""
    if isinstance(norm, nn.Identity):
        return lambda x: x
    if isinstance(norm, nn.LayerNorm):
        return lambda x: F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    assert isinstance(norm, nn.RMSNorm)
    shape = list(norm.normalized_shape)
    return lambda x: F.rms_norm(x, shape, norm.weight, norm.eps)


Joiner = Callable[[Sequence[nn.Module]], Function]
"""Makes one function of layers with the same input, with concatenated outputs."""


def apart(layers: Sequence[nn.Module]) -> Function:
    """Return a function that calls the layers one by one; weights stay where they are."""
    return join(layers) if len(layers) == 1 else Apart(list(layers))


@dataclass(frozen=True)
class Apart:
    """Layers with the same input and concatenated outputs."""

    layers: list[nn.Module]

    def __call__(self, x: Tensor) -> Tensor:
        """Return the outputs of all layers."""
        return torch.cat([layer(x) for layer in self.layers], dim=-1)


def join(layers: Sequence[nn.Module]) -> Function:
    """Fuse layers with the same input into one function with concatenated outputs; weights are moved, not copied."""
    if len(layers) > 1 and all(type(layer) is nn.Linear for layer in layers):
        return join_linears([layer for layer in layers if isinstance(layer, nn.Linear)])
    quantized = [layer for layer in layers if isinstance(layer, QuantLinear)]
    if len(quantized) == len(layers) and len({(layer.scheme, layer.bias is None) for layer in quantized}) == 1:
        return (join_quantized(quantized) if len(layers) > 1 else quantized[0]).forward
    if len(layers) == 1:
        only = layers[0]
        return Dense(only.weight, only.bias) if type(only) is nn.Linear else only
    return lambda x: torch.cat([layer(x) for layer in layers], dim=-1)


class Dense:
    """A linear layer without the overhead of a module call."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self.weight_OI, self.bias_O = weight_OI, bias_O

    def __call__(self, x: Tensor) -> Tensor:
        """Return x W^T + b."""
        return F.linear(x, self.weight_OI, self.bias_O)


def join_linears(layers: Sequence[nn.Linear]) -> Dense:
    """Fuse linear layers; all or none have biases."""
    weight_OI = torch.cat([layer.weight for layer in layers])
    has_bias = layers[0].bias is not None
    bias_O = torch.cat([layer.bias for layer in layers]) if has_bias else None
    # The original layers become views, so that the model does not need twice the memory.
    start = 0
    for layer in layers:
        layer.weight.data = weight_OI[start : start + layer.out_features]
        if bias_O is not None:
            layer.bias.data = bias_O[start : start + layer.out_features]
        start += layer.out_features
    return Dense(weight_OI, bias_O)
