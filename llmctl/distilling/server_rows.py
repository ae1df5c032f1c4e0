"""Rows of training data from the responses of a server: which answers are kept, and in what form."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl.config import ServerConfig
from llmctl.data.prompts import Asked

THINKING = re.compile(r"<think>.*?(?:</think>|\Z)\s*", re.DOTALL)


@dataclass
class Collected:
    """What came of the prompts: the rows written, why others were not, and the numbers of the server."""

    path: Path
    n_prompts: int
    n_rows: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    is_cut: bool = False
    has_messages: bool = False
    has_logprobs: bool = False

    def record(self) -> dict[str, Any]:
        """Return the numbers by name."""
        return {
            "path": str(self.path),
            "prompts": self.n_prompts,
            "rows": self.n_rows,
            "rejected": self.rejected,
            "reached_max_tokens_total": self.is_cut,
            **self.counts,
        }

    def line(self) -> str:
        """Return the numbers as a line."""
        parts = [f"{self.n_rows:,} answers to {self.n_prompts:,} prompts"]
        parts += [f"{number:,} {reason}" for reason, number in self.rejected.items()]
        names = ("requests", "cached", "retries", "failed")
        parts += [f"{self.counts[name]:,} {name}" for name in names if self.counts.get(name)]
        parts.append(f"{self.counts['prompt_tokens']:,} + {self.counts['completion_tokens']:,} tokens")
        return ", ".join(parts)


def choice_of(response: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first choice of a response; empty if it has none."""
    choices = response.get("choices")
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}


def text_of_response(response: Mapping[str, Any]) -> str | None:
    """Return the text of a response, None if it has none."""
    choice = choice_of(response)
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    if text is None and isinstance(message, dict) and isinstance(message.get("reasoning_content"), str):
        text = ""  # it has only thought
    return text if isinstance(text, str) else None


def kept_rows(
    prompts: Sequence[Asked],
    responses: Sequence[Sequence[dict[str, Any] | None]],
    config: ServerConfig,
    pattern: "re.Pattern[str] | None",
    collected: Collected,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the answers that are kept, and count the others by reason."""
    for asked, answers in zip(prompts, responses, strict=True):
        rows: list[tuple[float, dict[str, Any]]] = []
        for response in answers:
            if response is None:
                continue
            text, reason = final_text(response, config), ""
            if len(text.strip()) < config.min_chars:
                reason = "too short"
            elif choice_of(response).get("finish_reason") == "length" and not config.keep_truncated:
                reason = "truncated"
            elif pattern is not None and not pattern.search(text):
                reason = "without the pattern"
            if reason:
                collected.rejected[reason] = collected.rejected.get(reason, 0) + 1
                continue
            logs = logprobs_of(response) if not config.keep_thinking or text == text_of_response(response) else []
            row = row_of(asked, text, response, config)
            if logs and config.top_logprobs:
                row["logprobs"], collected.has_logprobs = logs, True
            score = sum(one["logprob"] for one in logs) / len(logs) if logs else -math.inf
            rows.append((score, row))
        if config.keep == "pairs":
            yield from preference(rows, collected)
            continue
        if config.keep == "best" and len(rows) > 1:
            collected.rejected["not the best"] = collected.rejected.get("not the best", 0) + len(rows) - 1
            rows = [max(rows, key=lambda one: one[0])]
        yield from (row for _, row in rows)


def preference(rows: Sequence[tuple[float, dict[str, Any]]], collected: Collected) -> Iterator[dict[str, Any]]:
    """Yield the best and the worst of the answers to a prompt as a preference, if their scores differ."""
    ranked = sorted((one for one in rows if "messages" in one[1]), key=lambda one: one[0])
    if not ranked or ranked[0][0] == ranked[-1][0]:
        collected.rejected["without two scores"] = collected.rejected.get("without two scores", 0) + 1
        return
    rejected, chosen = (one[1]["messages"][-1] for one in (ranked[0], ranked[-1]))
    best = ranked[-1][1]
    yield {
        "prompt": best["messages"][:-1],
        "chosen": [chosen],
        "rejected": [rejected],
        "provenance": best["provenance"],
    }


def final_text(response: Mapping[str, Any], config: ServerConfig) -> str:
    """Return an answer with or without what the model thought before it."""
    text = text_of_response(response) or ""
    message = choice_of(response).get("message")
    thought = message.get("reasoning_content") if isinstance(message, dict) else None
    if not config.keep_thinking:
        return THINKING.sub("", text, count=1) if text.lstrip().startswith("<think>") else text
    return f"<think>\n{thought.strip()}\n</think>\n\n{text}" if isinstance(thought, str) and thought.strip() else text


def row_of(asked: Asked, text: str, response: Mapping[str, Any], config: ServerConfig) -> dict[str, Any]:
    """Return an answer as a row of data."""
    provenance = {
        "model": str(response.get("model") or config.model),
        "temperature": config.temperature,
        "finish_reason": choice_of(response).get("finish_reason"),
        "prompt": asked.where,
    }
    if not asked.messages:
        return {"text": asked.text + text, "provenance": provenance}
    messages = [message.to_dict() for message in asked.messages]
    return {"messages": [*messages, {"role": "assistant", "content": text}], "provenance": provenance}


def logprobs_of(response: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tokens of an answer with their log-probabilities and those of alternatives; none if it has none.

    Each is {"bytes": [...], "logprob": x, "top": [[[bytes], x], ...]}.
    """
    logs = choice_of(response).get("logprobs")
    content = logs.get("content") if isinstance(logs, dict) else None
    if not isinstance(content, list):
        return []
    found = []
    for one in content:
        if not isinstance(one, dict) or not is_number(one.get("logprob")):
            return []
        top = [
            [bytes_of(other), float(other["logprob"])]
            for other in one.get("top_logprobs") or []
            if isinstance(other, dict) and is_number(other.get("logprob"))
        ]
        found.append({"bytes": bytes_of(one), "logprob": float(one["logprob"]), "top": top})
    return found


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number, no Boolean."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def bytes_of(token: Mapping[str, Any]) -> list[int]:
    """Return the bytes of a token: as the server gives them, else of its text."""
    given = token.get("bytes")
    if isinstance(given, list) and all(isinstance(one, int) and 0 <= one < 256 for one in given):
        return given
    return list(str(token.get("token", "")).encode("utf-8", "replace"))
