"""Decoding with as few operations per token as torch allows: the same numbers as `LanguageModel.hidden`, sooner.

In a small model a token costs the calls, not the arithmetic. So queries, keys and values come out of one product, gate and
up out of another; rotations are looked up; nothing that a token does not need is built for it. Weights that are joined are
moved, not copied: the model's own layers become views of them and go on working. Knows nothing of sampling.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmctl.config import ModelConfig
from llmctl.model.attention import Attention, Mask, attend
from llmctl.model.cache import Int8KVCache, KVCache
from llmctl.model.positions import rope_tables
from llmctl.model.stack import ACTIVATIONS, Block, Stack
from llmctl.model.supports import BLOCK, BLOCK_CHOICES, unsupported
from llmctl.model.transformer import LanguageModel
from llmctl.quant.joined import join_quantized
from llmctl.quant.linear import QuantLinear

Map = Callable[[Tensor], Tensor]
Rope = tuple[Tensor, Tensor]


Native = Callable[[Tensor, KVCache], Tensor | None]
"""A compiled step, where there is one: from tokens (B,) to logits (B, V), or None for what it does not do."""

FEW_QUERIES = 3
"""Query heads per key head below which half-precision attention on a CPU is made in float32.

Measured with one: torch's kernel takes five times as long in bfloat16 as the conversion of all keys and values and the
product in float32; from three on it is the faster one.
"""


NAMED = BLOCK - {"n_relative_buckets", "max_relative_distance"}
CHOICES = BLOCK_CHOICES | {
    "query_layer": (False,),
    "family": ("decoder", "encoder_decoder"),
    "positions": ("rope", "learned", "sinusoidal", "none"),
}
"""The switches that `Layer` and `Decoder` implement; one that is not named here goes the other way."""


def covers(config: ModelConfig) -> bool:
    """Tell whether a model can be decoded this way; the others go through `LanguageModel.hidden`."""
    return not unsupported(config, NAMED, CHOICES)


@dataclass(frozen=True)
class Step:
    """What the layers share while T more positions are decoded.

    masks: by window, None where every row is one text and one position is decoded: then what it may see is a range of the
    cache. rope: cosines and signed sines (B or 1, T, 1, H).
    """

    cache: KVCache
    masks: dict[int, Mask] | None
    rope: Rope | None
    memory_BSD: Tensor | None
    memory_mask: Mask | None


class Decoder:
    """A model's decoder, ready for one token after another.

    Takes the weights over: to be made of a model that is used, never of one that is being trained.
    """

    def __init__(self, model: LanguageModel) -> None:
        assert covers(model.config)
        self.model, self.config = model, model.config
        self.stack: Stack = model.stacks()[-1]
        with torch.inference_mode(mode=False), torch.no_grad():
            self.layers = [Layer(block) for block in self.stack.layers]
        self.norm = norm_of(self.stack.norm) if model.config.norm_position == "pre" else None
        self.tables: Rope | None = None
        self.native: Native | None = None

    def logits(self, tokens_B: Tensor, cache: KVCache, positions_B1: Tensor | None = None) -> Tensor:
        """Append one token per row and return the logits of what follows (B, V)."""
        if self.native is not None and not cache.ragged:
            found_BV = self.native(tokens_B, cache)
            if found_BV is not None:
                return found_BV
        hidden_BTD = self.hidden(tokens_B[:, None], cache, positions_BT=positions_B1)
        return self.model.head(hidden_BTD[:, -1])

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
        """Return the hidden states under the head (B, T, D), as `LanguageModel.hidden`, or `decode` over an encoder."""
        T = ids_BT.shape[1]
        documents_BS = cache.mark(T, documents_BT)
        x_BTD = self.model.embed(ids_BT)
        if documents_BS is None:
            positions_BT = None  # all rows are at the same place
        elif positions_BT is None:
            positions_BT = self.stack.positions(x_BTD, documents_BS, cache)
        if self.config.positions != "rope" or self.config.embedding_norm or self.config.n_token_types:
            places_BT = self.stack.positions(x_BTD, None, cache) if positions_BT is None else positions_BT
            x_BTD = self.stack.embed(x_BTD, places_BT, None)
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
        rope = self._rope(positions_BT, T, cache, x_BTD.dtype) if self.config.positions == "rope" else None
        if T == 1 and documents_BS is None and memory_documents_BS is None:
            return Step(cache, None, rope, memory_BSD, Mask())
        masks, memory_mask = self.stack.masks(x_BTD, documents_BS, memory_BSD, memory_documents_BS, cache)
        return Step(cache, masks, rope, memory_BSD, memory_mask)

    def _rope(self, positions_BT: Tensor | None, n_positions: int, cache: KVCache, dtype: torch.dtype) -> Rope:
        tables = self.tables
        if tables is None or len(tables[0]) < cache.max_len or tables[0].dtype != dtype:
            places_S = torch.arange(cache.max_len, device=cache.documents_BS.device)
            cos_SH, sin_SH = rope_tables(places_S, self.config.head_dim, self.config.rope_theta)
            sin_SH[:, : self.config.head_dim // 2].neg_()
            tables = self.tables = cos_SH[:, None].to(dtype), sin_SH[:, None].to(dtype)
        cos_S1H, sin_S1H = tables
        if positions_BT is None:
            return cos_S1H.narrow(0, cache.length, n_positions), sin_S1H.narrow(0, cache.length, n_positions)
        return cos_S1H[positions_BT], sin_S1H[positions_BT]


class Layer:
    """One block over the weights it took from the model."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.attention = SelfAttention(block.self_attn, block.layer, block.window)
        self.cross = CrossAttention(block.cross_attn, block.layer) if block.cross else None
        self.pre = block.pre
        self.norms = [norm_of(block.input_layernorm), norm_of(block.post_attention_layernorm)]
        self.cross_norm = norm_of(block.cross_attention_layernorm) if block.cross else None
        mlp = block.mlp
        self.gated, self.activation = mlp.gated, ACTIVATIONS[mlp.activation]
        self.up = join([mlp.gate_proj, mlp.up_proj] if mlp.gated else [mlp.up_proj])
        self.down = join([mlp.down_proj])

    def __call__(self, x_BTD: Tensor, step: Step) -> Tensor:
        """Run the layer."""
        first, second = self.norms
        if self.pre:
            x_BTD = x_BTD + self.attention(first(x_BTD), step)
            if self.cross is not None and self.cross_norm is not None:
                x_BTD = x_BTD + self.cross(self.cross_norm(x_BTD), step)
            return x_BTD + self._feed_forward(second(x_BTD))
        x_BTD = first(x_BTD + self.attention(x_BTD, step))
        if self.cross is not None and self.cross_norm is not None:
            x_BTD = self.cross_norm(x_BTD + self.cross(x_BTD, step))
        return second(x_BTD + self._feed_forward(x_BTD))

    def _feed_forward(self, x_BTD: Tensor) -> Tensor:
        h_BTF = self.up(x_BTD)
        if self.gated:
            gate_BTF, up_BTF = h_BTF.chunk(2, dim=-1)
            return self.down(self.activation(gate_BTF) * up_BTF)
        return self.down(self.activation(h_BTF))


class SelfAttention:
    """Attention of new positions to themselves and the cache."""

    def __init__(self, attention: Attention, layer: int, window: int) -> None:
        self.layer, self.window, self.scale = layer, window, attention.scale
        self.heads = attention.n_heads, attention.n_kv_heads, attention.head_dim
        self.qkv = join([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = join([attention.o_proj])
        self.norms = (norm_of(attention.q_norm), norm_of(attention.k_norm)) if attention.qk_norm else None

    def __call__(self, x_BTD: Tensor, step: Step) -> Tensor:
        """Attend, and leave keys and values in the cache."""
        (B, T, _), (N, K, H) = x_BTD.shape, self.heads
        all_BTAH = self.qkv(x_BTD).view(B, T, N + 2 * K, H)
        both_BTAH = all_BTAH.narrow(2, 0, N + K)
        if self.norms is not None:
            q_BTNH, k_BTKH = both_BTAH.split([N, K], dim=2)
            both_BTAH = torch.cat([self.norms[0](q_BTNH), self.norms[1](k_BTKH)], dim=2)
        if step.rope is not None:
            # The halves of a head change places; the sines of the first one carry the minus of the rotation.
            cos, sin = step.rope
            both_BTAH = torch.addcmul(both_BTAH * cos, both_BTAH.roll(H // 2, -1), sin)
        q_BTNH, k_BTKH, v_BTKH = both_BTAH.narrow(2, 0, N), both_BTAH.narrow(2, N, K), all_BTAH.narrow(2, N + K, K)
        cache, start, stop = step.cache, 0, step.cache.length + T
        cache.write(self.layer, k_BTKH.transpose(1, 2), v_BTKH.transpose(1, 2))
        if step.masks is None and self.window:
            start = max(0, stop - self.window)
        mask = Mask() if step.masks is None else step.masks[self.window]
        if T == 1 and isinstance(cache, Int8KVCache):
            return self.out(look_at_codes(q_BTNH, *cache.coded(self.layer, start, stop), mask, self.scale))
        return self.out(look(q_BTNH, *cache.read(self.layer, start, stop), mask, self.scale))


class CrossAttention:
    """Attention to an encoder's output, whose keys and values are made once."""

    def __init__(self, attention: Attention, layer: int) -> None:
        self.attention, self.layer = attention, layer
        self.query, self.out = join([attention.q_proj]), join([attention.o_proj])

    def __call__(self, x_BTD: Tensor, step: Step) -> Tensor:
        """Attend to the memory, or to what the cache keeps of it."""
        attention = self.attention
        q_BTNH = self.query(x_BTD).unflatten(-1, (attention.n_heads, attention.head_dim))
        if attention.qk_norm:
            q_BTNH = attention.q_norm(q_BTNH)
        pair = step.cache.cross[self.layer]
        if pair is None:
            assert step.memory_BSD is not None, "a decoder over an encoder needs its output, or a cache that holds it"
            pair = step.cache.cross[self.layer] = attention.keys_values(step.memory_BSD)
        assert step.memory_mask is not None
        return self.out(look(q_BTNH, *pair, step.memory_mask, attention.scale))


def look(q_BTNH: Tensor, keys_BKSH: Tensor, values_BKSH: Tensor, mask: Mask, scale: float) -> Tensor:
    """Return attention's output with the heads joined (B, T, N*H).

    At one position, the query heads that share keys are laid out as positions of one head: torch's fused kernels do not
    know shared keys in every precision, and what they do in their place takes several times as long.
    """
    B, T, N, H = q_BTNH.shape
    if T > 1:
        return attend(q_BTNH.transpose(1, 2), keys_BKSH, values_BKSH, mask, scale)
    q_BKRH = q_BTNH.reshape(B, keys_BKSH.shape[1], -1, H)
    if q_BKRH.shape[2] < FEW_QUERIES and q_BKRH.device.type == "cpu":
        q_BKRH, keys_BKSH, values_BKSH = widened(q_BKRH), widened(keys_BKSH), widened(values_BKSH)
    y_BKRH = F.scaled_dot_product_attention(q_BKRH, keys_BKSH, values_BKSH, attn_mask=mask.tensor, scale=scale)
    return y_BKRH.to(q_BTNH.dtype).reshape(B, 1, N * H)


def look_at_codes(
    q_B1NH: Tensor, keys_BKSH: Tensor, k_BKS1: Tensor, values_BKSH: Tensor, v_BKS1: Tensor, mask: Mask, scale: float
) -> Tensor:
    """Return attention's output with the heads joined (B, 1, N*H), at one position, over keys and values in 8 bits.

    A position's scales are one number for its whole key or value, so that scores and probabilities take them, not the
    many numbers that the codes mean.
    """
    B, _, N, H = q_B1NH.shape
    q_BKRH = q_B1NH.reshape(B, keys_BKSH.shape[1], -1, H).float()
    scores_BKRS = (q_BKRH @ keys_BKSH.float().mT).mul_(k_BKS1.mT * scale)
    if mask.tensor is not None:
        scores_BKRS.masked_fill_(~mask.tensor, float("-inf"))
    y_BKRH = scores_BKRS.softmax(dim=-1).mul_(v_BKS1.mT) @ values_BKSH.float()
    return y_BKRH.to(q_B1NH.dtype).reshape(B, 1, N * H)


def widened(x: Tensor) -> Tensor:
    """Return half-precision numbers in float32, others as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def norm_of(norm: nn.Module) -> Map:
    """Return what a norm does, without a module's detours."""
    if isinstance(norm, nn.LayerNorm):
        return lambda x: F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    assert isinstance(norm, nn.RMSNorm)
    shape = list(norm.normalized_shape)
    return lambda x: F.rms_norm(x, shape, norm.weight, norm.eps)


def join(layers: Sequence[nn.Module]) -> Map:
    """Return one map whose outputs are those of all layers side by side; see the module for what becomes of weights."""
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
    """A linear map without a module's detours."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self.weight_OI, self.bias_O = weight_OI, bias_O

    def __call__(self, x: Tensor) -> Tensor:
        """Return x W^T + b."""
        return F.linear(x, self.weight_OI, self.bias_O)


def join_linears(layers: Sequence[nn.Linear]) -> Dense:
    """Join layers with weights of one precision; a missing bias is zero where another has one."""
    weight_OI = torch.cat([layer.weight for layer in layers])
    has_bias = layers[0].bias is not None
    bias_O = torch.cat([layer.bias for layer in layers]) if has_bias else None
    start = 0
    for layer in layers:
        layer.weight.data = weight_OI[start : start + layer.out_features]
        if bias_O is not None:
            layer.bias.data = bias_O[start : start + layer.out_features]
        start += layer.out_features
    return Dense(weight_OI, bias_O)
