"""Texts written by a model behind a server: its answers to prompts, as rows that `finetune` and `distill` read.

Every response is kept by the content of its request (answer_log.py), so that an interrupted or repeated run pays for nothing
twice. The rows are in the order of the prompts, whatever the order of the responses.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from llmctl.config import ServerConfig
from llmctl.data.prompts import Asked
from llmctl.distilling.answer_log import AnswerLog, request_key
from llmctl.distilling.server import RequestError, Server
from llmctl.distilling.server_rows import Collected, kept_rows, text_of_response
from llmctl.errors import StoppedError, UsageError
from llmctl.files import write_bytes
from llmctl.runs.progress import paced

ANSWERS = "answers.jsonl"
FEWEST_FAILED = 3
"""Failures that never end a run, however few prompts there are."""


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
    collected = Collected(folder / ANSWERS, len(prompts), has_messages=any(asked.messages for asked in prompts))
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
    with log.asking(key):
        return known_or_asked(server, log, key, path, body)


def known_or_asked(server: Server, log: AnswerLog, key: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the response to a request of which no equal one is running."""
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
