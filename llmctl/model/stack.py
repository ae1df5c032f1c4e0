"""Transformer blocks and stacks of them: attention, cross-attention, feed-forward, norms."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llmctl.config import ModelConfig
from llmctl.model.attention import Attended, Attention, Distances, Mask, build_mask, offsets
from llmctl.model.cache import KVCache
from llmctl.model.kernels import RMSNorm
from llmctl.model.positions import (
    RopeKind,
    alibi_slopes,
    positions_within,
    relative_buckets,
    rope_tables,
    signed_buckets,
    sinusoidal_table,
)
from llmctl.model.shapes import has_bias, has_shared_bias, rope_of, window_of

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def make_norm(config: ModelConfig, width: int = 0) -> nn.Module:
    """Create a norm of the model's kind over the hidden channels, or over `width` channels."""
    width = width or config.d_model
    if config.norm == "rmsnorm":
        return RMSNorm(width, eps=config.norm_eps, elementwise_affine=config.norm_weight)
    return nn.LayerNorm(width, eps=config.norm_eps, elementwise_affine=config.norm_weight, bias=config.norm_bias)


class FeedForward(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)).

    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 2; gated: Shazeer 2020, arXiv:2002.05202.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.gated:
            self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        bias = has_bias(config.mlp_output_bias, config.mlp_bias)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=bias)
        self.activation = config.activation
        self.gated = config.gated

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Transform each position independently."""
        act = ACTIVATIONS[self.activation]
        if self.gated:
            return self.down_proj(act(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
        return self.down_proj(act(self.up_proj(x_BTD)))


class Router(nn.Module):
    """Probabilities of the experts for every token, in at least float32.

    Not an nn.Linear: it has no adapter and is never quantized, since its choice is not continuous.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.d_model))
        nn.init.normal_(self.weight, std=config.init_std)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Return the probabilities (N, E)."""
        logits_NE = F.linear(x_ND, self.weight)
        return logits_NE.softmax(dim=-1, dtype=torch.promote_types(logits_NE.dtype, torch.float32))


class Experts(nn.Module):
    """A mixture of feed-forward layers: the sum of a token's most probable experts, weighted by their probabilities.

    Source: Shazeer et al. 2017, arXiv:1701.06538, eq. 1; Qwen3, arXiv:2505.09388; OLMoE, arXiv:2409.02060, eq. 2.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_active, self.normalized = config.n_active_experts, config.normalized_experts
        self.router = Router(config)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.n_experts))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Transform each position with its own experts."""
        x_ND = x_BTD.flatten(0, -2)
        shares_NA, chosen_NA = self.router(x_ND).topk(self.n_active, dim=-1)
        if self.normalized:
            shares_NA = shares_NA / shares_NA.sum(dim=-1, keepdim=True)
        out_ND = torch.zeros_like(x_ND)
        for number, expert in enumerate(self.experts):
            rows_M, places_M = (chosen_NA == number).nonzero(as_tuple=True)
            # In training an expert without tokens runs too: every parameter has a gradient, which DDP waits for.
            if len(rows_M) or self.training:
                y_MD = expert(x_ND[rows_M]) * shares_NA[rows_M, places_M, None].to(x_ND.dtype)
                out_ND = out_ND.index_add(0, rows_M, y_MD.to(out_ND.dtype))
        return out_ND.view_as(x_BTD)


MaskKey = tuple[int, int]
"""Attention window, and the layer where its position bias is its own, else 0."""


@dataclass(frozen=True)
class Pass:
    """The inputs that all layers of a stack share in one forward pass.

    masks: by `Block.mask_key`. ropes: tables by `Block.rope`; a layer without is not rotated.
    """

    masks: dict[MaskKey, Mask]
    ropes: dict[RopeKind, tuple[Tensor, Tensor]]
    memory_BSD: Tensor | None = None
    memory_mask: Mask | None = None
    cache: KVCache | None = None
    attended: Attended | None = None
    distances: Distances | None = None


class Block(nn.Module):
    """Self-attention, optional cross-attention, and feed-forward, each with residual connection and norm.

    before, within, after: whether a norm is applied to what a part reads, to what it adds, and to the sum.
    """

    def __init__(self, config: ModelConfig, layer: int, *, cross: bool = False) -> None:
        super().__init__()
        self.layer, self.window, self.cross = layer, window_of(config, layer), cross
        self.mask_key: MaskKey = (self.window, layer if config.relative_bias_per_layer else 0)
        self.rope, self.scale, self.parallel = rope_of(config, layer), config.residual_scale, config.parallel
        self.before = config.norm_position in ("pre", "both")
        self.within = config.norm_position in ("output", "both")
        self.after = config.norm_position == "post"
        has_first = config.first_norm or layer > 0
        self.input_layernorm = make_norm(config) if has_first else nn.Identity()
        self.self_attn = Attention(config)
        if cross:
            self.cross_attention_layernorm = make_norm(config)
            self.cross_attn = Attention(config)
        if config.parallel != "shared":
            self.post_attention_layernorm = make_norm(config)
        if config.norm_position == "both":
            self.attention_output_layernorm = make_norm(config)
            self.mlp_output_layernorm = make_norm(config)
        if config.relative_bias_per_layer:
            self.relative_bias = nn.Embedding(config.n_relative_buckets, config.n_heads)
        self.mlp = Experts(config) if config.n_experts else FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, shared: Pass, query_BTD: Tensor | None = None) -> Tensor:
        """Run one layer; `query` replaces the input of the query projection (PanGu-Alpha's query layer)."""
        h_BTD = self.input_layernorm(x_BTD) if self.before else x_BTD
        mask, rope = shared.masks[self.mask_key], shared.ropes.get(self.rope)
        options = {"rope": rope, "cache": shared.cache, "layer": self.layer, "attended": shared.attended}
        # Keys and values of the query layer come from the hidden states, its queries from elsewhere.
        if query_BTD is None:
            y_BTD = self.self_attn(h_BTD, mask, distances=shared.distances, **options)
        else:
            y_BTD = self.self_attn(query_BTD, mask, memory_BSD=h_BTD, **options)
        if self.parallel != "none":
            h_BTD = self.post_attention_layernorm(x_BTD) if self.parallel == "separate" else h_BTD
            return x_BTD + self._scaled(self.dropout(y_BTD) + self.dropout(self.mlp(h_BTD)))
        x_BTD = self._join(x_BTD, y_BTD, "input_layernorm", "attention_output_layernorm")
        if self.cross:
            assert shared.memory_mask is not None, (
                "cross-attention needs the encoder's output, or a cache that contains it"
            )
            h_BTD = self.cross_attention_layernorm(x_BTD) if self.before else x_BTD
            y_BTD = self.cross_attn(
                h_BTD,
                shared.memory_mask,
                memory_BSD=shared.memory_BSD,
                cache=shared.cache,
                layer=self.layer,
                cross=True,
            )
            x_BTD = self._join(x_BTD, y_BTD, "cross_attention_layernorm")
        h_BTD = self.post_attention_layernorm(x_BTD) if self.before else x_BTD
        return self._join(x_BTD, self.mlp(h_BTD), "post_attention_layernorm", "mlp_output_layernorm")

    def _join(self, x_BTD: Tensor, y_BTD: Tensor, norm: str, output_norm: str = "") -> Tensor:
        """Add what a part returned; `norm` is the part's only norm, unless there is another for its output."""
        if self.within:
            # Under autocast a product is bfloat16, but the norm's weight is not: torch warns and takes a slow path.
            y_BTD = getattr(self, output_norm if self.before else norm)(y_BTD.to(x_BTD.dtype))
        x_BTD = x_BTD + self._scaled(self.dropout(y_BTD))
        return getattr(self, norm)(x_BTD) if self.after else x_BTD

    def _scaled(self, y_BTD: Tensor) -> Tensor:
        return y_BTD if self.scale == 1.0 else y_BTD * self.scale


class Stack(nn.Module):
    """Blocks with their common position encoding and, in pre-norm models, the final norm."""

    layers: Any
    sinusoids: Tensor

    def __init__(self, config: ModelConfig, n_layers: int, *, causal: bool, cross: bool = False) -> None:
        super().__init__()
        self.config, self.causal = config, causal
        width = config.d_embedding or config.d_model
        self.recompute = False  # activation checkpointing: recompute blocks in the backward pass
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_positions + config.position_offset, width)
        elif config.positions == "sinusoidal":
            table = sinusoidal_table(config.max_positions + config.position_offset, width, config.sinusoid_rates)
            self.register_buffer("sinusoids", table, persistent=False)
        elif config.positions == "disentangled":
            self.embed_distances = nn.Embedding(config.n_relative_buckets, config.d_model)
            self.distance_norm = make_norm(config)
        if has_shared_bias(config):
            self.relative_bias = nn.Embedding(config.n_relative_buckets, config.n_heads)
        if config.n_token_types:
            self.embed_token_types = nn.Embedding(config.n_token_types, width)
        if config.embedding_norm:
            self.embedding_norm = make_norm(config, width)
        if config.d_embedding:
            self.embed_projection = nn.Linear(config.d_embedding, config.d_model)
        n_blocks = 1 if config.share_layers else n_layers
        self.n_repeats = n_layers // n_blocks
        self.layers = nn.ModuleList(Block(config, layer, cross=cross) for layer in range(n_blocks))
        # PanGu-Alpha: one more block on top, which asks for the next token by its position (arXiv:2104.12369).
        if config.query_layer:
            self.query_embeddings = nn.Embedding(config.max_positions, config.d_model)
            self.query_layer = Block(config, n_layers)
        if config.norm_position != "post":
            self.norm = make_norm(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BTD: Tensor,
        *,
        documents_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        token_types_BT: Tensor | None = None,
        memory_BSD: Tensor | None = None,
        memory_documents_BS: Tensor | None = None,
        cache: KVCache | None = None,
        collect: list[Tensor] | None = None,
        attended: Attended | None = None,
    ) -> Tensor:
        """Return the last hidden states (B, T, D).

        `collect` receives the hidden states before and after every block, `attended` the queries, keys and values of
        the layers it lists.
        """
        T = x_BTD.shape[1]
        documents_BS = documents_BT if cache is None else cache.mark(T, documents_BT)
        if positions_BT is None:
            positions_BT = self.positions(x_BTD, documents_BS, cache)
        x_BTD = self.embed(x_BTD, positions_BT, token_types_BT)
        shared = self._share(x_BTD, documents_BS, positions_BT, memory_BSD, memory_documents_BS, cache)
        shared = replace(shared, attended=attended)
        for block in [*self.layers] * self.n_repeats:
            if collect is not None:
                collect.append(x_BTD)
            checkpoints = self.recompute and self.training
            x_BTD = checkpoint(block, x_BTD, shared, use_reentrant=False) if checkpoints else block(x_BTD, shared)
        if collect is not None:
            collect.append(x_BTD)
        x_BTD = self.normed(x_BTD)
        if self.config.query_layer:
            # After the final norm, as in the released code; its queries come from positions only.
            x_BTD = self.query_layer(x_BTD, shared, self.query_embeddings(positions_BT).expand_as(x_BTD))
        if cache is not None:
            cache.advance(T)
        return x_BTD

    def normed(self, x_BTD: Tensor) -> Tensor:
        """Return the output of the last block after the final norm, if there is one."""
        return x_BTD if self.config.norm_position == "post" else self.norm(x_BTD)

    def positions(self, x_BTD: Tensor, documents_BS: Tensor | None, cache: KVCache | None) -> Tensor:
        """Return the positions of the next tokens in their documents (B or 1, T)."""
        T = x_BTD.shape[1]
        if documents_BS is not None:  # counted over cached positions too, hence the slice
            return positions_within(documents_BS)[:, -T:]
        past = cache.length if cache is not None else 0
        return torch.arange(past, past + T, device=x_BTD.device)[None, :]

    def embed(self, x_BTD: Tensor, positions_BT: Tensor, token_types_BT: Tensor | None) -> Tensor:
        """Add position and token type embeddings to token embeddings, then norm and dropout."""
        config = self.config
        if config.positions == "learned":
            x_BTD = x_BTD + self.embed_positions(positions_BT + config.position_offset)
        elif config.positions == "sinusoidal":
            x_BTD = x_BTD + self.sinusoids[positions_BT + config.position_offset].to(x_BTD.dtype)
        if config.n_token_types:
            types = torch.zeros_like(positions_BT) if token_types_BT is None else token_types_BT
            x_BTD = x_BTD + self.embed_token_types(types)
        if config.embedding_norm:
            x_BTD = self.embedding_norm(x_BTD)
        x_BTD = self.dropout(x_BTD)
        return self.embed_projection(x_BTD) if config.d_embedding else x_BTD

    def _share(
        self,
        x_BTD: Tensor,
        documents_BS: Tensor | None,
        positions_BT: Tensor,
        memory_BSD: Tensor | None,
        memory_documents_BS: Tensor | None,
        cache: KVCache | None,
    ) -> Pass:
        config = self.config
        masks, memory_mask = self.masks(x_BTD, documents_BS, memory_BSD, memory_documents_BS, cache)
        # Once per forward pass: layers of the same kind share their tables. A cache has room for all that will follow.
        ropes = {}
        if config.positions == "rope":
            n_positions = x_BTD.shape[1] if cache is None else cache.max_len
            if config.rope_scaling == "longrope" and cache is None:  # documents of a packed row are shorter
                n_positions = int(positions_BT.max()) + 1
            blocks = [*self.layers, *([self.query_layer] if config.query_layer else [])]
            for kind in {block.rope for block in blocks if block.rope[0]}:
                ropes[kind] = rope_tables(config, positions_BT, kind, n_positions)
        distances = self._distances(x_BTD.shape[1], x_BTD.device) if config.positions == "disentangled" else None
        return Pass(masks, ropes, memory_BSD, memory_mask, cache, distances=distances)

    def _distances(self, n_positions: int, device: torch.device) -> Distances:
        """Return the states of the distances that occur among positions."""
        sizes = {"n_buckets": self.config.n_relative_buckets, "max_distance": self.config.max_relative_distance}
        low, high = signed_buckets(torch.tensor([1 - n_positions, n_positions - 1]), **sizes).tolist()
        states_RD = self.distance_norm(self.embed_distances(torch.arange(low, high + 1, device=device)))
        rows_TS = signed_buckets(-offsets(n_positions, n_positions, device), **sizes) - low
        return Distances(self.dropout(states_RD), rows_TS)

    def masks(
        self,
        x_BTD: Tensor,
        documents_BS: Tensor | None,
        memory_BSD: Tensor | None,
        memory_documents_BS: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[dict[MaskKey, Mask], Mask | None]:
        """Return the masks of T more positions: by `Block.mask_key`, and for the memory if there is one."""
        config, T = self.config, x_BTD.shape[1]
        S = T + (cache.length if cache is not None else 0)  # cached keys come first
        documents_BT = documents_BS[:, -T:] if documents_BS is not None else None
        shared_NTS = self._shared_bias(T, S, x_BTD.device)
        # Layers with the same window share a mask, unless each has a position bias of its own.
        blocks = {
            block.mask_key: block for block in [*self.layers, *([self.query_layer] if config.query_layer else [])]
        }
        masks = {
            key: build_mask(
                T,
                S,
                causal=self.causal,
                window=block.window,
                query_documents_BT=documents_BT,
                key_documents_BS=documents_BS,
                bias_NTS=self._bias(block.relative_bias, T, S, x_BTD.device)
                if config.relative_bias_per_layer
                else shared_NTS,
                device=x_BTD.device,
            )
            for key, block in blocks.items()
        }
        return masks, self._memory_mask(T, documents_BT, memory_documents_BS, memory_BSD, cache, x_BTD.device)

    def _memory_mask(
        self,
        T: int,
        documents_BT: Tensor | None,
        memory_documents_BS: Tensor | None,
        memory_BSD: Tensor | None,
        cache: KVCache | None,
        device: torch.device,
    ) -> Mask | None:
        # After the first step, the memory is only in the cache.
        if memory_BSD is None and (cache is None or cache.cross[0] is None):
            return None
        if memory_documents_BS is None:  # no padding: every query attends to the whole memory
            return Mask()
        if documents_BT is None:
            # Unpadded targets of padded sources: all queries belong to document 1, padding of the source is 0.
            documents_BT = torch.ones(memory_documents_BS.shape[0], T, dtype=torch.long, device=device)
        return build_mask(
            T,
            memory_documents_BS.shape[1],
            causal=False,
            query_documents_BT=documents_BT,
            key_documents_BS=memory_documents_BS,
            device=device,
        )

    def _shared_bias(self, n_queries: int, n_keys: int, device: torch.device) -> Tensor | None:
        """Return what all layers add to their scores (N, T, S), or None."""
        config = self.config
        if config.positions == "alibi":
            # A softmax ignores what all keys of a query have in common, so distances serve as well as key positions.
            slopes = alibi_slopes(config.n_heads).to(device) * config.alibi_scale
            return slopes[:, None, None] * offsets(n_queries, n_keys, device).float()
        return self._bias(self.relative_bias, n_queries, n_keys, device) if has_shared_bias(config) else None

    def bias_by_distance(self, block: Block, n_keys: int) -> Tensor | None:
        """Return what a causal block adds to its scores for keys 0, 1, ... before the query (N, S), or None."""
        per_layer, device = self.config.relative_bias_per_layer, block.self_attn.o_proj.weight.device
        bias_NTS = (
            self._bias(block.relative_bias, 1, n_keys, device) if per_layer else self._shared_bias(1, n_keys, device)
        )
        return None if bias_NTS is None else bias_NTS[:, 0].flip(-1)

    def _bias(self, table: nn.Embedding, n_queries: int, n_keys: int, device: torch.device) -> Tensor:
        buckets_TS = relative_buckets(
            offsets(n_queries, n_keys, device),
            causal=self.causal,
            n_buckets=self.config.n_relative_buckets,
            max_distance=self.config.max_relative_distance,
        )
        bias_NTS: Tensor = table(buckets_TS).permute(2, 0, 1)
        return bias_NTS
