"""Decoding state of a batch: prefill of the prompts, then one token per row and step.

Hides from sampling and beam search whether the model is a decoder or an encoder-decoder, and how rows are padded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmctl.inference.prefix import Prefix
from llmctl.model.decode import Decoder
from llmctl.model.transformer import LanguageModel

PREFILL_TOKENS = 512
"""Positions per prefill chunk: bounds the memory of the attention scores."""


class Session:
    """Prompts of a batch with their KV cache; `copies` rows per prompt (beams).

    excluded: tokens that are never predicted, such as padding of the vocabulary. decoder: a faster implementation of the
    same model. prefix: reuses the keys and values of a stored or shared prefix. kv: a key of `CACHES`. first: the only token
    that may come first.

    Shapes: logits (B * copies, V), the copies of a prompt adjacent.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        *,
        copies: int = 1,
        excluded: Sequence[int] = (),
        decoder: Decoder | None = None,
        prefix: Prefix | None = None,
        kv: str = "float",
        first: int | None = None,
    ) -> None:
        self.model, self.prompts, self.copies, self.decoder = model, prompts, copies, decoder
        self.is_decoder = model.config.family == "decoder"
        self.prefix = prefix if self.is_decoder and model.pads_left else None
        self.device, self.dtype = model.device, model.dtype
        self.excluded = torch.tensor(excluded, dtype=torch.long, device=self.device) if excluded else None
        lengths = [len(prompt) if self.is_decoder else 0 for prompt in prompts]
        # Each row may fill the context on its own, so the shortest prompt decides.
        self.n_new = min(max_tokens, model.config.max_positions - min(lengths))
        # Rows are left-padded to the longest prompt, so all need its positions.
        n_positions = max(lengths) + self.n_new
        self.kv, self.first = kv, first
        self.cache = model.new_cache(kv, len(prompts), n_positions)
        self.memory_documents_BS: Tensor | None = None
        self.positions_B1 = torch.zeros(len(prompts), 1, dtype=torch.long, device=self.device)

    def limit(self, prompt: Sequence[int]) -> int:
        """Return how many new tokens fit in the context after a prompt."""
        return self.model.config.max_positions - (len(prompt) if self.is_decoder else 0)

    def begin(self) -> Tensor:
        """Prefill the prompts and return the logits of the next tokens."""
        logits_BV = self._begin_decoder() if self.is_decoder else self._begin_encoder_decoder()
        if self.first is not None:
            logits_BV = torch.full_like(logits_BV, float("-inf"))
            logits_BV[:, self.first] = 0.0
        if self.copies > 1:
            # Beams share the prefill: cache rows are copied after it.
            rows = torch.arange(len(self.prompts), device=self.device).repeat_interleave(self.copies)
            self.select(rows)
            logits_BV = logits_BV[rows]
        return logits_BV

    def step(self, tokens_B: Tensor) -> Tensor:
        """Append one token per row and return the logits of the next tokens."""
        positions_B1 = None
        if self.is_decoder:
            self.positions_B1 = positions_B1 = self.positions_B1 + 1
        if self.decoder is not None:
            return self._allowed(self.decoder.logits(tokens_B, self.cache, positions_B1, self.memory_documents_BS))
        return self._logits(self._decode(tokens_B[:, None], positions_BT=positions_B1))

    def select(self, rows_B: Tensor) -> None:
        """Keep these rows in this order; a row may repeat."""
        self.cache.select(rows_B)
        self.positions_B1 = self.positions_B1[rows_B]
        if self.memory_documents_BS is not None:
            self.memory_documents_BS = self.memory_documents_BS[rows_B]

    def keep(self, ids: Sequence[int]) -> None:
        """Store the cached part of `ids` (prompt and new tokens) as the prefix, if the batch has a single prompt."""
        if self.prefix is not None and len(self.prompts) == 1:
            self.prefix.store(ids[: self.cache.length], self.cache)

    def _decode(
        self,
        ids_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        memory_BSD: Tensor | None = None,
    ) -> Tensor:
        documents_BS = self.memory_documents_BS
        if self.decoder is not None:
            return self.decoder.hidden(
                ids_BT,
                self.cache,
                positions_BT=positions_BT,
                documents_BT=documents_BT,
                memory_BSD=memory_BSD,
                memory_documents_BS=documents_BS,
            )
        if self.is_decoder:
            return self.model.hidden(ids_BT, positions_BT=positions_BT, documents_BT=documents_BT, cache=self.cache)
        return self.model.decode(ids_BT, memory_BSD, memory_documents_BS=documents_BS, cache=self.cache)

    def _logits(self, hidden_BTD: Tensor) -> Tensor:
        return self._allowed(self.model.head(hidden_BTD[:, -1]))

    def _allowed(self, logits_BV: Tensor) -> Tensor:
        if self.excluded is not None:
            logits_BV.index_fill_(1, self.excluded, float("-inf"))
        return logits_BV

    def _begin_decoder(self) -> Tensor:
        longest = max(map(len, self.prompts))
        ids_BT = torch.zeros(len(self.prompts), longest, dtype=torch.long)
        documents_BT = torch.zeros_like(ids_BT)
        # Left padding: the last position of every row is its last token, so one slice gives all logits.
        for row, prompt in enumerate(self.prompts):
            ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
            documents_BT[row, longest - len(prompt) :] = 1
        positions_BT = (documents_BT.cumsum(dim=1) - 1).clamp(min=0).to(self.device)
        # Without padding no mask is needed, which is faster.
        is_ragged = bool((documents_BT == 0).any())
        ids_BT, documents_BT = ids_BT.to(self.device), documents_BT.to(self.device)
        n_known = self._reuse(documents_BT if is_ragged else None)
        logits_BV = None
        # In parts: activations of a long prompt would not fit, and attention scores grow with its square.
        step = PREFILL_TOKENS if self.model.pads_left else longest
        for start in range(n_known, longest, step):
            part = slice(start, start + step)
            documents = documents_BT[:, part] if is_ragged else None
            ids, positions, is_last = ids_BT[:, part], positions_BT[:, part], start + step >= longest
            if self.decoder is not None:
                logits_BV = self.decoder.read(
                    ids, self.cache, positions_BT=positions, documents_BT=documents, is_last=is_last
                )
            else:
                hidden_BTD = self._decode(ids, documents_BT=documents, positions_BT=positions)
                logits_BV = self.model.head(hidden_BTD[:, -1]) if is_last else None
        assert logits_BV is not None
        self.positions_B1 = positions_BT[:, -1:]
        return self._allowed(logits_BV)

    def _reuse(self, documents_BT: Tensor | None) -> int:
        """Fill the cache from the prefix and return how many positions need no prefill."""
        if self.prefix is None:
            return 0
        if shared := self.prefix.shared(self.prompts):
            # The shared prefix is computed once, in a session of its own, then copied into every row.
            alone = Session(self.model, [shared], 1, decoder=self.decoder, prefix=self.prefix, kv=self.kv)
            alone.begin()
            alone.keep(shared)
        n_known = self.prefix.put(self.cache, self.prompts)
        if n_known:
            self.cache.mark(n_known, None if documents_BT is None else documents_BT[:, :n_known])
            self.cache.advance(n_known)
        return n_known

    def _begin_encoder_decoder(self) -> Tensor:
        longest = max(map(len, self.prompts))
        ids_BS = torch.zeros(len(self.prompts), longest, dtype=torch.long)
        documents_BS = torch.zeros_like(ids_BS)
        for row, prompt in enumerate(self.prompts):
            ids_BS[row, : len(prompt)] = torch.tensor(prompt)
            documents_BS[row, : len(prompt)] = 1
        documents_BS = documents_BS.to(self.device)
        is_ragged = bool((documents_BS == 0).any())
        self.memory_documents_BS = documents_BS if is_ragged else None
        memory_BSD = self.model.encode(ids_BS.to(self.device), documents_BS=self.memory_documents_BS)
        start = max(self.model.config.decoder_start_id, 0)
        ids_B1 = torch.full((len(self.prompts), 1), start, dtype=torch.long, device=self.device)
        return self._logits(self._decode(ids_B1, memory_BSD=memory_BSD))
