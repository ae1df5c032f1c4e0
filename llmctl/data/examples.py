"""Read labeled examples of a task from tables, finding columns by name.

Knows the columns of each task and their common names. Knows no tokenizers or models. An example with an empty text is
yielded too: the caller decides whether to skip it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmctl.config import ColumnsConfig
from llmctl.data import conversations, pairs, sources, tables, text_files
from llmctl.errors import UsageError
from llmctl.tables.names import closest
from llmctl.tables.tasks import PAIRED_COLUMNS, TASKS, fitting_tasks, or_task


@dataclass(frozen=True)
class Example:
    """One row: its location for error messages, its texts by role, and its target."""

    where: str
    inputs: dict[str, str]
    target: Any
    """classify, similarity: the raw label; translate, summarize: text; qa: list of texts; choice: an index; tokens: tags."""
    choices: tuple[str, ...] = ()
    column: str = ""
    """The column of the target."""


CHOICES = ("choices", "endings", "options")
NUMBERED_CHOICES = (("sol1", "sol2"), ("ending0", "ending1", "ending2", "ending3"), ("choice1", "choice2"))


def read_examples(paths: Sequence[str], task: str, columns: ColumnsConfig) -> Iterator[Example]:
    """Yield the examples of a task of TASKS in order; columns set in `columns` take precedence over common names.

    A table is json, jsonl, csv, tsv or parquet; with `columns.names`, also any file of tab-separated lines. Those names
    also replace the missing header of a csv or tsv. Other inputs: `translate` and `summarize` read lines
    `source<TAB>target` and two parallel files `a.en:a.de`; `choice` reads its answers from a second file, one per line,
    as `data.jsonl:labels.lst`; `qa` reads SQuAD's nested JSON.

    Raises: NotFoundError for a missing file; UsageError naming the file and line of a missing column, a row with the
        wrong number of cells, a row that is not a table row, or if there are no examples.
    """
    # On the command line a list is written with commas; a name that the user makes up needs none.
    names = tuple(part.strip() for name in columns.names for part in name.split(","))
    columns, is_empty = replace(columns, names=names), True
    for path in paths:
        for example in _read_path(path, task, columns):
            is_empty = False
            yield example
    if is_empty:
        raise UsageError(
            f"there are no examples in {', '.join(f'`{path}`' for path in paths)}", "each row must be one example"
        )


def _read_path(path: str, task: str, columns: ColumnsConfig) -> Iterator[Example]:
    files = pairs.two_files(path)
    if files and TASKS[task].is_pairs:
        for where, (source, target) in pairs.parallel_lines(*files):
            yield Example(where, {"source": source}, target)
    elif files and task == "choice":
        yield from _with_answers(_read_file(files[0], task, columns), *files)
    else:
        for name in sources.expand([path]):
            yield from map(_answered, _read_file(name, task, columns))


def _answered(example: Example) -> Example:
    if example.choices and example.target is None:
        hint = "name it with --set columns.answer=NAME, or append a file of answers: rows.jsonl:labels.lst"
        raise UsageError(f"{example.where} has no answer column", hint)
    return example


def _read_file(name: str, task: str, columns: ColumnsConfig) -> Iterator[Example]:
    sources.expand([name])  # raises if the path does not exist
    if TASKS[task].is_pairs and not columns.names and _is_lines(name):
        keys = columns.source or "source", columns.target or "target"
        for where, (source, target) in pairs.tab_lines(name, *keys):
            yield Example(where, {"source": source}, target)
        return
    maker: Callable[..., Example] = globals()[TASKS[task].make]
    finder = _Finder(name, task, columns)
    for where, row in _rows(name, task, columns):
        yield maker(row, finder.roles_of(row, where), where)


def _is_lines(name: str) -> bool:
    return name == text_files.STDIN or not tables.is_table(name)


def _rows(name: str, task: str, columns: ColumnsConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, row) of a file; every row is a mapping of column names to cells."""
    if text_files.is_csv(name) or _is_delimited(name) or (columns.names and _is_lines(name)):
        yield from tables.read_cells(name, columns.names)
        return
    if _is_lines(name):
        shown = "stdin" if name == text_files.STDIN else name
        if name != text_files.STDIN and Path(name).is_file() and Path(name).stat().st_size == 0:
            raise UsageError(f"`{shown}` is empty", "pass a file with examples")
        hint = f"name the columns of tab-separated lines: --set columns.names={_usual(task)}"
        raise UsageError(f"`{shown}` is plain text without column names", hint)
    for where, row in tables.read_rows(name):
        for inner in _nested(row, where) if TASKS[task].make == "question_example" else [row]:
            yield where, _named(inner, where, columns)


def _is_delimited(name: str) -> bool:
    return name != text_files.STDIN and name.lower().removesuffix(".gz").removesuffix(".zst").endswith(".tsv")


def _usual(task: str, n_columns: int = 0) -> str:
    """Return plausible column names for a table without a header, as a hint shows them."""
    roles = TASKS[task].roles
    required = [name for name, role in roles.items() if role.required]
    names = list(roles) if n_columns >= len(roles) else required
    return ",".join(names + ["_"] * (n_columns - len(names)))


def _nested(row: Any, where: str) -> Iterator[Any]:
    """Yield the questions of a SQuAD file (`data` > `paragraphs` > `qas`) with their contexts, or the row itself."""
    if not (isinstance(row, dict) and isinstance(row.get("data"), list)):
        yield row
        return
    for article in row["data"]:
        paragraphs = article.get("paragraphs") if isinstance(article, dict) else None
        if not isinstance(paragraphs, list):
            yield article
            continue
        for paragraph in paragraphs:
            questions = paragraph.get("qas", []) if isinstance(paragraph, dict) else None
            if not isinstance(questions, list) or not all(isinstance(question, dict) for question in questions):
                raise UsageError(
                    f"{where} has a paragraph that is no object with a list `qas` of questions",
                    "SQuAD's layout is `data` > `paragraphs` > `qas`",
                )
            for question in questions:
                yield {"context": paragraph.get("context"), **question}


def _named(row: Any, where: str, columns: ColumnsConfig) -> dict[str, Any]:
    if isinstance(row, list) and columns.names:
        if len(row) != len(columns.names):
            raise UsageError(
                f"{where} has {len(row)} cells, not {len(columns.names)}",
                f"name every column: columns.names is `{','.join(columns.names)}`",
            )
        return dict(zip(columns.names, row, strict=True))
    if not isinstance(row, dict):
        is_list = isinstance(row, list)
        hint = "name the columns of a list with --set columns.names=..." if is_list else "each row must be an object"
        raise UsageError(f"{where} is of type {type(row).__name__}, not a row with columns", hint)
    translation = row.get("translation")  # the layout of the WMT datasets: {"translation": {"de": ..., "en": ...}}
    return translation if isinstance(translation, dict) else row


class _Finder:
    """Finds the column of every role; the result is cached per set of columns, which may vary between rows."""

    def __init__(self, name: str, task: str, columns: ColumnsConfig) -> None:
        self.task, self.columns = task, columns
        self.delimited = _is_lines(name) or text_files.is_csv(name)
        self.cache: dict[tuple[str, ...], dict[str, str]] = {}

    def roles_of(self, row: dict[str, Any], where: str) -> dict[str, str]:
        """Return role -> column."""
        key = tuple(row)
        if key not in self.cache:
            self.cache[key] = self._resolve(key, where)
        return self.cache[key]

    def _resolve(self, existing: tuple[str, ...], where: str) -> dict[str, str]:
        resolved: dict[str, str] = {}
        usual = _usual_pair(existing) if "pair" in TASKS[self.task].roles and not self.columns.text else {}
        for name, role in TASKS[self.task].roles.items():
            chosen = getattr(self.columns, name)
            column = chosen or usual.get(name) or next((n for n in (name, *role.names) if n in existing), "")
            if (chosen or role.required) and (not column or column not in existing):
                raise self._missing(name, chosen, existing, where)
            # Common names overlap between roles; unless the user chose it, a column serves only one role.
            if column and (chosen or column not in resolved.values()):
                resolved[name] = column
            elif role.required:
                raise self._missing(name, chosen, existing, where)
        return resolved

    def _missing(self, role: str, chosen: str, existing: tuple[str, ...], where: str) -> UsageError:
        missing = f"no column `{chosen}`" if chosen else f"no column for the {role}"
        usual = (chosen,) if chosen else (role, *TASKS[self.task].roles[role].names)
        close = next((match for name in usual if (match := closest(name, existing))), "NAME")
        tasks = [] if chosen else [task for task in _fitting(existing) if task != self.task]
        hint = or_task(tasks) + ("or " if tasks else "") + f"name it with --set columns.{role}={close}"
        if self.delimited and not self.columns.names:
            hint += f", or, if the first line is not a header, --set columns.names={_usual(self.task, len(existing))}"
        return UsageError(f"{where} has {missing}; it has {', '.join(f'`{name[:40]}`' for name in existing)}", hint)


def _fitting(columns: tuple[str, ...]) -> tuple[str, ...]:
    """Return the tasks that a table with these columns fits."""
    is_chat = any(all(field in columns for field in fields) for fields in conversations.SHAPES)
    return (("chat",) if is_chat else ()) + fitting_tasks(columns)


def _usual_pair(existing: tuple[str, ...]) -> dict[str, str]:
    for first, second in PAIRED_COLUMNS:
        if first in existing and second in existing:
            return {"text": first, "pair": second}
    return {}


# --- rows to examples ------------------------------------------------------------------------------------------------


def _text(row: dict[str, Any], column: str, where: str, role: str) -> str:
    return tables.row_text(row, column, where, f"columns.{role}")


def _texts(row: dict[str, Any], roles: dict[str, str], where: str, *names: str) -> dict[str, str]:
    return {name: _text(row, roles[name], where, name) for name in names if name in roles}


def plain_example(row: dict[str, Any], roles: dict[str, str], where: str) -> Example:
    """Convert a row with one or two texts and a label."""
    label = roles.get("label", "")
    return Example(where, _texts(row, roles, where, "text", "pair"), row.get(label), column=label)


def pair_example(row: dict[str, Any], roles: dict[str, str], where: str) -> Example:
    """Convert a row with a source and a target text."""
    target = _text(row, roles["target"], where, "target")
    return Example(where, _texts(row, roles, where, "source"), target, column=roles["target"])


def question_example(row: dict[str, Any], roles: dict[str, str], where: str) -> Example:
    """Convert a question; its answers are one text, a list, or SQuAD's `{"text": [...]}` or `[{"text": ...}]`."""
    column = roles["answer"]
    value = row[column]
    if isinstance(value, dict):
        value = value.get("text", [])
    values: list[Any] = value if isinstance(value, list) else [value]
    answers = [answer.get("text") if isinstance(answer, dict) else answer for answer in values]
    # "" stands for no wrong answer, since every string is a valid one.
    wrong = next((answer for answer in answers if not isinstance(answer, (str, int, float))), "")
    if not isinstance(wrong, (str, int, float)):
        raise UsageError(
            f"{where}: `{column}` contains {wrong!r}, not an answer", "an answer is a text or a list of texts"
        )
    return Example(
        where, _texts(row, roles, where, "question", "context"), [str(a) for a in answers], (), column=column
    )


def tagged_example(row: dict[str, Any], roles: dict[str, str], where: str) -> Example:
    """Convert tagged words; tags are names, or the numbers of a model's labels."""
    tokens, tags = row[roles["tokens"]], row[roles["tags"]]
    for name, values, kinds in (("tokens", tokens, (str,)), ("tags", tags, (str, int))):
        if not isinstance(values, list) or not all(isinstance(each, kinds) for each in values):
            raise UsageError(
                f"{where}: `{roles[name]}` is {str(values)[:60]!r}, not a list of {name}",
                '{"tokens": ["Anna", "left"], "tags": ["B-PER", "O"]}',
            )
    if len(tokens) != len(tags):
        raise UsageError(f"{where} has {len(tokens)} tokens and {len(tags)} tags", "every token has one tag")
    words = [" ".join(tables.whole_characters(token).split()) or "\ufffd" for token in tokens]
    return Example(where, {"tokens": "\n".join(words)}, tags, column=roles["tags"])


def choice_example(row: dict[str, Any], roles: dict[str, str], where: str) -> Example:
    """Convert a question with options; the target is the index of the right one."""
    options, letters = _options(row, where)
    inputs = _texts(row, roles, where, "question", "context")
    if not inputs:
        raise UsageError(
            f"{where} has no column for the question; it has {', '.join(f'`{name}`' for name in row)}",
            "name it with --set columns.question=NAME",
        )
    column = roles.get("answer", "")
    target = _index(row[column], options, letters, where, column) if column else None
    return Example(where, inputs, target, options, column)


def _options(row: dict[str, Any], where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return a row's choices and their letters (A, B, ...), if it has any (the layout of ARC)."""
    numbered = next((names for names in NUMBERED_CHOICES if all(name in row for name in names)), ())
    column = next((name for name in CHOICES if name in row), "")
    value: Any = [row[name] for name in numbered] if numbered else row.get(column)
    letters: Any = ()
    if isinstance(value, dict):
        value, letters = value.get("text"), value.get("label", ())
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(option, str) for option in value):
        existing = ", ".join(f"`{name}`" for name in row)
        raise UsageError(f"{where} has no list of choices; it has {existing}", "name the list `choices`")
    return tuple(value), tuple(map(str, letters))


def _index(value: Any, options: tuple[str, ...], letters: tuple[str, ...], where: str, column: str) -> int:
    """Return the index of the choice that an answer names: by the row's letters, its index, A, B, ... or its text."""
    text = str(value).strip()
    # The row's own letters first: ARC also labels choices 1, 2, 3, 4, which are not indexes from 0.
    if text in letters:
        return letters.index(text)
    if text.isascii() and text.isdigit() and int(text) < len(options):
        return int(text)
    if len(text) == 1 and 0 <= ord(text.upper()) - ord("A") < len(options):
        return ord(text.upper()) - ord("A")
    if text in options:
        return options.index(text)
    cell = f"{where}: `{column}`" if column else where
    raise UsageError(
        f"{cell} is `{text[:60]}`, not one of the {len(options)} choices",
        "give the choice's index from 0, its letter or its text",
    )


def _with_answers(examples: Iterator[Example], rows: str, answers: str) -> Iterator[Example]:
    """Join examples with the lines of a separate file of answers."""
    sources.expand([answers])
    lines = ((number, line.strip()) for number, line in text_files.numbered_lines(answers) if line.strip())
    for example in examples:
        number, line = next(lines, (0, ""))
        if not line:
            raise UsageError(
                f"`{answers}` has fewer lines than `{rows}` has rows: {example.where} has no answer",
                "write one answer per row",
            )
        target = _index(line, example.choices, (), f"`{answers}` line {number}", "")
        yield Example(example.where, example.inputs, target, example.choices, answers)
    if extra := next(lines, None):
        raise UsageError(
            f"`{answers}` has more lines than `{rows}` has rows, from line {extra[0]}", "write one answer per row"
        )
