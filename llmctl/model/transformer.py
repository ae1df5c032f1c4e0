"""One block, three families: decoder, encoder and encoder-decoder from the same attention and feed-forward code.

Parameter names are `LlamaForCausalLM`'s where it has the part, so that the default decoder and encoder are written
to disk as they are. `hidden()` and `head()` are separate: a loss works through the vocabulary in chunks and never
holds a (tokens x vocabulary) float32 tensor. No files, no devices, no ranks.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmctl.config import ModelConfig
from llmctl.model.attention import Attended
from llmctl.model.cache import KVCache
from llmctl.model.shapes import complete
from llmctl.model.stack import ACTIVATIONS, Stack, make_norm
from llmctl.quant.learned import TunedLinear
from llmctl.quant.linear import QuantEmbedding, QuantLinear
from llmctl.quant.schemes import Scheme
from llmctl.quant.weight import PARTS, QuantWeight


class LanguageModel(nn.Module):
    """Any model of the family tree: embeddings, one or two stacks, and a head over the vocabulary or over labels.

    Raises: UsageError at construction when the config contradicts itself.
    """

    model: Any  # a Stack, or a module holding two; torch types attributes of modules as tensors
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
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        if config.n_labels:
            has_dense = config.pooled_activation != "none"
            if has_dense:
                self.classifier_dense = nn.Linear(config.d_model, config.d_model)
            self.classifier = nn.Linear(config.d_model, config.n_labels, bias=has_dense)
            self.dropout = nn.Dropout(config.dropout)
            return
        if config.head_transform:
            self.head_dense = nn.Linear(config.d_model, config.d_model)
            self.head_norm = make_norm(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=config.logits_bias)
        self.tie()

    def multiply_out(self) -> None:
        """Replace what is held in few bits by plain layers with the weights that the codes mean."""
        packed = [(name, module) for name, module in self.named_modules() if isinstance(module, QuantWeight)]
        for name, module in packed:
            weight = nn.Parameter(module.weight.to(self.dtype))
            plain: Any = nn.Embedding(module.n_out, module.n_in, device="meta")
            if isinstance(module, QuantLinear):
                plain = nn.Linear(module.n_in, module.n_out, bias=module.bias is not None, device="meta")
                plain.bias = None if module.bias is None else nn.Parameter(module.bias)
            plain.weight = weight
            put_module(self, name, plain)
        if packed:
            self.tie()

    def stacks(self) -> list[Stack]:
        """Return the stacks: one, or an encoder and a decoder."""
        is_pair = self.config.family == "encoder_decoder"
        return [self.model.encoder, self.model.decoder] if is_pair else [self.model]

    def tie(self) -> None:
        """Let the head over the vocabulary use the embedding's weight, where the config says so."""
        if self.config.tie_embeddings and not self.config.n_labels:
            embedding = self.model.embed_tokens
            if isinstance(embedding, QuantWeight):
                for name in PARTS:
                    if hasattr(embedding, name):
                        setattr(self.lm_head, name, getattr(embedding, name))
            else:
                self.lm_head.weight = embedding.weight

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.some_parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of its activations."""
        return self.some_parameter.dtype

    @property
    def n_parameters(self) -> int:
        """How many numbers the weights stand for, a tied one counted once, one in few bits like any other."""
        held = {id(one.weight_packed): one.n_out * one.n_in for one in self.modules() if isinstance(one, QuantWeight)}
        plain = sum(parameter.numel() for parameter in self.parameters())
        return plain + sum(held.values()) + sum(one.n_more for one in self.modules() if isinstance(one, TunedLinear))

    @property
    def some_parameter(self) -> Tensor:
        """A parameter that is there whatever is held in few bits: norms are not."""
        return next(self.parameters())

    @property
    def schemes(self) -> dict[str, Scheme]:
        """The schemes of what is held in few bits, as `quantize` takes them."""
        found = {name: module.scheme for name, module in self.named_modules() if isinstance(module, QuantWeight)}
        if self.config.tie_embeddings:
            found.pop("lm_head", None)
        return found

    def quantize(self, schemes: Mapping[str, Scheme]) -> None:
        """Replace modules by empty ones that hold their weight in few bits; a tied head goes with the embedding.

        Shapes: name of a linear map, or `model.embed_tokens` -> scheme.
        """
        for name, scheme in schemes.items():
            module: Any = self.get_submodule(name)
            if isinstance(module, nn.Embedding):
                put_module(self, name, QuantEmbedding(module.num_embeddings, module.embedding_dim, scheme))
                if self.config.tie_embeddings and not self.config.n_labels:
                    head = QuantLinear(
                        self.config.d_model, self.config.vocab_size, scheme, bias=self.config.logits_bias
                    )
                    self.lm_head = head  # type: ignore[assignment]
                continue
            has_bias = module.bias is not None
            put_module(self, name, QuantLinear(module.in_features, module.out_features, scheme, bias=has_bias))
        self.tie()

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
        """Return the hidden states under the head (B, T, D): of the decoder in an encoder-decoder.

        `documents` numbers the documents of a packed row from 1; 0 is padding. None means that each row is one
        document without padding. A document never attends to another.
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
        """Return the encoder's hidden states (B, S, D) of an encoder-decoder."""
        return self.model.encoder(self.embed(input_ids_BS), documents_BT=documents_BS)

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
        """Return the decoder's hidden states (B, T, D) over an encoder's output, or over the cache of it."""
        return self.model.decoder(
            self.embed(decoder_input_ids_BT),
            documents_BT=documents_BT,
            memory_BSD=memory_BSD,
            memory_documents_BS=memory_documents_BS,
            cache=cache,
            collect=collect,
            attended=attended,
        )

    def head_input(self, hidden: Tensor) -> Tensor:
        """Return what the head's matrix multiplies: the transformed, scaled hidden states (..., D)."""
        if self.config.head_transform:
            hidden = self.head_norm(ACTIVATIONS[self.config.activation](self.head_dense(hidden)))
        return hidden if self.config.logits_scale == 1.0 else hidden * self.config.logits_scale

    def head(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) of hidden states (..., D)."""
        return self.lm_head(self.head_input(hidden))

    def pooled(
        self,
        input_ids_BT: Tensor,
        *,
        documents_BT: Tensor | None = None,
        token_types_BT: Tensor | None = None,
        pooling: str = "",
    ) -> Tensor:
        """Return one state per row (B, D), padding left out; `pooling` other than the config's may be asked for.

        The decoder of an encoder-decoder reads the input moved right by one, as BART's classifier does (Lewis et al.
        2020, arXiv:1910.13461, section 3.1).
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
        state_BD = self.pooled(input_ids_BT, **inputs)
        if self.config.pooled_activation != "none":
            activation = torch.tanh if self.config.pooled_activation == "tanh" else F.gelu
            state_BD = activation(self.classifier_dense(state_BD))
        return self.classifier(self.dropout(state_BD))

    def forward(self, input_ids_BT: Tensor, **inputs: Any) -> Tensor:
        """Return logits (B, T, V); see `hidden` for the inputs."""
        return self.head(self.hidden(input_ids_BT, **inputs))

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Return the scaled embeddings of tokens (B, T, D)."""
        x_BTD = self.model.embed_tokens(ids_BT)
        return x_BTD if self.config.embedding_scale == 1.0 else x_BTD * self.config.embedding_scale


def pool(states_BTD: Tensor, documents_BT: Tensor | None, pooling: str) -> Tensor:
    """Return the first, the last or the mean state of each row (B, D); positions of document 0 are padding."""
    if pooling == "first":
        return states_BTD[:, 0]
    if documents_BT is None:
        return states_BTD[:, -1] if pooling == "last" else states_BTD.mean(dim=1)
    is_real_BT = documents_BT != 0
    if pooling == "mean":
        sums_BD = (states_BTD * is_real_BT[..., None]).sum(dim=1)
        return sums_BD / is_real_BT.sum(dim=1, keepdim=True).clamp(min=1)
    places_T = torch.arange(states_BTD.shape[1], device=states_BTD.device)
    last_B = (is_real_BT * places_T).amax(dim=1)
    return states_BTD[torch.arange(len(last_B), device=last_B.device), last_B]


def with_tied(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a whole state dict from one in which a tied head stands once, under the embedding's name."""
    state = dict(tensors)
    if config.tie_embeddings and not config.n_labels:
        for part in ("weight", *PARTS):
            if f"model.embed_tokens.{part}" in state:
                state.setdefault(f"lm_head.{part}", state[f"model.embed_tokens.{part}"])
    return state


def put_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in another's place."""
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent), last, module)


def load_tensors(model: LanguageModel, tensors: Mapping[str, Tensor]) -> None:
    """Load a state dict, tied weights once or twice."""
    model.load_state_dict(with_tied(model.config, tensors))


def initialize(model: LanguageModel, seed: int) -> None:
    """Draw the initial weights, reproducibly, whatever was drawn before.

    Normal with `init_std`; the projections back into the residual stream of a pre-norm model are divided by
    sqrt(2 layers) (GPT-2, Radford et al. 2019, section 2.3). Where the scores are not scaled (T5), the queries take
    the scale over, as in Raffel et al. 2020.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    n_layers = max(config.n_layers, config.n_decoder_layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.ones_(parameter)
            continue
        std = config.init_std
        if config.norm_position == "pre" and name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= (2 * n_layers) ** 0.5
        if name.endswith("q_proj.weight") and config.attention_scale == 1.0:
            std *= config.head_dim**-0.5
        nn.init.normal_(parameter, std=std, generator=generator)
