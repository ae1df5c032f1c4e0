"""Losses on preferences. To add one: a row here and its function in losses/preferences.py."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PreferenceRow:
    """A loss on preferences.

    function: its name. needs_reference: compares with the model before training. is_paired: needs a chosen and a rejected
    answer to the same prompt; else each answer counts for itself. by_length: of mean log probabilities per token instead of
    sums. beta: its default.
    """

    function: str
    summary: str
    source: str
    needs_reference: bool = True
    is_paired: bool = True
    by_length: bool = False
    beta: float = 0.1


PREFERENCES: dict[str, PreferenceRow] = {
    "dpo": PreferenceRow("dpo", "direct preference optimization", "Rafailov et al. 2023, arXiv:2305.18290, eq. 7"),
    "ipo": PreferenceRow(
        "ipo",
        "squared distance of the margin from 1 / (2 beta)",
        "Azar et al. 2023, arXiv:2310.12036, eq. 17",
        by_length=True,
    ),
    "orpo": PreferenceRow(
        "orpo",
        "cross-entropy of the chosen answer plus beta times the log odds ratio",
        "Hong et al. 2024, arXiv:2403.07691, eq. 6",
        needs_reference=False,
        by_length=True,
    ),
    "simpo": PreferenceRow(
        "simpo",
        "margin of mean log probabilities",
        "Meng et al. 2024, arXiv:2405.14734, eq. 6",
        needs_reference=False,
        by_length=True,
        beta=2.0,
    ),
    "kto": PreferenceRow(
        "kto",
        "single answers that are desirable or not",
        "Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8",
        is_paired=False,
    ),
}
