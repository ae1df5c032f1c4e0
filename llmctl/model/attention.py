"""Multi-head attention of all families: grouped queries, rotary embeddings or score biases, with or without a cache.

Knows nothing about the layers around it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llmctl.config import ModelConfig
from llmctl.model.blocked import Spans, blocked_attention, share_of, spans_of
from llmctl.model.cache import KVCache
from llmctl.model.kernels import RMSNorm, trains_on_cpu
from llmctl.model.positions import apply_rope
from llmctl.model.shapes import has_bias

Attended = dict[int, tuple[Tensor, Tensor, Tensor] | None]
"""Layer -> queries (B, N, T, H), keys and values (B, K, T, H) of its self-attention; filled for the layers present."""

SHORT_KEYS = 256
FEWEST_KEYS = 129
LARGEST_SHARE, LARGER_SHARE = 0.5, 0.6
SMALL_BLOCKS = range(SHORT_KEYS + 1, 768)
"""Limits for blocked attention, see `blocks_pay`. From 768 queries on, torch's kernel takes larger blocks."""


@dataclass(frozen=True)
class Mask:
    """An attention mask: a tensor for scaled_dot_product_attention, or only the causal flag.

    tensor: None, bool (True may attend), or float (added to the scores); broadcastable to (B, N, T, S).
    """

    tensor: Tensor | None = None
    is_causal: bool = False

    @cached_property
    def spans(self) -> Spans | None:
        """The range of keys that each block of queries may attend to, computed once for all layers."""
        return None if self.tensor is None else spans_of(self.tensor)

    @cached_property
    def _summands(self) -> dict[torch.dtype, Tensor]:
        return {}

    def summand(self, dtype: torch.dtype) -> Tensor | None:
        """Return the mask as a 4-D tensor to add to scores of this dtype; a bool mask is converted once."""
        if self.tensor is None:
            return None
        if self.tensor.dtype != torch.bool:
            return self.tensor.to(dtype)[(None,) * (4 - self.tensor.dim())]
        if dtype not in self._summands:
            zeros = torch.zeros(self.tensor.shape, dtype=dtype, device=self.tensor.device)
            self._summands[dtype] = zeros.masked_fill_(~self.tensor, float("-inf"))[(None,) * (4 - self.tensor.dim())]
        return self._summands[dtype]

    def plus(self, bias_BNTS: Tensor) -> "Mask":
        """Return the mask with more to add to the scores; it must not be only the causal flag."""
        if self.tensor is None:
            return Mask(bias_BNTS)
        if self.tensor.dtype == torch.bool:
            return Mask(bias_BNTS.masked_fill(~self.tensor, float("-inf")))
        return Mask(bias_BNTS + self.tensor)


@dataclass(frozen=True)
class Distances:
    """States of distances between positions (R, D), and which of them each pair of query and key has (T, S)."""

    states_RD: Tensor
    rows_TS: Tensor


def build_mask(
    n_queries: int,
    n_keys: int,
    *,
    causal: bool,
    window: int = 0,
    query_documents_BT: Tensor | None = None,
    key_documents_BS: Tensor | None = None,
    bias_NTS: Tensor | None = None,
    device: torch.device | None = None,
) -> Mask:
    """Combine causality, a sliding window, document isolation and a position bias into one mask.

    With causality or a window, the queries are at the last `n_queries` key positions. A query of document 0 (padding)
    may attend to everything, since a fully masked softmax would be nan; its result is unused.
    """
    if not causal and window == 0 and query_documents_BT is None:
        return Mask(bias_NTS)
    if window == 0 and query_documents_BT is None and bias_NTS is None:
        if n_queries == 1:  # the last position attends to everything
            return Mask()
        if n_queries == n_keys:  # torch's causal flag aligns the mask to the first key, so only square masks fit
            return Mask(is_causal=True)
    allowed = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    if causal or window:
        behind_TS = offsets(n_queries, n_keys, device).neg()  # how many positions a key is before the query
        # An encoder's window extends to both sides.
        allowed = behind_TS >= 0 if causal else behind_TS > -window
        allowed = allowed & (behind_TS < window) if window else allowed
    if query_documents_BT is not None and key_documents_BS is not None:
        same = query_documents_BT[:, None, :, None] == key_documents_BS[:, None, None, :]
        allowed = allowed & (same | (query_documents_BT == 0)[:, None, :, None])
    if bias_NTS is None:
        return Mask(allowed)
    return Mask(bias_NTS.masked_fill(~allowed, float("-inf")))


def offsets(n_queries: int, n_keys: int, device: torch.device | None = None) -> Tensor:
    """Return key position minus query position, int64 (T, S), the queries being the last of the keys."""
    queries = torch.arange(n_keys - n_queries, n_keys, device=device)
    return torch.arange(n_keys, device=device)[None, :] - queries[:, None]


class Attention(nn.Module):
    """Scaled dot-product attention with an output projection.

    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; grouped queries: Ainslie et al. 2023, arXiv:2305.13245;
    normalized queries and keys: Henry et al. 2020, arXiv:2010.04245, as in Qwen3.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.scale = config.attention_scale
        width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.d_model, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=config.attention_bias)
        bias = has_bias(config.attention_output_bias, config.attention_bias)
        self.o_proj = nn.Linear(width, config.d_model, bias=bias)
        if config.qk_norm:
            wide = config.qk_norm_kind == "width"
            self.q_norm = RMSNorm(width if wide else config.head_dim, eps=config.norm_eps)
            self.k_norm = RMSNorm(kv_width if wide else config.head_dim, eps=config.norm_eps)
        self.qk_norm, self.softcap = config.qk_norm, config.attention_softcap
        # Where queries and keys are normalized, or `none`.
        self.norm_kind = config.qk_norm_kind if config.qk_norm else "none"

    def forward(
        self,
        x_BTD: Tensor,
        mask: Mask,
        *,
        memory_BSD: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        cross: bool = False,
        attended: Attended | None = None,
        distances: Distances | None = None,
    ) -> Tensor:
        """Attend from `x` to itself and the cache, or to `memory` if given.

        With `cross`, the memory's keys and values are taken from the cache after the first call. If `attended` has this
        layer's number, it receives queries, keys and values before rotary embedding. With `distances`, `x` attends to
        itself by contents and distances.
        """
        if distances is not None:
            return self._disentangled(x_BTD, mask, distances, layer, attended)
        q_BNTH = self._projected(self.q_proj, x_BTD, self.n_heads, "q_norm")
        if cross and cache is not None:
            pair = cache.cross[layer]
            if pair is None:
                pair = cache.cross[layer] = self.keys_values(x_BTD if memory_BSD is None else memory_BSD)
            k_BKSH, v_BKSH = pair
        else:
            k_BKSH, v_BKSH = self.keys_values(x_BTD if memory_BSD is None else memory_BSD)
            # Before rotary embedding: relations of student and teacher are compared without positions.
            if attended is not None and layer in attended:
                attended[layer] = (q_BNTH, k_BKSH, v_BKSH)
            if rope is not None:
                q_BNTH, k_BKSH = apply_rope(q_BNTH, *rope), apply_rope(k_BKSH, *rope)
            if self.norm_kind == "rotated":
                q_BNTH, k_BKSH = self._normed(self.q_norm, q_BNTH), self._normed(self.k_norm, k_BKSH)
            if cache is not None:  # keys are cached after rotary embedding: each is rotated once
                k_BKSH, v_BKSH = cache.append(layer, k_BKSH, v_BKSH)
        return self.o_proj(attend(q_BNTH, k_BKSH, v_BKSH, mask, self.scale, self.softcap))

    def _disentangled(
        self, x_BTD: Tensor, mask: Mask, distances: Distances, layer: int, attended: Attended | None
    ) -> Tensor:
        """Add to the scores of contents those of a query's content with a key's distance, and the other way round.

        Queries and keys of distances have the projections of contents.
        Source: DeBERTa, He et al. 2020, arXiv:2006.03654, eq. 4.
        """
        B, T, _ = x_BTD.shape
        # In one product, so that whoever observes a projection (calibration, Fisher information) sees all its inputs.
        joined_1MD = torch.cat([x_BTD.flatten(0, 1), distances.states_RD])[None]
        q_NMH = self._projected(self.q_proj, joined_1MD, self.n_heads, "q_norm")[0]
        k_KMH = self._projected(self.k_proj, joined_1MD, self.n_kv_heads, "k_norm")[0]
        q_BNTH, k_BKTH = (x[:, : B * T].unflatten(1, (B, T)).transpose(0, 1) for x in (q_NMH, k_KMH))
        v_BKTH = self._heads(self.v_proj(x_BTD), self.n_kv_heads)
        if attended is not None and layer in attended:
            attended[layer] = (q_BNTH, k_BKTH, v_BKTH)
        k_NMH = k_KMH.repeat_interleave(self.n_heads // self.n_kv_heads, 0)
        rows_TS = distances.rows_TS.expand(self.n_heads, B, T, T)
        to_position_NBTR = (q_NMH[:, : B * T] @ k_NMH[:, B * T :].mT).unflatten(1, (B, T))
        to_content_NBSR = (k_NMH[:, : B * T] @ q_NMH[:, B * T :].mT).unflatten(1, (B, T))
        scores_NBTS = pick(to_position_NBTR, rows_TS) + pick(to_content_NBSR, rows_TS.mT).mT
        bias_BNTS = scores_NBTS.transpose(0, 1) * self.scale
        return self.o_proj(attend(q_BNTH, k_BKTH, v_BKTH, mask.plus(bias_BNTS), self.scale, self.softcap))

    def keys_values(self, source_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of states, before rotary embedding (B, K, S, H)."""
        k_BKSH = self._projected(self.k_proj, source_BSD, self.n_kv_heads, "k_norm")
        return k_BKSH, self._heads(self.v_proj(source_BSD), self.n_kv_heads)

    def _projected(self, projection: nn.Module, x_BTD: Tensor, n_heads: int, norm: str) -> Tensor:
        """Return queries or keys (B, N, T, H), normalized unless that follows the rotation."""
        x_BTW = projection(x_BTD)
        if self.norm_kind == "width":
            x_BTW = self._normed(getattr(self, norm), x_BTW)
        x_BNTH = self._heads(x_BTW, n_heads)
        return self._normed(getattr(self, norm), x_BNTH) if self.norm_kind == "head" else x_BNTH

    @staticmethod
    def _normed(norm: nn.RMSNorm, x_BNTH: Tensor) -> Tensor:
        # Under autocast the projection is bfloat16 but the norm's weight is not: torch warns and takes a slow path.
        return norm(x_BNTH.to(norm.weight.dtype))

    def _heads(self, x_BTW: Tensor, n_heads: int) -> Tensor:
        return x_BTW.unflatten(-1, (n_heads, self.head_dim)).transpose(1, 2)


class _Pick(torch.autograd.Function):
    """torch.gather along the last dimension, which would keep the whole tensor for its backward pass."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = values.shape
        return values.gather(-1, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).scatter_add_(-1, rows, grad), None


def pick(values: Tensor, rows: Tensor) -> Tensor:
    """Return the values at rows of the last dimension, both of the same shape but for it."""
    picked: Tensor = _Pick.apply(values, rows)  # type: ignore[no-untyped-call]
    return picked


def attend(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Mask, scale: float, softcap: float = 0.0) -> Tensor:
    """Return softmax(q k^T scale + mask) v with concatenated heads: (B, T, N*H).

    softcap: c if scores are c tanh(score / c) before the mask; 0 if not.
    """
    if softcap:
        return attend_capped(q_BNTH, k_BKSH, v_BKSH, mask, scale, softcap)
    if trains_on_cpu(q_BNTH, k_BKSH):
        # A custom autograd function gets no casts from autocast: apply its dtype here.
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q_BNTH.dtype
        if blocks_pay(k_BKSH.shape[2], mask, dtype):
            q, k, v = q_BNTH.to(dtype), k_BKSH.to(dtype), v_BKSH.to(dtype)
            y_BTNH = blocked_attention(q, k, v, mask.summand(dtype), mask.spans, is_causal=mask.is_causal, scale=scale)
            return y_BTNH.flatten(2)
    tensor = mask.tensor
    if tensor is not None and tensor.is_floating_point():
        tensor = tensor.to(q_BNTH.dtype)
    y_BNTH = F.scaled_dot_product_attention(
        q_BNTH,
        k_BKSH,
        v_BKSH,
        attn_mask=tensor,
        is_causal=mask.is_causal,
        scale=scale,
        enable_gqa=q_BNTH.shape[1] != k_BKSH.shape[1],
    )
    return y_BNTH.transpose(1, 2).flatten(2)


def attend_capped(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Mask, scale: float, softcap: float) -> Tensor:
    """Return the same with capped scores, for which torch has no fused kernel (Gemma 2, arXiv:2408.00118)."""
    (_, N, T, _), (_, K, S, _) = q_BNTH.shape, k_BKSH.shape
    k_BNSH, v_BNSH = k_BKSH.repeat_interleave(N // K, 1), v_BKSH.repeat_interleave(N // K, 1)
    scores_BNTS = softcap * torch.tanh(q_BNTH @ k_BNSH.mT * (scale / softcap))
    if mask.is_causal:
        scores_BNTS = scores_BNTS.masked_fill(offsets(T, S, scores_BNTS.device) > 0, float("-inf"))
    summand = mask.summand(scores_BNTS.dtype)
    scores_BNTS = scores_BNTS if summand is None else scores_BNTS + summand
    precise = torch.promote_types(scores_BNTS.dtype, torch.float32)
    y_BNTH = scores_BNTS.softmax(-1, dtype=precise).to(v_BNSH.dtype) @ v_BNSH
    return y_BNTH.transpose(1, 2).flatten(2)


def blocks_pay(n_keys: int, mask: Mask, dtype: torch.dtype) -> bool:
    """Tell whether blocked attention is faster than scaled_dot_product_attention for a training step on a CPU.

    Decided by sizes, dtype and mask, never by timing: a resumed run must use the same implementation. The limits are
    measured (forward and backward, heads of 64, AVX-512). In bfloat16, torch's kernel is slow for short rows. For long
    rows and in float32 it is faster per query-key pair, but also computes pairs that a mask leaves out (half of the pairs
    left: blocks take 0.8 of its time with 256 keys; 0.31 left: 0.48 with 512). If only causal it skips them too, and is
    still slower with small blocks (512 keys: blocks take 0.8 of its time, 0.7 with grouped queries). For a learned mask
    (position bias) it has no fused backward pass.
    """
    is_learned = mask.tensor is not None and mask.tensor.requires_grad
    if dtype == torch.float32 and not is_learned and n_keys >= FEWEST_KEYS:
        has_small_blocks = n_keys in SMALL_BLOCKS
        if mask.spans is None:
            return mask.is_causal and has_small_blocks
        return share_of(mask.spans, n_keys) <= (LARGER_SHARE if has_small_blocks else LARGEST_SHARE)
    if n_keys <= SHORT_KEYS * (1 + mask.is_causal):
        return dtype == torch.bfloat16 and not is_learned
    return is_learned or (mask.spans is not None and share_of(mask.spans, n_keys) <= LARGEST_SHARE)
