"""The objective of preferences: a loss on the log probabilities of answers, relative to those of the model before training."""

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from llmctl.config import PreferenceConfig
from llmctl.losses.base import IGNORE, Loss
from llmctl.losses.log_probs import linear_log_probs
from llmctl.losses.preferences import Answers, Preference
from llmctl.model.lora import without_adapters
from llmctl.model.transformer import LanguageModel
from llmctl.tables.preferences import PREFERENCES
from llmctl.training.objectives import Objective, evaluating

SIDES = ("chosen", "rejected")


def preference_loss(config: PreferenceConfig) -> Preference:
    """Return the loss of a config."""
    return Preference(
        config.loss,
        config.beta or PREFERENCES[config.loss].beta,
        config.label_smoothing,
        config.gamma,
        config.desirable_weight,
        config.undesirable_weight,
    )


class PreferencePrediction(Objective):
    """A loss of PREFERENCES on the batches of `PreferenceBatches`.

    The reference is the model without its adapters, unless the batches have its log probabilities. Parts: rewards (beta times
    the gain over the reference, of losses without one the log probability) of chosen and rejected answers, their numbers,
    pairs, and pairs whose chosen answer has the higher reward.
    """

    parts = ("chosen", "rejected", "n_chosen", "n_rejected", "pairs", "correct")

    def __init__(self, model: LanguageModel, preference: Preference, sft_weight: float, chunk_tokens: int) -> None:
        super().__init__()
        self.model, self.preference, self.row = model, preference, PREFERENCES[preference.name]
        self.sft_weight, self.chunk_tokens = sft_weight, chunk_tokens

    def forward(self, batch: dict[str, Tensor]) -> Loss:
        """Return the loss summed over preferences, or over answers for losses of single ones."""
        kinds_BS, is_counted = batch["kinds_BS"], batch["labels"] != IGNORE
        sums_BS, counts_BS = self.log_probs(batch)
        reference_BS = self.reference(batch, counts_BS) if self.row.needs_reference else torch.zeros_like(sums_BS)
        means_BS = sums_BS / counts_BS.clamp(min=1)
        if self.row.by_length:
            taken_BS, reference_BS = means_BS, reference_BS / counts_BS.clamp(min=1)
        else:
            taken_BS = sums_BS
        rewards_BS = self.preference.beta * (taken_BS - reference_BS).detach()
        if self.row.is_paired:
            chosen, rejected = (
                Answers(taken_BS[:, slot::2], reference_BS[:, slot::2], means_BS[:, slot::2]) for slot in (0, 1)
            )
            losses = self.preference.of_pairs(chosen, rejected)
            if self.sft_weight:
                losses = losses - self.sft_weight * chosen.means_P
        else:
            answers = Answers(taken_BS, reference_BS, means_BS)
            losses = self.preference.of_answers(answers, kinds_BS == 1, self.divergence(batch))
        # Places without an answer have finite losses of zeros, which do not count.
        total = torch.where(is_counted, losses, 0.0).sum(dtype=torch.float64)
        is_there_BS = is_counted if not self.row.is_paired else is_counted.repeat_interleave(2, dim=1)
        return Loss(total, is_counted.sum(dtype=torch.float64), self.measure(rewards_BS, kinds_BS, is_there_BS))

    def measure(self, rewards_BS: Tensor, kinds_BS: Tensor, is_there_BS: Tensor) -> dict[str, Tensor]:
        """Return the parts."""
        chosen_BS, rejected_BS = (kinds_BS == 1) & is_there_BS, (kinds_BS == 0) & is_there_BS
        # Rewards of an answer and the next one: a pair where that is its opposite.
        firsts_BP, seconds_BP = rewards_BS[:, ::2], rewards_BS[:, 1::2]
        is_pair_BP = is_there_BS[:, ::2] & (kinds_BS[:, 1::2] >= 0)
        gaps_BP = torch.where(kinds_BS[:, ::2] == 1, firsts_BP - seconds_BP, seconds_BP - firsts_BP)
        found = {
            "chosen": torch.where(chosen_BS, rewards_BS, 0.0),
            "rejected": torch.where(rejected_BS, rewards_BS, 0.0),
            "n_chosen": chosen_BS,
            "n_rejected": rejected_BS,
            "pairs": is_pair_BP,
            "correct": is_pair_BP & (gaps_BP > 0),
        }
        return {name: tensor.sum(dtype=torch.float64) for name, tensor in found.items()}

    def log_probs(self, batch: Mapping[str, Tensor], prefix: str = "") -> tuple[Tensor, Tensor]:
        """Return the log probability of every answer, summed over its tokens (B, S), and their number."""
        documents_BT, labels_BT = batch[f"{prefix}documents_BT"], batch[f"{prefix}answers_BT"]
        hidden_ND = self.model.hidden(batch[f"{prefix}input_ids_BT"], documents_BT=documents_BT).flatten(0, 1)
        n_rows, n_slots = batch["kinds_BS"].shape
        labels_N = labels_BT.flatten()
        places = (labels_N != IGNORE).nonzero().squeeze(1)
        rows_B1 = torch.arange(n_rows, device=labels_N.device)[:, None]
        slots_N = (rows_B1 * n_slots + documents_BT - 1).flatten()[places]
        head = self.model.lm_head
        log_probs_N = linear_log_probs(
            self.model.head_input(hidden_ND[places]),
            head.weight,
            labels_N[places],
            bias_V=head.bias,
            chunk_tokens=self.chunk_tokens,
            softcap=self.model.config.logits_softcap,
        )
        zeros_S = log_probs_N.new_zeros(n_rows * n_slots, dtype=torch.float64)
        sums_S = zeros_S.index_add(0, slots_N, log_probs_N.double())
        counts_S = zeros_S.index_add(0, slots_N, torch.ones_like(log_probs_N, dtype=torch.float64))
        return sums_S.view(n_rows, n_slots), counts_S.view(n_rows, n_slots)

    def reference(self, batch: Mapping[str, Tensor], like_BS: Tensor, prefix: str = "") -> Tensor:
        """Return the log probabilities of the answers by the reference (B, S)."""
        if f"{prefix}reference_BS" in batch:
            return batch[f"{prefix}reference_BS"].to(like_BS)
        with torch.no_grad(), evaluating(self.model), without_adapters(self.model):
            return self.log_probs(batch, prefix)[0]

    def divergence(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return an estimate of the KL divergence of the model from the reference, by answers to other prompts (KTO, eq. 8)."""
        with torch.no_grad(), evaluating(self.model):
            sums_BS, counts_BS = self.log_probs(batch, "other_")
            gains_BS = sums_BS - self.reference(batch, sums_BS, "other_")
        is_there_BS = counts_BS > 0
        mean = torch.where(is_there_BS, gains_BS, 0.0).sum() / is_there_BS.sum().clamp(min=1)
        return mean.clamp(min=0)

    def figures(self, nats: float, count: float, parts: Mapping[str, float], outputs: NDArray[Any]) -> dict[str, float]:
        """Return loss, mean rewards, their margin, and the fraction of pairs whose chosen answer has the higher one."""
        figures = super().figures(nats, count, parts, outputs)
        rewards = {side: parts[side] / max(parts[f"n_{side}"], 1.0) for side in SIDES}
        if parts["pairs"]:
            figures["accuracy"] = parts["correct"] / parts["pairs"]
        if all(parts[f"n_{side}"] for side in SIDES):
            figures["margin"] = rewards["chosen"] - rewards["rejected"]
        return figures | {f"reward_{side}": reward for side, reward in rewards.items()} | {"n_labels": int(count)}
