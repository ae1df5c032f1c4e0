"""A Transformer encoder with its head as an ONNX graph, built from configuration and weights.

The graph is that of `model/transformer.py` for the inputs of published encoders: attention_mask is 1 for tokens and 0 for
padding. What differs from the forward pass in torch: projections of the same input are one product, tables of distances are
looked up instead of computed, and padding is a mask over keys only, as in transformers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmctl.config import ModelConfig
from llmctl.formats.onnx.graph import BOOL, FLOAT, Axes, Graph
from llmctl.formats.onnx.weights import IDS, Weights
from llmctl.model.positions import alibi_slopes, relative_buckets, rope_frequencies, signed_buckets, sinusoidal_table
from llmctl.model.shapes import complete, has_shared_bias, has_transform, rope_of, window_of
from llmctl.model.supports import AROUND_MATRICES, BLOCK, BLOCK_CHOICES, describe, unsupported

LOWEST = torch.finfo(torch.float32).min
MASK, TYPES = "attention_mask", "token_type_ids"


@dataclass(frozen=True)
class Ropes:
    """Cosines and sines of a kind of rotary embedding (T, R)."""

    cos: str
    sin: str
    width: int


def inputs_of(config: ModelConfig) -> tuple[str, ...]:
    """Return the names of a model's inputs; with one token type, all tokens are of it."""
    return (IDS, MASK, TYPES) if config.n_token_types > 1 else (IDS, MASK)


def outputs_of(config: ModelConfig, *, bare: bool) -> dict[str, Axes]:
    """Return the outputs by the names that transformers gives them, and their dimensions."""
    if config.head == "span" and config.n_labels:
        return {"start_logits": ["batch", "sequence"], "end_logits": ["batch", "sequence"]}
    if config.n_labels:
        return {
            "logits": ["batch", config.n_labels] if config.head == "text" else ["batch", "sequence", config.n_labels]
        }
    if bare:
        return {"last_hidden_state": ["batch", "sequence", config.d_model]}
    return {"logits": ["batch", "sequence", config.vocab_size]}


class Encoder:
    """Adds an encoder to a graph."""

    def __init__(self, config: ModelConfig, weights: Weights, *, bare: bool) -> None:
        self.config, self.weights, self.bare = complete(config), weights, bare
        self.graph = Graph({name: ["batch", "sequence"] for name in inputs_of(config)}, outputs_of(config, bare=bare))
        self.masks: dict[int, str] = {}
        self.ropes: dict[tuple[float, bool], Ropes] = {}

    def build(self) -> Graph:
        """Return the whole graph."""
        g, config = self.graph, self.config
        shape = g.op("Shape", IDS)
        self.n_tokens = g.op("Gather", shape, g.integer(1))
        self.positions = g.op("Range", g.integer(0), self.n_tokens, g.integer(1))
        x = self.embed()
        self.share()
        for layer in range(config.n_layers):
            with g.inside(f"layers.{layer}"):
                x = self.block(x, layer)
        if config.norm_position != "post":
            x = self.norm(x, "model.norm")
        with g.inside("head"):
            for value, name in zip(self.head(x), g.outputs, strict=True):
                g.name_output(value, name)
        return g

    # --- embeddings and what all layers share ------------------------------------------------------------------------

    def embed(self) -> str:
        """Return the inputs of the first layer."""
        g, config = self.graph, self.config
        with g.inside("embeddings"):
            x = self.weights.rows(g, IDS, "model.embed_tokens")
            x = x if config.embedding_scale == 1.0 else g.op("Mul", x, g.number(config.embedding_scale))
            if config.positions in ("learned", "sinusoidal"):
                x = g.op("Add", x, self.position_rows())
            if config.n_token_types == 1:
                x = g.op("Add", x, g.tensor("token_type", self.weights.plain("model.embed_token_types.weight")[0]))
            elif config.n_token_types:
                table = g.tensor("model.embed_token_types", self.weights.plain("model.embed_token_types.weight"))
                x = g.op("Add", x, g.op("Gather", table, TYPES))
            x = self.norm(x, "model.embedding_norm") if config.embedding_norm else x
            return self.weights.linear(g, x, "model.embed_projection") if config.d_embedding else x

    def position_rows(self) -> str:
        """Return the rows of the position table: by place, or with RoBERTa's offset, by tokens before that are no padding."""
        g, config = self.graph, self.config
        n_rows, width = config.max_positions + config.position_offset, config.d_embedding or config.d_model
        if config.positions == "sinusoidal":
            table = sinusoidal_table(n_rows, width, config.sinusoid_rates)
        else:
            table = self.weights.plain("model.embed_positions.weight")
        name = g.tensor("model.embed_positions", table)
        if not config.position_offset:
            return g.op("Slice", name, g.integers(0), g.op("Unsqueeze", self.n_tokens, g.integers(0)), g.integers(0))
        counts = g.op("Mul", g.op("CumSum", MASK, g.integer(1)), MASK)
        return g.op("Gather", name, g.op("Add", counts, g.integer(config.position_offset - 1)))

    def share(self) -> None:
        """Add what layers share: masks by window, rotary tables, tables of distances."""
        g, config = self.graph, self.config
        with g.inside("attention_mask"):
            is_token = g.op("Cast", MASK, to=BOOL)
            summand = g.op("Where", is_token, g.number(0.0), g.number(LOWEST))
            self.masks[0] = g.op("Unsqueeze", summand, g.integers(1, 2))  # (B, 1, 1, S)
            rows = g.op("Unsqueeze", self.positions, g.integers(1))
            self.offsets = g.op("Sub", self.positions, rows)  # key position - query position (T, S)
            windows = {window_of(config, layer) for layer in range(config.n_layers)} - {0}
            for window in sorted(windows):
                is_near = g.op("Less", g.op("Abs", self.offsets), g.integer(window))
                near = g.op("Where", is_near, g.number(0.0), g.number(LOWEST))
                self.masks[window] = g.op("Add", self.masks[0], near)
        if config.positions == "rope":
            for kind in {rope_of(config, layer) for layer in range(config.n_layers)}:
                if kind[0]:
                    self.ropes[kind] = self.rope_tables(kind)
        if config.positions == "alibi" or has_shared_bias(config):
            with g.inside("position_bias"):
                self.bias = self.position_bias("model.relative_bias")
        if config.positions == "disentangled":
            with g.inside("distances"):
                self.share_distances()

    def rope_tables(self, kind: tuple[float, bool]) -> Ropes:
        """Return the cosines and sines of all positions."""
        g, config = self.graph, self.config
        with g.inside("rotary"):
            frequencies, factor = rope_frequencies(config, kind, config.max_positions)
            rates = g.tensor(f"rotary.{kind[0]:g}.{int(kind[1])}", torch.cat([frequencies, frequencies]))
            turns = g.op("Unsqueeze", g.op("Cast", self.positions, to=FLOAT), g.integers(1))
            angles = g.op("Mul", turns, rates)
            tables = [g.op(function, angles) for function in ("Cos", "Sin")]
            if factor != 1.0:
                tables = [g.op("Mul", table, g.number(factor)) for table in tables]
        return Ropes(tables[0], tables[1], 2 * len(frequencies))

    def by_distance(self, table: str) -> str:
        """Return the rows (T, S, ...) of a table with a row for every distance, from the most negative on."""
        g = self.graph
        return g.op("Gather", table, g.op("Add", self.offsets, g.integer(self.config.max_positions - 1)))

    def all_offsets(self) -> Tensor:
        """Return all differences of a key's and a query's position."""
        longest = self.config.max_positions
        return torch.arange(1 - longest, longest)

    def position_bias(self, name: str) -> str:
        """Return what is added to the scores of all heads (N, T, S)."""
        g, config = self.graph, self.config
        offsets = self.all_offsets()
        if config.positions == "alibi":
            values = offsets[:, None].float() * alibi_slopes(config.n_heads) * config.alibi_scale
        else:
            buckets = relative_buckets(
                offsets, causal=False, n_buckets=config.n_relative_buckets, max_distance=config.max_relative_distance
            )
            values = self.weights.plain(f"{name}.weight")[buckets]
        return g.op("Transpose", self.by_distance(g.tensor(name, values)), perm=[2, 0, 1])

    def share_distances(self) -> None:
        """Add DeBERTa's states of distances, and which of them each pair of query and key has."""
        g, config = self.graph, self.config
        table = g.tensor("model.embed_distances", self.weights.plain("model.embed_distances.weight"))
        self.distances = g.op("Unsqueeze", self.norm(table, "model.distance_norm"), g.integers(0))
        rows = signed_buckets(
            -self.all_offsets(), n_buckets=config.n_relative_buckets, max_distance=config.max_relative_distance
        )
        pairs = self.by_distance(g.tensor("distance_rows", rows))
        batch = g.op("Gather", g.op("Shape", IDS), g.integers(0))
        tokens = g.op("Unsqueeze", self.n_tokens, g.integers(0))
        shape = g.op("Concat", batch, g.integers(config.n_heads), tokens, tokens, axis=0)
        self.pairs = [g.op("Expand", p, shape) for p in (pairs, g.op("Transpose", pairs, perm=[1, 0]))]

    # --- layers ------------------------------------------------------------------------------------------------------

    def block(self, x: str, layer: int) -> str:
        """Add one layer."""
        g, config = self.graph, self.config
        name = f"model.layers.{0 if config.share_layers else layer}."
        before, within = config.norm_position in ("pre", "both"), config.norm_position in ("output", "both")
        has_first = config.first_norm or not name.endswith(".0.")

        def joined(x: str, y: str, own: str, output: str) -> str:
            if within:
                y = self.norm(y, name + (output if before else own))
            x = g.op("Add", x, scaled(y))
            return self.norm(x, name + own) if config.norm_position == "post" else x

        def scaled(y: str) -> str:
            return y if config.residual_scale == 1.0 else g.op("Mul", y, g.number(config.residual_scale))

        h = self.norm(x, name + "input_layernorm") if before and has_first else x
        with g.inside("attention"):
            y = self.attention(h, name, layer)
        if config.parallel != "none":
            h = self.norm(x, name + "post_attention_layernorm") if config.parallel == "separate" else h
            return g.op("Add", x, scaled(g.op("Add", y, self.feed_forward(h, name))))
        x = joined(x, y, "input_layernorm", "attention_output_layernorm")
        h = self.norm(x, name + "post_attention_layernorm") if before else x
        with g.inside("mlp"):
            y = self.feed_forward(h, name)
        return joined(x, y, "post_attention_layernorm", "mlp_output_layernorm")

    def attention(self, x: str, name: str, layer: int) -> str:
        """Add the self-attention of a layer."""
        g, config = self.graph, self.config
        q, k, v = self.projected(x, name)
        if kind := self.ropes.get(rope_of(config, layer)):
            q, k = self.rotated(q, kind), self.rotated(k, kind)
        if config.qk_norm and config.qk_norm_kind == "rotated":
            q, k = self.rms_norm(q, name + "self_attn.q_norm"), self.rms_norm(k, name + "self_attn.k_norm")
        q = g.op("Mul", q, g.number(config.attention_scale))
        scores = g.op("MatMul", q, g.op("Transpose", self.for_queries(k), perm=[0, 1, 3, 2]))
        if config.positions == "disentangled":
            scores = g.op("Add", scores, self.distance_scores(q, k, name))
        if cap := config.attention_softcap:
            scores = g.op("Mul", g.op("Tanh", g.op("Div", scores, g.number(cap))), g.number(cap))
        if config.relative_bias_per_layer:
            scores = g.op("Add", scores, self.position_bias(name + "relative_bias"))
        elif config.positions == "alibi" or has_shared_bias(config):
            scores = g.op("Add", scores, self.bias)
        scores = g.op("Add", scores, self.masks[window_of(config, layer)])
        y = g.op("MatMul", g.op("Softmax", scores, axis=-1), self.for_queries(v))
        y = g.op("Transpose", y, perm=[0, 2, 1, 3])
        y = g.op("Reshape", y, g.integers(0, 0, config.n_heads * config.head_dim))
        return self.weights.linear(g, y, name + "self_attn.o_proj")

    def projected(self, x: str, name: str, *, is_constant: bool = False) -> tuple[str, str, str]:
        """Return queries, keys and values (B, N or K, T, H) of states."""
        g, config = self.graph, self.config
        widths = [n * config.head_dim for n in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
        names = [f"{name}self_attn.{part}_proj" for part in "qkv"]
        joined = self.weights.linear(g, x, *names, is_constant=is_constant)
        q, k, v = g.ops("Split", 3, joined, g.integers(*widths), axis=-1)
        normed = config.qk_norm_kind if config.qk_norm else ""
        if normed == "width":
            q, k = self.rms_norm(q, name + "self_attn.q_norm"), self.rms_norm(k, name + "self_attn.k_norm")
        q, k, v = self.heads(q, config.n_heads), self.heads(k, config.n_kv_heads), self.heads(v, config.n_kv_heads)
        if normed == "head":
            q, k = self.rms_norm(q, name + "self_attn.q_norm"), self.rms_norm(k, name + "self_attn.k_norm")
        return q, k, v

    def heads(self, x: str, n_heads: int) -> str:
        """Split states (B, T, N H) into heads (B, N, T, H)."""
        g = self.graph
        split = g.op("Reshape", x, g.integers(0, 0, n_heads, self.config.head_dim))
        return g.op("Transpose", split, perm=[0, 2, 1, 3])

    def for_queries(self, x: str) -> str:
        """Repeat the heads of keys or values (B, K, T, H) for the queries that share them (B, N, T, H)."""
        g, config = self.graph, self.config
        n_each = config.n_heads // config.n_kv_heads
        if n_each == 1:
            return x
        wide = g.op("Concat", *[g.op("Unsqueeze", x, g.integers(2))] * n_each, axis=2)  # (B, K, n, T, H)
        return g.op("Reshape", wide, g.integers(0, config.n_heads, -1, config.head_dim))

    def rotated(self, x: str, rope: Ropes) -> str:
        """Apply rotary embeddings to queries or keys (B, N, T, H)."""
        g, rest = self.graph, self.config.head_dim - rope.width
        half = rope.width // 2
        parts = [half, half, rest] if rest else [half, half]
        first, second, *others = g.ops("Split", len(parts), x, g.integers(*parts), axis=-1)
        turned = g.op("Concat", g.op("Neg", second), first, axis=-1)
        whole = g.op("Concat", first, second, axis=-1) if rest else x
        y = g.op("Add", g.op("Mul", whole, rope.cos), g.op("Mul", turned, rope.sin))
        return g.op("Concat", y, *others, axis=-1) if others else y

    def distance_scores(self, q: str, k: str, name: str) -> str:
        """Return DeBERTa's scores of contents with distances (B, N, T, S); queries are scaled already."""
        g, config = self.graph, self.config
        q_far, k_far, _ = self.projected(self.distances, name, is_constant=True)
        q_far = g.op("Mul", q_far, g.number(config.attention_scale))
        to_position, to_content = (
            g.op("MatMul", x, g.op("Transpose", self.for_queries(far), perm=[0, 1, 3, 2]))
            for x, far in ((q, k_far), (self.for_queries(k), q_far))
        )
        first = g.op("GatherElements", to_position, self.pairs[0], axis=-1)
        second = g.op("GatherElements", to_content, self.pairs[1], axis=-1)
        return g.op("Add", first, g.op("Transpose", second, perm=[0, 1, 3, 2]))

    def feed_forward(self, x: str, name: str) -> str:
        """Add the feed-forward layer of a block."""
        g, config = self.graph, self.config
        if config.gated:
            joined = self.weights.linear(g, x, name + "mlp.gate_proj", name + "mlp.up_proj")
            gate, up = g.ops("Split", 2, joined, g.integers(config.d_ff, config.d_ff), axis=-1)
            x = g.op("Mul", self.activated(gate, config.activation), up)
        else:
            x = self.activated(self.weights.linear(g, x, name + "mlp.up_proj"), config.activation)
        return self.weights.linear(g, x, name + "mlp.down_proj")

    def activated(self, x: str, kind: str) -> str:
        """Apply an activation."""
        g = self.graph
        if kind == "gelu":
            bent = g.op("Add", g.op("Erf", g.op("Div", x, g.number(2.0**0.5))), g.number(1.0))
            return g.op("Mul", g.op("Mul", x, bent), g.number(0.5))
        if kind == "gelu_tanh":
            cubed = g.op("Mul", g.op("Pow", x, g.number(3.0)), g.number(0.044715))
            inner = g.op("Mul", g.op("Add", x, cubed), g.number((2.0 / torch.pi) ** 0.5))
            return g.op("Mul", g.op("Mul", x, g.number(0.5)), g.op("Add", g.op("Tanh", inner), g.number(1.0)))
        if kind == "silu":
            return g.op("Mul", x, g.op("Sigmoid", x))
        if kind == "relu2":
            positive = g.op("Relu", x)
            return g.op("Mul", positive, positive)
        return g.op({"relu": "Relu", "tanh": "Tanh"}[kind], x)

    def norm(self, x: str, name: str) -> str:
        """Apply a norm of the model's kind."""
        g, config = self.graph, self.config
        if config.norm == "rmsnorm":
            return self.rms_norm(x, name)
        width = config.d_embedding if name == "model.embedding_norm" and config.d_embedding else config.d_model
        weight = self.weights.plain(f"{name}.weight") if config.norm_weight else torch.ones(width)
        parts = [g.tensor(f"{name}.weight", weight)]
        if config.norm_weight and config.norm_bias:
            parts.append(g.tensor(f"{name}.bias", self.weights.plain(f"{name}.bias")))
        return g.op("LayerNormalization", x, *parts, axis=-1, epsilon=config.norm_eps)

    def rms_norm(self, x: str, name: str) -> str:
        """Divide by the root mean square over the last dimension, and scale."""
        g, config = self.graph, self.config
        mean = g.op("ReduceMean", g.op("Pow", x, g.number(2.0)), axes=[-1], keepdims=1)
        y = g.op("Div", x, g.op("Sqrt", g.op("Add", mean, g.number(config.norm_eps))))
        has_weight = config.norm_weight or "self_attn" in name
        return g.op("Mul", g.tensor(f"{name}.weight", self.weights.plain(f"{name}.weight")), y) if has_weight else y

    # --- heads -------------------------------------------------------------------------------------------------------

    def head(self, x: str) -> list[str]:
        """Return the outputs."""
        g, config = self.graph, self.config
        if config.n_labels and config.head == "text":
            x = self.pooled(x)
            if config.pooled_activation != "none":
                x = self.activated(self.weights.linear(g, x, "classifier_dense"), config.pooled_activation)
            return [self.weights.linear(g, x, "classifier")]
        if self.bare and not config.n_labels:
            return [x]
        if has_transform(config):
            x = self.activated(self.weights.linear(g, x, "head_dense"), config.activation)
            x = self.norm(x, "head_norm")
        if config.n_labels:
            x = self.weights.linear(g, x, "classifier")
            if config.head == "tokens":
                return [x]
            return [g.op("Squeeze", part, g.integers(-1)) for part in g.ops("Split", 2, x, g.integers(1, 1), axis=-1)]
        return [self.vocabulary(x)]

    def vocabulary(self, x: str) -> str:
        """Return the logits over the vocabulary."""
        g, config = self.graph, self.config
        if config.d_embedding and not config.head_transform:
            x = g.op("MatMul", x, g.tensor("head_projection", self.weights.plain("model.embed_projection.weight")))
        x = x if config.logits_scale == 1.0 else g.op("Mul", x, g.number(config.logits_scale))
        x = self.weights.linear(g, x, "lm_head")
        if cap := config.logits_softcap:
            x = g.op("Mul", g.op("Tanh", g.op("Div", x, g.number(cap))), g.number(cap))
        return x

    def pooled(self, x: str) -> str:
        """Return one state per text (B, D): the first, the last, or the mean without padding."""
        g, config = self.graph, self.config
        if config.pooling == "first":
            return g.op("Gather", x, g.integer(0), axis=1)
        if config.pooling == "last":
            last = g.op("ReduceMax", g.op("Mul", MASK, self.positions), axes=[1], keepdims=1)
            return g.op("GatherND", x, last, batch_dims=1)
        weight = g.op("Cast", g.op("Unsqueeze", MASK, g.integers(2)), to=FLOAT)
        total = g.op("ReduceSum", g.op("Mul", x, weight), g.integers(1), keepdims=0)
        return g.op("Div", total, g.op("Max", g.op("ReduceSum", weight, g.integers(1), keepdims=0), g.number(1.0)))


KNOWN = (
    BLOCK
    | AROUND_MATRICES
    | {
        *("norm_weight", "first_norm", "parallel", "residual_scale", "d_embedding", "share_layers", "alibi_scale"),
        *("relative_bias", "relative_bias_per_layer", "head", "norm_position", "positions", "activation"),
    }
)
CHOICES = BLOCK_CHOICES | {"family": ("encoder",), "query_layer": (False,)}


def obstacle_in(config: ModelConfig) -> str:
    """Return what about a model this graph does not express; nothing where it is an encoder."""
    if config.family == "decoder":
        return "is a decoder"
    if config.family == "encoder_decoder":
        return "is an encoder-decoder"
    if config.rope_scaling == "longrope" and config.positions == "rope":
        return "has rotary frequencies that depend on the length of a text"
    names = unsupported(complete(config), KNOWN, CHOICES)
    return f"is an encoder of another block ({describe(config, names)})" if names else ""
