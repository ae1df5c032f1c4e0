"""Attention for training on a CPU, by blocks of queries and only the keys that they may attend to.

A block's scores fit into the CPU cache. Keys that no query of a block may attend to (later ones, outside the window,
other documents of a packed row) are skipped. Scores are not kept: the backward pass recomputes them, as in
FlashAttention (Dao et al. 2022, arXiv:2205.14135, section 3.1). Knows no models; `attention.blocks_pay` decides when to
use it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 64
"""Queries per block: blocks of 128 multiply slightly faster but skip fewer masked keys."""
CHUNK_SCORES = 1 << 18
"""Scores computed at a time if several rows of a batch fit: 1 MiB of float32, half of a core's cache."""

Spans = list[list[tuple[int, int]]]
"""Per row of the mask and block of queries, the range [start, stop) of keys."""


def spans_of(mask: Tensor) -> Spans:
    """Return the range of keys that each block of queries may attend to, per row of the mask.

    Shapes: mask (T, S), (N, T, S) or (B or 1, N or 1, T, S), bool (True may attend) or float (-inf may not).
    """
    allowed = mask.detach() if mask.dtype == torch.bool else mask.detach() != float("-inf")
    while allowed.dim() < 4:
        allowed = allowed[None]
    allowed_BTS = allowed.any(dim=1)
    n_keys = allowed.shape[-1]
    columns = []
    for block_BCS in allowed_BTS.split(BLOCK, dim=1):
        seen_BS = block_BCS.any(dim=1).int()
        # argmax returns the first maximum: the first key, and on the flipped mask the number of keys after the last.
        first, behind = seen_BS.argmax(dim=1).tolist(), seen_BS.flip(1).argmax(dim=1).tolist()
        columns.append([(low, n_keys - left) for low, left in zip(first, behind, strict=True)])
    return [list(row) for row in zip(*columns, strict=True)]


def share_of(spans: Spans, n_keys: int) -> float:
    """Return the fraction of all query-key pairs that the spans cover."""
    widths = [high - low for row in spans for low, high in row]
    return sum(widths) / (len(widths) * n_keys)


@dataclass(frozen=True)
class Tile:
    """Rows [b, c) of the batch, queries [i, e), and the range [low, high) of keys that any of them may attend to."""

    b: int
    c: int
    i: int
    e: int
    low: int
    high: int


def tiles(q_BNTH: Tensor, n_keys: int, spans: Spans | None, *, is_causal: bool) -> Iterator[list[Tile]]:
    """Split a batch into chunks of rows, and each chunk into tiles, one per block of queries."""
    B, N, T, _ = q_BNTH.shape
    step = max(1, CHUNK_SCORES // (N * min(BLOCK, T) * n_keys))
    for b in range(0, B, step):
        c = min(B, b + step)
        rows = []
        for index, i in enumerate(range(0, T, BLOCK)):
            e = min(T, i + BLOCK)
            low, high = 0, e if is_causal else n_keys
            if spans is not None:  # rows of a chunk share one range, the union of theirs
                own = [spans[row if len(spans) > 1 else 0][index] for row in range(b, c)]
                low, high = min(span[0] for span in own), max(span[1] for span in own)
            rows.append(Tile(b, c, i, e, low, high))
        yield rows


class _Rows:
    """A chunk of rows; the query heads that share a key head are stacked, so that products are (b k) x (g t) x s."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, rows: list[Tile]) -> None:
        b, c = rows[0].b, rows[0].c
        self.K, self.S, self.H = k.shape[1:]
        self.G, self.scale = q.shape[1] // self.K, scale
        self.n = (c - b) * self.K
        self.q = q[b:c].reshape(self.n, self.G, -1, self.H)
        self.k, self.v = (tensor[b:c].reshape(self.n, self.S, self.H) for tensor in (k, v))
        self.bias = bias[b:c] if bias is not None and bias.shape[0] > 1 else bias
        # Two buffers of the largest tile, reused by all tiles: allocation is expensive at this size.
        size = self.n * self.G * max((tile.e - tile.i) * (tile.high - tile.low) for tile in rows)
        self.buffers = q.new_empty(2, size)

    def shaped(self, buffer: int, tile: Tile) -> Tensor:
        """View a buffer as the scores of a tile (b k, g t, s)."""
        shape = (self.n, self.G * (tile.e - tile.i), tile.high - tile.low)
        return self.buffers[buffer][: shape[0] * shape[1] * shape[2]].view(shape)

    def queries(self, tile: Tile) -> Tensor:
        return self.q[:, :, tile.i : tile.e].reshape(self.n, -1, self.H)

    def probabilities(self, queries: Tensor, tile: Tile, causal: Tensor | None) -> Tensor:
        """Compute the softmax of a tile's scores into the second buffer; the first can then be reused."""
        scores = self.shaped(0, tile)
        torch.baddbmm(scores, queries, self.k[:, tile.low : tile.high].mT, beta=0, alpha=self.scale, out=scores)
        if self.bias is not None:
            bias = self.bias[:, :, tile.i : tile.e, tile.low : tile.high]
            per_head = scores.view(-1, self.K * self.G, tile.e - tile.i, tile.high - tile.low)
            per_head += bias
        elif causal is not None:
            # Keys before the block are visible to all its queries: only its own square needs the mask.
            own = scores.view(self.n, self.G, tile.e - tile.i, -1)[..., tile.i :]
            own += causal[: tile.e - tile.i, : tile.e - tile.i]
        return torch.softmax(scores, -1, out=self.shaped(1, tile))


def later_keys(q: Tensor, *, is_causal: bool) -> Tensor | None:
    """Return the causal mask within a block of queries, to be added to its scores."""
    return torch.full((BLOCK, BLOCK), float("-inf"), dtype=q.dtype).triu(1) if is_causal else None


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        spans: Spans | None,
        is_causal: bool,
        scale: float,
    ) -> Tensor:
        B, N, T, H = q.shape
        y_BTNH = q.new_empty(B, T, N, H)
        causal = later_keys(q, is_causal=is_causal and bias is None)
        for chunk in tiles(q, k.shape[2], spans, is_causal=is_causal):
            rows = _Rows(q, k, v, bias, scale, chunk)
            for tile in chunk:
                p = rows.probabilities(rows.queries(tile), tile, causal)
                y = torch.bmm(p, rows.v[:, tile.low : tile.high])
                y_BTNH[tile.b : tile.c, tile.i : tile.e] = y.view(-1, N, tile.e - tile.i, H).transpose(1, 2)
        ctx.save_for_backward(q, k, v, bias)
        ctx.options = (spans, is_causal, scale)
        return y_BTNH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTNH: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias = ctx.saved_tensors
        spans, is_causal, scale = ctx.options
        N, H = q.shape[1], q.shape[3]
        grad = grad_BTNH.transpose(1, 2)
        # The memory layout of the projections' outputs, so that their backward pass needs no copy.
        grads = [x.new_empty(x.shape[0], x.shape[2], x.shape[1], H).transpose(1, 2) for x in (q, k, v)]
        grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[3] else None
        causal = later_keys(q, is_causal=is_causal and bias is None)
        with torch.autocast("cpu", enabled=False):
            for chunk in tiles(q, k.shape[2], spans, is_causal=is_causal):
                rows = _Rows(q, k, v, bias, scale, chunk)
                grad_rows = grad[chunk[0].b : chunk[0].c].reshape(rows.n, rows.G, -1, H)
                grad_k, grad_v = torch.zeros_like(rows.k), torch.zeros_like(rows.v)
                for tile in chunk:
                    queries = rows.queries(tile)
                    p = rows.probabilities(queries, tile, causal)
                    grad_y = grad_rows[:, :, tile.i : tile.e].reshape(rows.n, -1, H)
                    own = slice(tile.low, tile.high)
                    grad_v[:, own] += torch.bmm(p.mT, grad_y)
                    grad_p = torch.bmm(grad_y, rows.v[:, own].mT, out=rows.shaped(0, tile))
                    # From the gradient of the probabilities to that of the scores, in place; there is no public API.
                    torch.ops.aten._softmax_backward_data.out(grad_p, p, -1, p.dtype, grad_input=grad_p)  # noqa: SLF001
                    if grad_bias is not None:
                        add_bias_grad(grad_bias, grad_p, tile, N)
                    grad_q = torch.bmm(grad_p, rows.k[:, own]).mul_(scale)
                    grads[0][tile.b : tile.c, :, tile.i : tile.e] = grad_q.view(-1, N, tile.e - tile.i, H)
                    grad_k[:, own].add_(torch.bmm(grad_p.mT, queries), alpha=scale)
                for whole, part in zip(grads[1:], (grad_k, grad_v), strict=True):
                    whole[chunk[0].b : chunk[0].c] = part.view(-1, rows.K, rows.S, H)
        return (*grads, grad_bias, None, None, None)


def add_bias_grad(grad_bias: Tensor, grad_p: Tensor, tile: Tile, n_heads: int) -> None:
    """Add a tile's gradient of the bias, summed over the dimensions along which the bias was broadcast."""
    per_head = grad_p.view(-1, n_heads, tile.e - tile.i, tile.high - tile.low)
    rows = slice(tile.b, tile.c) if grad_bias.shape[0] > 1 else slice(0, 1)
    own = grad_bias[rows, :, tile.i : tile.e, tile.low : tile.high]
    own += per_head.sum_to_size(own.shape)


def blocked_attention(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    bias: Tensor | None,
    spans: Spans | None,
    *,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """Return softmax(q k^T scale + bias) v of shape (B, T, N, H).

    `spans` are those of the bias (see `spans_of`). With `is_causal`, queries and keys have the same length and the bias
    is None. Every query must have at least one key.

    Shapes: bias, additive, of the dtype of the queries, (B or 1, N or 1, T, S).
    """
    device = q_BNTH.device.type
    with torch.autocast(device, enabled=False):
        result: Tensor = _BlockedAttention.apply(q_BNTH, k_BKSH, v_BKSH, bias, spans, is_causal, scale)  # type: ignore[no-untyped-call]
    return result
