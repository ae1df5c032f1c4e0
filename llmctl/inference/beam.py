"""Beam search: the likeliest continuations kept side by side, batched over prompts.

Source: as in the Hugging Face library (early_stopping=False): a finished beam's score is its log-probability divided
by length ** length_penalty (Wu et al. 2016, arXiv:1609.08144, section 7, simplified), the end token counted.
"""

from dataclasses import dataclass, field

import torch

from llmctl.config import GenerateConfig
from llmctl.inference.sampling import require_finite
from llmctl.inference.session import Session


@dataclass
class Hypotheses:
    """The best finished beams of one prompt."""

    size: int
    finished: list[tuple[float, list[int]]] = field(default_factory=list)

    def add(self, score: float, ids: list[int]) -> None:
        """Keep a finished beam if it is among the best."""
        self.finished.append((score, ids))
        self.finished.sort(key=lambda entry: -entry[0])
        del self.finished[self.size :]

    def is_done(self, best_running: float) -> bool:
        """Tell whether no running beam can still get in."""
        return len(self.finished) == self.size and self.finished[-1][0] >= best_running


def beam_search(session: Session, n_prompts: int, config: GenerateConfig, ends: set[int]) -> list[list[int]]:
    """Return the best continuation of every prompt, its end token included if it has one.

    Raises: ArtifactError when the logits are not numbers.
    """
    K = config.beams
    limits = [min(session.n_new, session.limit(prompt)) for prompt in session.prompts]
    found = [Hypotheses(K) for _ in range(n_prompts)]
    beams: list[list[list[int]]] = [[[] for _ in range(K)] for _ in range(n_prompts)]
    logits_RV = session.begin()
    # At first all beams of a prompt are equal: only one of them may branch.
    scores_PK = torch.full((n_prompts, K), float("-inf"), dtype=torch.float64)
    scores_PK[:, 0] = 0.0
    active = list(range(n_prompts))
    for length in range(1, session.n_new + 1):
        log_probabilities = logits_RV.float().log_softmax(dim=1).double().cpu()
        V = log_probabilities.shape[1]
        totals = (scores_PK.reshape(-1, 1) + log_probabilities).reshape(len(active), K * V)
        best, places = totals.topk(min(2 * K, K * V), dim=1)
        require_finite(best[:, 0])
        rows, tokens, new_scores, staying = [], [], [], []
        for position, prompt in enumerate(active):
            kept = branch(
                found[prompt],
                beams[prompt],
                best[position].tolist(),
                places[position].tolist(),
                V,
                config,
                ends,
                length,
            )
            beams[prompt] = [ids for _, _, ids in kept]
            is_full = length == limits[prompt]
            if found[prompt].is_done(kept[0][0] / length**config.length_penalty) or is_full:
                for score, _, ids in kept if is_full else []:
                    found[prompt].add(score / length**config.length_penalty, ids)
                continue
            staying.append(prompt)
            rows += [position * K + source for _, source, _ in kept]
            tokens += [ids[-1] for _, _, ids in kept]
            new_scores.append([score for score, _, _ in kept])
        active = staying
        if not active:
            break
        if rows != list(range(len(logits_RV))):
            session.select(torch.tensor(rows, device=logits_RV.device))
        logits_RV = session.step(torch.tensor(tokens, device=logits_RV.device))
        scores_PK = torch.tensor(new_scores, dtype=torch.float64)
    return [hypotheses.finished[0][1] for hypotheses in found]


def branch(
    found: Hypotheses,
    beams: list[list[int]],
    best: list[float],
    places: list[int],
    n_vocabulary: int,
    config: GenerateConfig,
    ends: set[int],
    length: int,
) -> list[tuple[float, int, list[int]]]:
    """Sort a prompt's candidates, best first, into finished beams and the K that go on: (score, beam, ids)."""
    kept: list[tuple[float, int, list[int]]] = []
    for rank, (score, place) in enumerate(zip(best, places, strict=True)):
        source, token = divmod(place, n_vocabulary)
        ids = [*beams[source], token]
        if token in ends:
            if rank < config.beams:
                found.add(score / length**config.length_penalty, ids)
        elif len(kept) < config.beams:
            kept.append((score, source, ids))
    while len(kept) < config.beams:  # a vocabulary smaller than the beam
        kept.append((float("-inf"), 0, [*beams[0], 0]))
    return kept
