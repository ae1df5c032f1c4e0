"""The language model: decoder, encoder and encoder-decoder built from the same blocks.

Parameters have `LlamaForCausalLM`'s names where possible, so that the default decoder and encoder are stored without
renaming. `hidden()` and `head()` are separate because losses process the vocabulary in chunks and never materialize a
(tokens x vocabulary) float32 tensor. No files, no devices, no ranks.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmctl.config import ModelConfig
from llmctl.model.attention import Attended
from llmctl.model.cache import CACHES, KVCache
from llmctl.model.pooling import pool
from llmctl.model.shapes import complete, has_classifier_bias, has_transform
from llmctl.model.stack import ACTIVATIONS, Stack, make_norm
from llmctl.quant.learned import TunedLinear
from llmctl.quant.weight import PARTS, QuantWeight

POOLED_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "gelu": F.gelu, "relu": F.relu}


class LanguageModel(nn.Module):
    """A model of any family: embeddings, one or two stacks, and a vocabulary or classification head.

    Raises: UsageError if the config is inconsistent.
    """

    pads_left = True
    """Whether rows of different lengths are generated together, padded on the left, and share cached prefixes."""

    model: Any  # a Stack, or a module with two; torch types attributes of modules as tensors
    lm_head: nn.Linear
    classifier: nn.Linear

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config = complete(config)
        if config.family == "encoder_decoder":
            self.model = nn.Module()
            self.model.encoder = Stack(config, config.n_layers, causal=False)
            self.model.decoder = Stack(config, config.n_decoder_layers, causal=True, cross=True)
        else:
            self.model = Stack(config, config.n_layers, causal=config.family == "decoder")
        width = config.d_embedding or config.d_model
        self.model.embed_tokens = nn.Embedding(config.vocab_size, width)
        if config.source_vocab_size:
            self.model.encoder.embed_tokens = nn.Embedding(config.source_vocab_size, width)
        if has_transform(config):
            transformed = config.d_model if config.n_labels else width
            self.head_dense = nn.Linear(config.d_model, transformed, bias=config.head_transform_bias)
            self.head_norm = make_norm(config, transformed)
        if config.n_labels:
            if config.pooled_activation != "none":
                self.classifier_dense = nn.Linear(config.d_model, config.d_model)
            self.classifier = nn.Linear(config.d_model, config.n_labels, bias=has_classifier_bias(config))
            self.dropout = nn.Dropout(config.dropout)
            return
        self.lm_head = nn.Linear(width, config.vocab_size, bias=config.logits_bias)
        self.tie()

    def stacks(self) -> list[Stack]:
        """Return the single stack, or encoder and decoder."""
        is_pair = self.config.family == "encoder_decoder"
        return [self.model.encoder, self.model.decoder] if is_pair else [self.model]

    def tie(self) -> None:
        """Share the embedding's weight with the vocabulary head, if the config ties them."""
        if self.config.tie_embeddings and not self.config.n_labels:
            embedding = self.model.embed_tokens
            if isinstance(embedding, QuantWeight):  # packed tensors are buffers, so each is shared by itself
                for name in PARTS:
                    if hasattr(embedding, name):
                        setattr(self.lm_head, name, getattr(embedding, name))
            else:
                self.lm_head.weight = embedding.weight

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.some_parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations."""
        return self.some_parameter.dtype

    @property
    def n_parameters(self) -> int:
        """The number of parameters: a tied weight counts once, a quantized weight like an unquantized one."""
        quantized = [module for module in self.modules() if isinstance(module, QuantWeight)]
        packed = {id(module.weight_packed): module.n_out * module.n_in for module in quantized}  # by id: tied ones once
        plain = sum(parameter.numel() for parameter in self.parameters())
        more = sum(module.n_more for module in self.modules() if isinstance(module, TunedLinear))
        return plain + sum(packed.values()) + more

    @property
    def some_parameter(self) -> Tensor:
        """Any parameter; norms always are parameters, since they are never quantized."""
        return next(self.parameters())

    def hidden(
        self,
        input_ids_BT: Tensor,
        *,
        documents_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        token_types_BT: Tensor | None = None,
        decoder_input_ids_BT: Tensor | None = None,
        decoder_documents_BT: Tensor | None = None,
        cache: KVCache | None = None,
        collect: list[Tensor] | None = None,
        attended: Attended | None = None,
    ) -> Tensor:
        """Return the last hidden states (B, T, D), in an encoder-decoder those of the decoder.

        `documents` numbers the documents of a packed row from 1; 0 is padding; None means one document per row without
        padding. Documents do not attend to each other.
        """
        if self.config.family == "encoder_decoder":
            assert decoder_input_ids_BT is not None, "an encoder-decoder needs decoder_input_ids_BT"
            memory_BSD = self.encode(input_ids_BT, documents_BS=documents_BT)
            return self.decode(
                decoder_input_ids_BT,
                memory_BSD,
                memory_documents_BS=documents_BT,
                documents_BT=decoder_documents_BT,
                cache=cache,
                collect=collect,
                attended=attended,
            )
        return self.model(
            self.embed(input_ids_BT),
            documents_BT=documents_BT,
            positions_BT=positions_BT,
            token_types_BT=token_types_BT,
            cache=cache,
            collect=collect,
            attended=attended,
        )

    def encode(self, input_ids_BS: Tensor, *, documents_BS: Tensor | None = None) -> Tensor:
        """Return the hidden states (B, S, D) of an encoder-decoder's encoder."""
        table = self.model.encoder.embed_tokens if self.config.source_vocab_size else None
        return self.model.encoder(self.embed(input_ids_BS, table), documents_BT=documents_BS)

    def decode(
        self,
        decoder_input_ids_BT: Tensor,
        memory_BSD: Tensor | None,
        *,
        memory_documents_BS: Tensor | None = None,
        documents_BT: Tensor | None = None,
        cache: KVCache | None = None,
        collect: list[Tensor] | None = None,
        attended: Attended | None = None,
    ) -> Tensor:
        """Return the decoder's hidden states (B, T, D), given the encoder's output or a cache of it."""
        return self.model.decoder(
            self.embed(decoder_input_ids_BT),
            documents_BT=documents_BT,
            memory_BSD=memory_BSD,
            memory_documents_BS=memory_documents_BS,
            cache=cache,
            collect=collect,
            attended=attended,
        )

    def new_cache(self, kv: str, batch: int, n_positions: int) -> KVCache:
        """Return an empty cache; `kv` is a key of `CACHES`."""
        return CACHES[kv](self.config, batch, n_positions, dtype=self.dtype, device=self.device)

    def head_input(self, hidden: Tensor) -> Tensor:
        """Return the input of the head's matrix: transformed, scaled hidden states (..., D)."""
        if self.config.head_transform:
            hidden = self.transformed(hidden)
        elif self.config.d_embedding:  # as wide as the embeddings without parameters of its own
            hidden = hidden @ self.model.embed_projection.weight
        return hidden if self.config.logits_scale == 1.0 else hidden * self.config.logits_scale

    def transformed(self, hidden: Tensor) -> Tensor:
        """Return hidden states after the dense layer, the activation and the norm before a head."""
        states: Tensor = self.head_norm(ACTIVATIONS[self.config.activation](self.head_dense(hidden)))
        return states

    def head(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) of hidden states (..., D)."""
        return self.capped(self.lm_head(self.head_input(hidden)))

    def capped(self, logits: Tensor) -> Tensor:
        """Return logits with the model's soft cap, if it has one (Gemma 2, arXiv:2408.00118)."""
        cap = self.config.logits_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def pooled(
        self,
        input_ids_BT: Tensor,
        *,
        documents_BT: Tensor | None = None,
        token_types_BT: Tensor | None = None,
        pooling: str = "",
    ) -> Tensor:
        """Return one pooled state per row (B, D), ignoring padding; `pooling` overrides the config's.

        An encoder-decoder's decoder gets the input shifted right by one, as in BART's classifier (Lewis et al. 2020,
        arXiv:1910.13461, section 3.1).
        """
        inputs: dict[str, Any] = {"token_types_BT": token_types_BT}
        if self.config.family == "encoder_decoder":
            starts = input_ids_BT.new_full((len(input_ids_BT), 1), max(self.config.decoder_start_id, 0))
            moved = torch.cat([starts, input_ids_BT[:, :-1]], dim=1)
            inputs = {"decoder_input_ids_BT": moved, "decoder_documents_BT": documents_BT}
        states_BTD = self.hidden(input_ids_BT, documents_BT=documents_BT, **inputs)
        return pool(states_BTD, documents_BT, pooling or self.config.pooling)

    def classify(self, input_ids_BT: Tensor, **inputs: Any) -> Tensor:
        """Return the outputs of the classification head (B, n_labels); see `pooled` for the inputs."""
        assert self.config.head == "text", "a head over tokens has no output for a whole text: see `label_tokens`"
        state_BD = self.pooled(input_ids_BT, **inputs)
        if self.config.pooled_activation != "none":
            state_BD = POOLED_ACTIVATIONS[self.config.pooled_activation](self.classifier_dense(state_BD))
        return self.classifier(self.dropout(state_BD))

    def label_tokens(self, input_ids_BT: Tensor, **inputs: Any) -> Tensor:
        """Return the outputs of a head over tokens (B, T, n_labels); see `hidden` for the inputs."""
        assert self.config.head != "text", "this head has one output for a whole text: see `classify`"
        states_BTD = self.hidden(input_ids_BT, **inputs)
        if self.config.head_transform:
            states_BTD = self.transformed(states_BTD)
        outputs_BTL: Tensor = self.classifier(self.dropout(states_BTD))
        return outputs_BTL

    def forward(self, input_ids_BT: Tensor, **inputs: Any) -> Tensor:
        """Return logits (B, T, V); see `hidden` for the inputs."""
        return self.head(self.hidden(input_ids_BT, **inputs))

    def embed(self, ids_BT: Tensor, table: nn.Module | None = None) -> Tensor:
        """Return the scaled embeddings of tokens (B, T, D), by another table than the head's if it is given."""
        x_BTD = (table or self.model.embed_tokens)(ids_BT)
        return x_BTD if self.config.embedding_scale == 1.0 else x_BTD * self.config.embedding_scale


def with_tied(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Complete a state dict that contains a tied weight only under the embedding's name."""
    state = dict(tensors)
    if config.tie_embeddings and not config.n_labels:
        for part in ("weight", *PARTS):
            if f"model.embed_tokens.{part}" in state:
                state.setdefault(f"lm_head.{part}", state[f"model.embed_tokens.{part}"])
    return state


def load_tensors(model: LanguageModel, tensors: Mapping[str, Tensor]) -> None:
    """Load a state dict that contains tied weights once or twice."""
    model.load_state_dict(with_tied(model.config, tensors))
    model.tie()  # scales of another dtype than the module's are in new buffers


def assign_tensors(model: LanguageModel, tensors: Mapping[str, Tensor]) -> None:
    """Use the tensors of a state dict as the weights of a model that has none yet, without copying them."""
    model.load_state_dict(with_tied(model.config, tensors), assign=True)
    model.tie()


def initialize(model: LanguageModel, seed: int) -> None:
    """Initialize the weights, depending only on the seed.

    Normal with `init_std`; output projections to the residual stream of a pre-norm model are divided by sqrt(2 layers)
    (GPT-2, Radford et al. 2019, section 2.3). If attention scores are not scaled (T5), query projections are scaled
    instead, as in Raffel et al. 2020.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    n_layers = max(config.n_layers, config.n_decoder_layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:  # biases and norms
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.ones_(parameter)
            continue
        std = config.init_std
        if config.norm_position != "post" and name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= (2 * n_layers) ** 0.5
        if name.endswith("q_proj.weight") and config.attention_scale == 1.0:
            std *= config.head_dim**-0.5
        nn.init.normal_(parameter, std=std, generator=generator)
