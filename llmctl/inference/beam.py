"""Beam search, batched over prompts.

Source: transformers with early_stopping=False: the score of a finished beam is its log-probability divided by
length ** length_penalty, end token included (Wu et al. 2016, arXiv:1609.08144, section 7, simplified).
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
        """Add a finished beam and keep the best `size`."""
        self.finished.append((score, ids))
        self.finished.sort(key=lambda entry: -entry[0])
        del self.finished[self.size :]

    def is_done(self, best_running: float) -> bool:
        """Return whether no running beam can still enter the best."""
        return len(self.finished) == self.size and self.finished[-1][0] >= best_running


def beam_search(session: Session, n_prompts: int, config: GenerateConfig, ends: set[int]) -> list[list[int]]:
    """Return the best continuation of each prompt, with its end token if it has one.

    Raises: ArtifactError if the logits are not finite.
    """
    K = config.beams
    limits = [min(session.n_new, session.limit(prompt)) for prompt in session.prompts]
    finished = [Hypotheses(K) for _ in range(n_prompts)]
    beams: list[list[list[int]]] = [[[] for _ in range(K)] for _ in range(n_prompts)]
    logits_RV = session.begin()
    # All beams of a prompt start equal, so only the first may branch: otherwise the K best would be K duplicates.
    scores_PK = torch.full((n_prompts, K), float("-inf"), dtype=torch.float64)
    scores_PK[:, 0] = 0.0
    active = list(range(n_prompts))
    for length in range(1, session.n_new + 1):
        log_probabilities = logits_RV.float().log_softmax(dim=1).double().cpu()
        V = log_probabilities.shape[1]
        totals = (scores_PK.reshape(-1, 1) + log_probabilities).reshape(len(active), K * V)
        # 2K candidates: up to K of them may be end tokens, and K must remain to continue.
        best, indices = totals.topk(min(2 * K, K * V), dim=1)
        require_finite(best[:, 0])
        rows, tokens, new_scores, running = [], [], [], []
        for position, prompt in enumerate(active):
            kept = branch(
                finished[prompt],
                beams[prompt],
                best[position].tolist(),
                indices[position].tolist(),
                V,
                config,
                ends,
                length,
            )
            beams[prompt] = [ids for _, _, ids in kept]
            is_full = length == limits[prompt]
            if finished[prompt].is_done(kept[0][0] / length**config.length_penalty) or is_full:
                for score, _, ids in kept if is_full else []:
                    finished[prompt].add(score / length**config.length_penalty, ids)
                continue
            running.append(prompt)
            rows += [position * K + source for _, source, _ in kept]
            tokens += [ids[-1] for _, _, ids in kept]
            new_scores.append([score for score, _, _ in kept])
        active = running
        if not active:
            break
        if rows != list(range(len(logits_RV))):
            session.select(torch.tensor(rows, device=logits_RV.device))
        logits_RV = session.step(torch.tensor(tokens, device=logits_RV.device))
        scores_PK = torch.tensor(new_scores, dtype=torch.float64)
    return [hypotheses.finished[0][1] for hypotheses in finished]


def branch(
    hypotheses: Hypotheses,
    beams: list[list[int]],
    best: list[float],
    indices: list[int],
    n_vocabulary: int,
    config: GenerateConfig,
    ends: set[int],
    length: int,
) -> list[tuple[float, int, list[int]]]:
    """Split the candidates of a prompt, best first, into finished beams and K running ones: (score, beam, ids)."""
    kept: list[tuple[float, int, list[int]]] = []
    for rank, (score, index) in enumerate(zip(best, indices, strict=True)):
        source, token = divmod(index, n_vocabulary)
        ids = [*beams[source], token]
        if token in ends:
            # An end token outside the K best would not have been a beam, so it does not finish one.
            if rank < config.beams:
                hypotheses.add(score / length**config.length_penalty, ids)
        elif len(kept) < config.beams:
            kept.append((score, source, ids))
    while len(kept) < config.beams:  # the vocabulary is smaller than the beam width
        kept.append((float("-inf"), 0, [*beams[0], 0]))
    return kept
