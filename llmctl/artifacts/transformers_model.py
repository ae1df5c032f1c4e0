"""A model that transformers computes, with the methods of `LanguageModel` that teaching and evaluating need.

The states before the head are taken where the published model multiplies them with its output embeddings, so that the
losses can process the vocabulary in chunks. What that leaves open (a scale or a soft cap of the logits, whether documents
of a packed row see each other, whether a cache gives the same) is measured once, when the model is loaded.
"""

from collections.abc import Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from llmctl.config import ModelConfig
from llmctl.errors import ArtifactError, UnsupportedModelError
from llmctl.formats.transformers_backend import (
    AUTO_CLASSES,
    TransformersArtifact,
    one_line,
    published_config,
    refused_by_transformers,
)
from llmctl.model.attention import Attended
from llmctl.model.cache import KVCache
from llmctl.model.stack import Stack
from llmctl.model.transformer import LanguageModel

TOLERANCE = 1e-4
"""Largest difference, relative to the largest logit, by which two ways to compute the same differ."""

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What the argument and the output of the cache are called, by transformers' version and architecture."""

MOST_PER_BYTE = 8
"""Parameters that a byte of a file can hold: codes of 2 bits, in a matrix that is also the head."""

PROBE_TOKENS = 24
"""Tokens of the row on which a model is measured when it is loaded."""


class TransformersModel(LanguageModel):
    """A frozen model of transformers.

    packs: documents of a packed row do not see each other if their positions restart. caches: generation with a cache
    gives the same as without.
    Raises: UnsupportedModelError if its logits are not those of its output embeddings.
    """

    pads_left = False

    def __init__(self, published: Any, config: ModelConfig, name: str) -> None:
        nn.Module.__init__(self)
        self.config, self.published, self.name = config, published, name
        self.scale, self.packs, self.caches = 1.0, False, False
        arguments = signature(published.forward).parameters
        self.cache_name = next((name for name in CACHE_NAMES if name in arguments), CACHE_NAMES[0])
        head = published.get_output_embeddings()
        if not isinstance(getattr(head, "weight", None), Tensor) or head.weight.dim() != 2:
            raise self.refused("it has no matrix of output embeddings")
        self.lm_head = head
        self.seen: list[Tensor] = []
        with torch.no_grad():
            self.measure_head()
            self.measure_rows()

    def refused(self, why: str) -> UnsupportedModelError:
        """Return the error for a model that cannot teach."""
        return UnsupportedModelError(
            f"{self.name} cannot be used through transformers: {why}", "use a teacher of another architecture"
        )

    def stacks(self) -> list[Stack]:
        """Return no stacks of ours."""
        return []

    # --- what is measured once ---------------------------------------------------------------------------------------

    def measure_head(self) -> None:
        """Find scale and soft cap of the logits; then let the model skip its head, which the losses apply in chunks.

        Raises: UnsupportedModelError if the logits are not cap(scale * (states @ weight.T + bias)).
        """
        ids_BT = self.probe_ids(1, PROBE_TOKENS)
        hook = self.lm_head.register_forward_pre_hook(lambda _, inputs: self.seen.append(inputs[0]))
        try:
            logits_NV = self.run(ids_BT).logits.float().flatten(0, -2)
        finally:
            hook.remove()
        if len(self.seen) != 1:
            raise self.refused(f"its output embeddings are used {len(self.seen)} times")
        states_ND = self.seen.pop().flatten(0, -2)
        own_NV = torch.nn.functional.linear(states_ND, self.lm_head.weight, self.lm_head.bias).float()
        caps = [0.0, *caps_of(self.published.config)]
        for cap in caps:
            straight_NV = cap * torch.atanh((logits_NV / cap).clamp(-0.999, 0.999)) if cap else logits_NV
            scale = float((own_NV * straight_NV).sum() / own_NV.square().sum().clamp(min=1e-30))
            scale = round(scale, 5) if abs(scale - round(scale, 5)) < 1e-6 else scale
            again_NV = own_NV * scale
            if are_close(cap * torch.tanh(again_NV / cap) if cap else again_NV, logits_NV):
                self.config = replace(self.config, logits_softcap=cap)
                break
        else:
            raise self.refused("its logits are not those of its output embeddings")
        self.scale = scale
        bias = self.lm_head.bias
        own_head = nn.Linear(1, 1, bias=False, device="meta")
        own_head.in_features, own_head.out_features = self.lm_head.weight.shape[::-1]
        own_head.weight = self.lm_head.weight
        if bias is not None:
            own_head.bias = nn.Parameter(bias * scale) if scale != 1.0 else bias
        published_head, self.lm_head = self.lm_head, own_head

        def keep(states: Tensor) -> Tensor:
            self.seen.append(states)
            return states[..., :1]

        published_head.forward = keep  # type: ignore[method-assign,assignment]

    def measure_rows(self) -> None:
        """Find out whether packed rows and a cache give what documents alone give.

        Raises: UnsupportedModelError if padding changes a document.
        """
        ids_BT = self.probe_ids(1, PROBE_TOKENS)
        first = 2 * PROBE_TOKENS // 3
        documents_BT = torch.ones_like(ids_BT)
        documents_BT[:, first:] = 2
        inputs: dict[str, Any] = {"documents_BT": documents_BT}
        targets: list[dict[str, Any]] = [{}, {}]
        parts = [slice(0, first), slice(first, None)]
        if self.config.family == "encoder_decoder":
            target_BT = ids_BT.flip(1)
            inputs |= {"decoder_input_ids_BT": target_BT, "decoder_documents_BT": documents_BT}
            targets = [{"decoder_input_ids_BT": target_BT[:, part]} for part in parts]
        alone = [self.hidden(ids_BT[:, part], **target) for part, target in zip(parts, targets, strict=True)]
        alone_BTD = torch.cat(alone, dim=1)
        if not are_close(self.hidden(ids_BT, **inputs), alone_BTD):
            raise self.refused("padding changes what it computes")
        if self.config.family != "decoder":
            self.caches = self.config.family == "encoder_decoder" and self.is_cached(ids_BT)
            return
        try:
            self.packs = are_close(self.packed(ids_BT, documents_BT), alone_BTD)
        except (TypeError, ValueError, RuntimeError):  # it takes no positions
            self.seen.clear()
        self.caches = self.is_cached(ids_BT)

    def is_cached(self, ids_BT: Tensor) -> bool:
        """Tell whether generating with a cache, whose rows are moved, gives the same as without."""
        self.caches = True
        try:
            states = self.generated(ids_BT)
        # Caches of other kinds of layers have other methods, or lack some; then none is used.
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return False
        self.caches = False
        return are_close(states, self.generated(ids_BT))

    def generated(self, ids_BT: Tensor) -> Tensor:
        """Return the states of the last two tokens, in two rows that a beam search made of one."""
        cache = self.new_cache("float", 1, PROBE_TOKENS)
        is_decoder = self.config.family == "decoder"
        if is_decoder:
            self.hidden(ids_BT[:, :-2], cache=cache)
        else:
            self.decode(ids_BT[:, :1], self.encode(ids_BT), cache=cache)
        cache.select(torch.zeros(2, dtype=torch.long, device=ids_BT.device))
        steps = ids_BT[:, -2:].expand(2, 2).split(1, dim=1)
        return torch.cat(
            [
                self.hidden(ids_B1, cache=cache) if is_decoder else self.decode(ids_B1, None, cache=cache)
                for ids_B1 in steps
            ],
            dim=1,
        )

    def probe_ids(self, n_rows: int, n_tokens: int) -> Tensor:
        """Return random tokens: the same for every model of a vocabulary."""
        generator = torch.Generator().manual_seed(0)
        size = (n_rows, min(n_tokens, self.config.max_positions))
        known = min(self.config.vocab_size, len(self.lm_head.weight))
        return torch.randint(known, size, generator=generator).to(self.lm_head.weight.device)

    # --- running it --------------------------------------------------------------------------------------------------

    def run(self, ids_BT: Tensor | None, **inputs: Any) -> Any:
        """Call the published model."""
        if self.config.family == "encoder_decoder":
            inputs.setdefault("decoder_input_ids", ids_BT)
        if self.config.family != "encoder":
            inputs.setdefault("use_cache", False)
        return self.published(input_ids=ids_BT, **inputs)

    def states(self, ids_BT: Tensor | None, **inputs: Any) -> tuple[Tensor, Any]:
        """Return what the published model multiplies with its output embeddings (B, T, D), and its other outputs."""
        self.seen.clear()
        out = self.run(ids_BT, **inputs)
        (states_BTD,) = self.seen
        self.seen.clear()
        return states_BTD, out

    def head_input(self, hidden: Tensor) -> Tensor:
        """Return the input of the head's matrix: scaled states (..., D)."""
        return hidden if self.scale == 1.0 else hidden * self.scale

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
        """Return the states that the head multiplies (B, T, D); see `LanguageModel.hidden`.

        Documents of a packed row are computed as rows of their own, padded on the right, unless the model separates them
        by their positions.
        """
        assert collect is None, "the published model's layers are not ours"
        assert attended is None, "the published model's attention is not ours"
        del positions_BT  # those of each document, from 0
        if cache is not None:
            assert isinstance(cache, TransformersCache)
            return cache.states(input_ids_BT)
        if self.config.family == "encoder_decoder":
            assert decoder_input_ids_BT is not None
            return self.pairs(input_ids_BT, documents_BT, decoder_input_ids_BT, decoder_documents_BT)
        if documents_BT is None:
            return self.states(input_ids_BT, **self.types(token_types_BT))[0]
        if self.packs:
            return self.packed(input_ids_BT, documents_BT)
        rows = Unpacked(documents_BT)
        more = {} if token_types_BT is None else self.types(rows.take(token_types_BT))
        if self.config.family == "encoder":
            more["attention_mask"] = rows.mask_RT
        return rows.put(self.states(rows.take(input_ids_BT), **more)[0])

    def types(self, token_types_BT: Tensor | None) -> dict[str, Tensor]:
        """Return the argument of the token types, if there are any."""
        return {} if token_types_BT is None else {"token_type_ids": token_types_BT}

    def packed(self, ids_BT: Tensor, documents_BT: Tensor) -> Tensor:
        """Return the states of packed rows whose positions restart with every document."""
        places_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        starts_BT = torch.ones_like(documents_BT, dtype=torch.bool)
        starts_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
        begun_BT = torch.where(starts_BT, places_BT, 0).cummax(dim=1).values
        return self.states(ids_BT, position_ids=places_BT - begun_BT)[0]

    def pairs(
        self, source_BS: Tensor, documents_BS: Tensor | None, target_BT: Tensor, documents_BT: Tensor | None
    ) -> Tensor:
        """Return the decoder's states, a row for every document of a packed row."""
        if documents_BS is None and documents_BT is None:
            return self.states(source_BS, decoder_input_ids=target_BT)[0]
        sources = Unpacked(torch.ones_like(source_BS) if documents_BS is None else documents_BS)
        targets = Unpacked(torch.ones_like(target_BT) if documents_BT is None else documents_BT)
        # The source of each target: that of the same row and number.
        number = {span: place for place, span in enumerate(sources.spans)}
        order = torch.tensor([number[span] for span in targets.spans], device=source_BS.device)
        return targets.put(
            self.states(
                sources.take(source_BS)[order],
                attention_mask=sources.mask_RT[order],
                decoder_input_ids=targets.take(target_BT),
            )[0]
        )

    def encode(self, input_ids_BS: Tensor, *, documents_BS: Tensor | None = None) -> Tensor:
        """Return the states of the published encoder (B, S, D)."""
        mask = None if documents_BS is None else (documents_BS != 0).long()
        states_BSD: Tensor = self.published.get_encoder()(input_ids=input_ids_BS, attention_mask=mask).last_hidden_state
        return states_BSD

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
        """Return the decoder's states (B, T, D), given a cache, which keeps the encoder's output."""
        assert isinstance(cache, TransformersCache)
        assert documents_BT is None, "targets are generated from their beginning"
        del collect, attended
        if memory_BSD is not None:
            cache.memory_BSD = memory_BSD
        cache.memory_documents_BS = memory_documents_BS
        return cache.states(decoder_input_ids_BT)

    def new_cache(self, kv: str, batch: int, n_positions: int) -> KVCache:
        """Return an empty cache for rows of equal length."""
        del kv  # transformers has no 8-bit cache of ours
        return TransformersCache(self, batch, n_positions)


class TransformersCache(KVCache):
    """The tokens so far, and transformers' cache of them where that gives the same."""

    def __init__(self, model: TransformersModel, batch: int, max_len: int) -> None:
        self.model, self.max_len, self.length = model, max_len, 0
        self.ids_BT = torch.zeros(batch, 0, dtype=torch.long, device=model.device)
        self.inner: Any = None
        self.memory_BSD: Tensor | None = None
        self.memory_documents_BS: Tensor | None = None

    def states(self, ids_BT: Tensor) -> Tensor:
        """Append tokens and return their states (B, T, D)."""
        n_new = ids_BT.shape[1]
        self.ids_BT = torch.cat([self.ids_BT, ids_BT], dim=1)
        self.length += n_new
        inputs: dict[str, Any] = {}
        if self.memory_BSD is not None:
            from transformers.modeling_outputs import BaseModelOutput

            inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=self.memory_BSD)
            if self.memory_documents_BS is not None:
                inputs["attention_mask"] = (self.memory_documents_BS != 0).long()
        if self.model.caches:
            given = ids_BT
            inputs |= {self.model.cache_name: self.inner, "use_cache": True}
        else:
            given = self.ids_BT
        if self.memory_BSD is not None:
            inputs["decoder_input_ids"] = given
        states_BTD, out = self.model.states(None if self.memory_BSD is not None else given, **inputs)
        if self.model.caches:
            self.inner = getattr(out, self.model.cache_name)
        return states_BTD[:, -n_new:]

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order; a row may repeat."""
        self.ids_BT = self.ids_BT[rows]
        if self.memory_BSD is not None:
            self.memory_BSD = self.memory_BSD[rows]
        if self.model.caches and self.inner is not None:
            # Encoder-decoders have two caches in one; each selects by itself.
            for cache in (getattr(self.inner, "self_attention_cache", self.inner), cross_of(self.inner)):
                if cache is not None:
                    cache.reorder_cache(rows)


def cross_of(cache: Any) -> Any:
    """Return the cache of an encoder-decoder's cross-attention, or None."""
    return getattr(cache, "cross_attention_cache", None)


class Unpacked:
    """The documents of packed rows (B, T) as rows of their own (R, T'), padded on the right, and back.

    spans: (row, document) of every row.
    """

    def __init__(self, documents_BT: Tensor) -> None:
        self.shape = documents_BT.shape
        rows = [
            (row, number) for row, line in enumerate(documents_BT.tolist()) for number in dict.fromkeys(line) if number
        ]
        self.spans = rows
        places = [(documents_BT[row] == number).nonzero().squeeze(1) for row, number in rows]
        longest = max((len(place) for place in places), default=1)
        device = documents_BT.device
        self.index_RT = torch.zeros(max(len(rows), 1), longest, dtype=torch.long, device=device)
        self.mask_RT = torch.zeros_like(self.index_RT)
        for place, ((row, _), inside) in enumerate(zip(rows, places, strict=True)):
            self.index_RT[place, : len(inside)] = row * self.shape[1] + inside
            self.mask_RT[place, : len(inside)] = 1
        if not rows:  # nothing but padding
            self.mask_RT[0, 0] = 1

    def take(self, values_BT: Tensor) -> Tensor:
        """Return the values of the documents (R, T'); padding repeats the batch's first value."""
        return values_BT.flatten()[self.index_RT]

    def put(self, states_RTD: Tensor) -> Tensor:
        """Return states where their documents were (B, T, D); those of padding are 0."""
        flat = states_RTD.new_zeros(self.shape[0] * self.shape[1], states_RTD.shape[-1])
        inside = self.mask_RT.bool()
        flat[self.index_RT[inside]] = states_RTD[inside]
        return flat.view(*self.shape, -1)


def caps_of(published: Any) -> Sequence[float]:
    """Return the numbers that a configuration calls a cap of the logits."""
    values = {**published.to_dict(), **published.get_text_config().to_dict()}
    named = (value for key, value in values.items() if "cap" in key and "attn" not in key)
    return [
        float(value) for value in named if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
    ]


def are_close(one: Tensor, other: Tensor) -> bool:
    """Tell whether two results are the same but for rounding; nan is not."""
    largest = float(other.abs().max())
    return float((one.float() - other.float()).abs().max()) <= TOLERANCE * max(largest, 1e-30)


def check_size(artifact: TransformersArtifact) -> None:
    """Check that the files can hold the model that their configuration describes: missing weights would be drawn at random.

    Raises: ArtifactError.
    """
    import transformers

    n_bytes = sum(entry.end - entry.begin for _, _, entry in artifact.tensors.values())
    try:
        with torch.device("meta"):
            shell = getattr(transformers, AUTO_CLASSES[artifact.config.family]).from_config(
                published_config(artifact.path), trust_remote_code=False
            )
    except ArtifactError:
        raise
    except Exception as error:
        raise refused_by_transformers(artifact.path, error) from error
    n_parameters = sum(parameter.numel() for parameter in shell.parameters())
    if n_parameters > MOST_PER_BYTE * n_bytes:
        raise ArtifactError(
            f"the configuration of `{artifact.path}` describes {n_parameters} parameters, and its files have {n_bytes} bytes",
            "download the model again",
        )


def load_through_transformers(artifact: TransformersArtifact, *, device: str, dtype: torch.dtype) -> TransformersModel:
    """Load a model with transformers, from safetensors and without running code of its folder.

    Raises: ArtifactError if transformers cannot load all of its weights; UnsupportedModelError if it cannot teach.
    """
    import transformers

    path = artifact.path
    # For good: a model tells of slow kernels and the like when it first runs.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    check_size(artifact)
    try:
        published, loading = getattr(transformers, AUTO_CLASSES[artifact.config.family]).from_pretrained(
            str(path),
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise refused_by_transformers(path, error) from error
    absent = sorted(loading.get("missing_keys", ())) + sorted(str(key) for key in loading.get("mismatched_keys", ()))
    if absent:
        raise ArtifactError(
            f"`{path}` lacks weights that {type(published).__name__} needs, such as `{absent[0][:120]}`",
            "download the model again; a teacher needs its language modeling head",
        )
    published.eval().requires_grad_(requires_grad=False)
    name = f"`{path}` ({artifact.architecture})"
    try:
        model = TransformersModel(published, artifact.config, name)
    # Of an architecture that nobody has tried, any call may fail.
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{name} cannot be used through transformers: {one_line(error)}", "use a teacher of another architecture"
        ) from error
    return model.to(device, dtype).eval()
