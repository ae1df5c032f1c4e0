"""Texts written by a model behind a server: its answers to prompts, as rows that `finetune` and `distill` read.

Every response is kept by the content of its request (answer_log.py), so that an interrupted or repeated run pays for nothing
twice. The rows are in the order of the prompts, whatever the order of the responses.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl.config import ServerConfig
from llmctl.data.prompts import Asked
from llmctl.distilling.answer_log import AnswerLog, request_key
from llmctl.distilling.server import RequestError, Server
from llmctl.errors import StoppedError, UsageError
from llmctl.files import write_bytes
from llmctl.runs.progress import paced

ANSWERS = "answers.jsonl"
THINKING = re.compile(r"<think>.*?(?:</think>|\Z)\s*", re.DOTALL)
FEWEST_FAILED = 3
"""Failures that never end a run, however few prompts there are."""


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


def collect(
    server: Server, prompts: Sequence[Asked], folder: Path, config: ServerConfig, say: Callable[[str], None]
) -> Collected:
    """Ask for all answers and write those that are kept to `answers.jsonl` in a folder.

    Raises: UsageError for what no retry changes; StoppedError if too many prompts failed: what was answered is kept.
    """
    check_server(config)
    if not config.model:
        known = ", ".join(f"`{name}`" for name in server.models())
        raise UsageError(
            "no `--teacher-model` is named", f"the server has {known}" if known else "--teacher-model NAME"
        )
    log = AnswerLog(Path(config.cache) if config.cache else folder)
    collected = Collected(folder / ANSWERS, len(prompts))
    pattern = re.compile(config.pattern) if config.pattern else None
    try:
        responses = ask_all(server, prompts, config, log, collected, say)
        rows = list(kept_rows(prompts, responses, config, pattern, collected))
    finally:
        log.close()
    collected.n_rows, collected.counts = len(rows), server.counts.record()
    if collected.failures:
        say(f"{len(collected.failures)} requests failed, the first: {collected.failures[0]}")
        if not rows:
            raise too_many(collected)
    if config.top_logprobs and rows and not collected.has_logprobs:
        say("the server gave no log-probabilities: only texts are learned")
    if not rows:
        raise UsageError(
            f"no answer was kept: {collected.line()}", "see server.pattern, server.min_chars and max_tokens"
        )
    write_bytes(collected.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return collected


def too_many(collected: Collected) -> StoppedError:
    """Return the error for a run of which too many requests failed."""
    return StoppedError(
        f"{len(collected.failures)} requests failed, the first: {collected.failures[0]}",
        "the answers so far are kept: repeat the command to ask for the others, or raise server.max_failed_frac",
    )


def check_server(config: ServerConfig) -> None:
    """Refuse settings out of range.

    Raises: UsageError listing all of them.
    """
    checks = [
        (config.concurrency < 1, f"`server.concurrency` is {config.concurrency}, it must be at least 1"),
        (config.retries < 0, f"`server.retries` is {config.retries}, it is negative"),
        (config.timeout_seconds <= 0, f"`server.timeout_seconds` is {config.timeout_seconds}, it must be positive"),
        (
            config.requests_per_minute < 0,
            f"`server.requests_per_minute` is {config.requests_per_minute}, it is negative",
        ),
        (config.answers < 1, f"`server.answers` is {config.answers}, it must be at least 1"),
        (
            config.keep == "pairs" and (config.answers < 2 or not config.top_logprobs),
            "`server.keep` pairs needs `server.answers` of at least 2 and `server.top_logprobs`",
        ),
        (config.temperature < 0, f"`server.temperature` is {config.temperature}, it is negative"),
        (not 0 < config.top_p <= 1, f"`server.top_p` is {config.top_p}, not in (0, 1]"),
        (config.max_tokens < 1, f"`server.max_tokens` is {config.max_tokens}, it must be at least 1"),
        (not 0 <= config.top_logprobs <= 20, f"`server.top_logprobs` is {config.top_logprobs}, not in [0, 20]"),
        (not 0 <= config.max_failed_frac <= 1, f"`server.max_failed_frac` is {config.max_failed_frac}, not in [0, 1]"),
    ]
    problems = [sentence for wrong, sentence in checks if wrong]
    try:
        re.compile(config.pattern)
    except re.error as error:
        problems.append(f"`server.pattern` `{config.pattern}` is no regular expression: {error}")
    if problems:
        raise UsageError("; ".join(problems), "--print-config lists every key with a description")


def ask_all(
    server: Server,
    prompts: Sequence[Asked],
    config: ServerConfig,
    log: AnswerLog,
    collected: Collected,
    say: Callable[[str], None],
) -> list[list[dict[str, Any] | None]]:
    """Return the responses of every prompt; None where a request failed or the limit of tokens came before it."""
    found: list[list[dict[str, Any] | None]] = [[None] * config.answers for _ in prompts]
    tasks = iter([(number, answer) for number in range(len(prompts)) for answer in range(config.answers)])
    done, n_done = paced(say, "answer", len(prompts) * config.answers), 0
    most_failed = max(FEWEST_FAILED, config.max_failed_frac * len(prompts) * config.answers)
    running: dict[Future[dict[str, Any]], tuple[int, int]] = {}
    with ThreadPoolExecutor(config.concurrency, thread_name_prefix="server") as pool:
        try:
            while True:
                # Only as many as run at once: a limit of tokens or an error then leaves no queue behind.
                while len(running) < config.concurrency and not collected.is_cut:
                    task = next(tasks, None)
                    if task is None:
                        break
                    if config.max_tokens_total and server.counts.tokens >= config.max_tokens_total:
                        collected.is_cut = True
                        break
                    number, answer = task
                    path, body = request_of(prompts[number], config, answer)
                    running[pool.submit(answered, server, log, path, body)] = task
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    number, answer = running.pop(future)
                    try:
                        found[number][answer] = future.result()
                    except RequestError as error:
                        server.counts.add(failed=1)
                        collected.failures.append(f"{prompts[number].where}: {error}")
                    n_done += 1
                    done(n_done)
                if len(collected.failures) > most_failed:
                    raise too_many(collected)
        except BaseException:
            server.stop()  # what waits for a retry ends at once
            raise
    if collected.is_cut:
        say(f"stopped at {server.counts.tokens:,} tokens, server.max_tokens_total is {config.max_tokens_total:,}")
    return found


def answered(server: Server, log: AnswerLog, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the response to a request, from the log if it was asked before."""
    key = request_key(server.url, path, body)
    known = log.get(key)
    if known is not None:
        server.counts.add(cached=1)
        return known
    for attempt in range(server.config.retries + 1):
        response = server.ask(path, body)
        usage = response.get("usage")
        if isinstance(usage, dict):
            server.counts.add(
                prompt_tokens=whole(usage.get("prompt_tokens")), completion_tokens=whole(usage.get("completion_tokens"))
            )
        if text_of_response(response) is not None:
            log.put(key, response)
            return response
        if attempt == server.config.retries or server.is_stopped:
            break
    raise RequestError("the answer has no text in `choices`", again=False)


def whole(value: Any) -> int:
    """Return a count of a response, 0 for what is none."""
    return value if isinstance(value, int) and 0 <= value < 1 << 40 else 0


def request_of(asked: Asked, config: ServerConfig, answer: int) -> tuple[str, dict[str, Any]]:
    """Return the path and the body of a request; answers to one prompt differ in their seed."""
    body: dict[str, Any] = {"model": config.model, "max_tokens": config.max_tokens, "temperature": config.temperature}
    if config.top_p < 1:
        body["top_p"] = config.top_p
    if config.answers > 1 or config.temperature > 0:
        body["seed"] = config.seed + answer
    is_chat = config.api == "chat" or (config.api == "auto" and bool(asked.messages))
    if is_chat:
        messages = [message.to_dict() for message in asked.messages] or [{"role": "user", "content": asked.text}]
        body["messages"] = messages
        if config.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": config.top_logprobs}
        return "/chat/completions", body
    body["prompt"] = asked.text or asked.messages[-1].content
    if config.top_logprobs:
        body["logprobs"] = config.top_logprobs
    return "/completions", body


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
