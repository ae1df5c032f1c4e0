"""Batches that the student writes itself, so that it learns from the teacher where its own words lead it.

Source: Agarwal et al. 2023, generalized knowledge distillation, arXiv:2306.13649, algorithm 1.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmctl.losses.base import IGNORE
from llmctl.model.cache import KVCache
from llmctl.model.transformer import LanguageModel


@dataclass(frozen=True)
class Writer:
    """Replaces the end of the rows of some batches by what the student writes there.

    share: of the batches; n_tokens: written at most, half of a row otherwise.
    """

    share: float
    n_tokens: int

    def write(self, model: LanguageModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the batch as it is, or with its last tokens written by the model; labels are those of what was written.

        Which it is, and what is written, follow from the tokens of the batch and the loop's random numbers, so that a
        run that was stopped writes the same.
        """
        ids_BT = batch["input_ids_BT"]
        digest = hashlib.sha256(ids_BT.cpu().numpy().tobytes() + str(torch.initial_seed()).encode()).digest()
        if int.from_bytes(digest[:7], "big") >= self.share * 2**56:
            return dict(batch)
        T = ids_BT.shape[1]
        begin = T - min(self.n_tokens, T // 2)
        if begin < 1:
            return dict(batch)
        generator = torch.Generator(ids_BT.device).manual_seed(int.from_bytes(digest[7:14], "big"))
        written = ids_BT.clone()
        documents_BT = batch.get("documents_BT")
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                self._fill(model, written, documents_BT, begin, generator)
        finally:
            model.train(was_training)
        labels_BT = torch.full_like(batch["labels"], IGNORE)
        labels_BT[:, begin - 1 : T - 1] = written[:, begin:]
        result = dict(batch) | {"input_ids_BT": written, "labels": labels_BT}
        if documents_BT is not None:  # what is written belongs to the document before it
            documents_BT = documents_BT.clone()
            documents_BT[:, begin:] = documents_BT[:, begin - 1 : begin]
            labels_BT[documents_BT == 0] = IGNORE
            result["documents_BT"] = documents_BT
        return result

    def _fill(
        self, model: LanguageModel, ids_BT: Tensor, documents_BT: Tensor | None, begin: int, generator: torch.Generator
    ) -> None:
        B, T = ids_BT.shape
        cache = KVCache(model.config, B, T, device=ids_BT.device, dtype=model.dtype)
        given = None if documents_BT is None else documents_BT[:, :begin]
        hidden_BTD = model.hidden(ids_BT[:, :begin], documents_BT=given, cache=cache)
        for place in range(begin, T):
            probabilities_BV = model.head(hidden_BTD[:, -1]).float().softmax(dim=-1)
            ids_BT[:, place] = torch.multinomial(probabilities_BV, 1, generator=generator)[:, 0]
            if place < T - 1:
                hidden_BTD = model.hidden(ids_BT[:, place : place + 1], cache=cache)
