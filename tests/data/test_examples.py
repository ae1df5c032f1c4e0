"""Rows become examples whatever their layout, and what is missing is named with its file, line and column."""

import gzip
import json
from pathlib import Path

import pytest

from llmctl.config import ColumnsConfig
from llmctl.data.examples import Example, read_examples
from llmctl.errors import LlmctlError, NotFoundError, UsageError


def examples(path: object, task: str = "classify", **columns) -> list[Example]:
    return list(read_examples([str(path)], task, ColumnsConfig(**columns)))


def written(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def rows(path: Path, *values: object) -> Path:
    return written(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def test_usual_columns_are_found_and_chosen_ones_win(tmp_path):
    path = written(tmp_path / "a.csv", 'label,review\n1,"好, 很好"\n0,\n')
    found = examples(path)
    assert [(e.inputs, e.target, e.column) for e in found] == [
        ({"text": "好, 很好"}, "1", "label"),
        ({"text": ""}, "0", "label"),
    ]
    assert found[0].where == f"`{path}` line 2"
    path = rows(tmp_path / "b.jsonl", {"text": "a", "body": "b", "label": 1, "mood": ["x"]})
    assert examples(path)[0].inputs == {"text": "a"}
    chosen = examples(path, text="body", label="mood")[0]
    assert (chosen.inputs, chosen.target) == ({"text": "b"}, ["x"])


@pytest.mark.parametrize(
    ("first", "second"), [("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence")]
)
def test_pairs_of_texts(tmp_path, first: str, second: str):
    path = rows(tmp_path / "p.jsonl", {second: "b", first: "a", "label": 0})
    assert examples(path)[0].inputs == {"text": "a", "pair": "b"}
    assert examples(path, text=second)[0].inputs["text"] == "b"


def test_a_second_text_is_never_guessed(tmp_path):
    path = rows(tmp_path / "p.jsonl", {"text": "a", "sentence": "b", "title": "c", "label": 0})
    assert examples(path)[0].inputs == {"text": "a"}


@pytest.mark.parametrize("name", ["a.tsv", "a.txt", "a.tsv.gz", "a.txt.gz"])
def test_tables_without_a_header(tmp_path, name: str):
    path = written(tmp_path / name, 'one "quote\t0\r\n二\t1\n')
    found = examples(path, names=("text", "label"))
    assert [(e.inputs["text"], e.target) for e in found] == [('one "quote', "0"), ("二", "1")]
    assert found[1].where.endswith("line 2")
    assert examples(path, names=("text, label",)) == found, "as `--set columns.names=text,label` gives them"


def test_a_csv_without_a_header_and_rows_that_are_lists(tmp_path):
    path = written(tmp_path / "s.csv", '"a, b",c,2.5\nd,e,5.0\n')
    found = examples(path, "similarity", names=("text", "pair", "score"))
    assert [(e.inputs, e.target) for e in found] == [
        ({"text": "a, b", "pair": "c"}, "2.5"),
        ({"text": "d", "pair": "e"}, "5.0"),
    ]
    path = rows(tmp_path / "l.jsonl", ["a", 1], ["b", 0])
    assert [e.target for e in examples(path, names=("text", "label"))] == [1, 0]


def test_sources_and_targets(tmp_path):
    wanted = [({"source": "a b"}, "x"), ({"source": "c"}, "诗")]
    written(tmp_path / "p.tsv", "source\ttarget\na b\tx\nc\t诗\n")
    written(tmp_path / "p.txt", "a b\tx\nc\t诗\n")
    rows(tmp_path / "p.jsonl", {"translation": {"en": "a b", "de": "x"}}, {"translation": {"en": "c", "de": "诗"}})
    rows(tmp_path / "s.jsonl", {"document": "a b", "summary": "x"}, {"article": "c", "highlights": "诗"})
    written(tmp_path / "p.en", "a b\nc\n")
    written(tmp_path / "p.zh", "x\n诗\n")
    for name in ("p.tsv", "p.txt"):
        assert [(e.inputs, e.target) for e in examples(tmp_path / name, "translate")] == wanted
    with pytest.raises(UsageError, match="`en`, `de`"):  # which way is for the user to say
        examples(tmp_path / "p.jsonl", "translate")
    named = examples(tmp_path / "p.jsonl", "translate", source="en", target="de")
    assert [(e.inputs, e.target) for e in named] == wanted
    assert [(e.inputs, e.target) for e in examples(tmp_path / "s.jsonl", "summarize")] == wanted
    joined = examples(f"{tmp_path / 'p.en'}:{tmp_path / 'p.zh'}", "translate")
    assert [(e.inputs, e.target) for e in joined] == wanted
    assert joined[1].where == f"`{tmp_path / 'p.en'}` line 2"
    turned = examples(tmp_path / "p.txt", "translate", names=("target", "source"))
    assert turned[0].inputs == {"source": "x"}
    assert turned[0].target == "a b"


def test_questions(tmp_path):
    path = rows(
        tmp_path / "q.jsonl",
        {"question": "q", "context": "c", "answers": {"text": ["a", "b"], "answer_start": [0, 1]}},
        {"question": "q", "answer": "a"},
        {"question": "q", "answers": []},
        {"question": "q", "answer": 4},
    )
    found = examples(path, "qa")
    assert [e.target for e in found] == [["a", "b"], ["a"], [], ["4"]]
    assert found[0].inputs == {"question": "q", "context": "c"}
    squad = {"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": [{"text": "a"}]}]}]}]}
    written(tmp_path / "squad.json", json.dumps(squad))
    assert examples(tmp_path / "squad.json", "qa") == [
        Example(f"`{tmp_path / 'squad.json'}` item 0", {"question": "q", "context": "c"}, ["a"], (), "answers")
    ]


def test_choices_of_every_layout(tmp_path):
    path = rows(
        tmp_path / "c.jsonl",
        {"goal": "g", "sol1": "x", "sol2": "y", "label": 1},
        {"ctx": "g", "endings": ["x", "y"], "label": "0"},
        {"question": "g", "choices": ["x", "y"], "answer": "B"},
        {"question": "g", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        {"prompt": "g", "options": ["x", "y"], "answer": "x"},
    )
    found = examples(path, "choice")
    assert [e.target for e in found] == [1, 0, 1, 1, 0]
    assert all(e.choices == ("x", "y") for e in found)
    assert [e.inputs for e in found[:2]] == [{"question": "g"}, {"context": "g"}]


def test_answers_in_a_file_of_their_own(tmp_path):
    path = rows(tmp_path / "c.jsonl", *[{"goal": str(n), "sol1": "x", "sol2": "y"} for n in range(3)])
    labels = tmp_path / "c.lst"
    both = f"{path}:{labels}"
    with pytest.raises(NotFoundError, match=r"c\.lst"):
        examples(both, "choice")
    assert [e.target for e in examples(both if labels.write_text("0\n1\n0\n") else "", "choice")] == [0, 1, 0]
    for content, part in [("0\n1\n", "fewer lines than"), ("0\n1\n0\n1\n", "line 4"), ("0\n7\n0\n", "line 2")]:
        labels.write_text(content)
        with pytest.raises(UsageError, match=part):
            examples(both, "choice")


@pytest.mark.parametrize(
    ("name", "content", "task", "columns", "parts"),
    [
        ("a.csv", "", "classify", {}, ["no examples", "a.csv"]),
        ("a.csv", "text,label\n", "classify", {}, ["no examples", "a.csv"]),
        ("a.csv", "text,label\na,1\nb\n", "classify", {}, ["a.csv` line 3", "1 cells, not 2"]),
        ("a.csv", "text,label\na,1\nb,c,1\n", "classify", {}, ["a.csv` line 3", "3 cells, not 2"]),
        ("a.csv", 'text,label\n"a,1\n', "classify", {}, ["a.csv` line 2", "unexpected end"]),
        ("a.csv", "a film\t0\n", "classify", {"names": ("text", "label")}, ["a.csv` line 1", "1 cells, not 2"]),
        ("a.csv", "txt,label\na,1\n", "classify", {}, ["line 2", "text", "`txt`", "columns.text=txt", "text,label"]),
        ("a.csv", "a,b,2.5\nc,d,1\n", "similarity", {}, ["line 2", "`a`", "columns.names=text,pair,label"]),
        ("a.tsv", "film\t0\nbook\t1\n", "classify", {}, ["line 2", "columns.names=text,label"]),
        ("a.txt", "film\t0\nbook\t1\n", "classify", {}, ["plain text", "columns.names=text,label"]),
        ("a.jsonl", '{"text": "a"}\n', "classify", {"label": "mood"}, ["line 1", "`mood`", "`text`"]),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "a"}\n', "classify", {}, ["line 2", "label"]),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text"\n', "classify", {}, ["line 2", "not JSON"]),
        ("a.jsonl", '{"text": 5, "label": 1}\n', "classify", {}, ["line 1", "`text` is of type int"]),
        ("a.jsonl", "[1, 2]\n", "classify", {}, ["line 1", "list", "columns.names"]),
        ("a.jsonl", "[1, 2]\n", "classify", {"names": ("text",)}, ["line 1", "2 cells"]),
        ("a.jsonl", "7\n", "classify", {}, ["line 1", "int"]),
        ("a.jsonl", '{"question": "q", "answer": null}\n', "qa", {}, ["line 1", "answer", "None"]),
        ("a.jsonl", '{"question": "q", "answer": 1}\n', "choice", {}, ["line 1", "choices"]),
        ("a.jsonl", '{"goal": "q", "sol1": "a", "sol2": "b"}\n', "choice", {}, ["line 1", "answer", "labels.lst"]),
        ("a.jsonl", '{"choices": ["a", "b"], "answer": 1}\n', "choice", {}, ["line 1", "question"]),
        ("a.jsonl", '{"ctx": "q", "endings": ["a", "b"], "label": 2}\n', "choice", {}, ["line 1", "`2`", "2 choices"]),
        ("a.tsv", "a\tb\nonly\n", "translate", {}, ["line 2", "no tab"]),
        ("a.json", '{"data": [{"paragraphs": [["x"]]}]}', "qa", {}, ["item 0", "qas"]),
        ("a.json", '{"data": [{"paragraphs": [{"qas": 7}]}]}', "qa", {}, ["item 0", "qas"]),
        ("a.json", '{"data": [{"paragraphs": [{"qas": [7]}]}]}', "qa", {}, ["item 0", "qas"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path, name: str, content: str, task: str, columns: dict, parts: list[str]):
    with pytest.raises(LlmctlError) as caught:
        examples(written(tmp_path / name, content), task, **columns)
    assert caught.value.exit_code == 2
    for part in parts:
        assert part in f"{caught.value} {caught.value.hint}"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(NotFoundError, match="nowhere"):
        examples(tmp_path / "nowhere.csv")


def test_real_tables(shared_data):
    sst = examples(shared_data / "sst2" / "dev.tsv.gz", names=("text", "label"))
    assert (len(sst), {e.target for e in sst}) == (872, {"0", "1"})
    stsb = examples(shared_data / "stsb" / "stsb-en-test.csv", "similarity", names=("text", "pair", "label"))
    assert len(stsb) == 1379
    news = examples(shared_data / "thucnews-titles" / "dev.txt", names=("title", "label"))
    assert (len(news), len({e.target for e in news})) == (10_000, 10)
    hotels = examples(shared_data / "chnsenticorp-htl" / "ChnSentiCorp_htl_all.csv.gz")
    assert (len(hotels), sum(e.target == "1" for e in hotels)) == (7766, 5322)
    assert sum(not e.inputs["text"] for e in hotels) == 1
    piqa = examples(f"{shared_data / 'piqa' / 'valid.jsonl.gz'}:{shared_data / 'piqa' / 'valid-labels.lst'}", "choice")
    assert (len(piqa), piqa[1].target, len(piqa[0].choices)) == (1838, 1, 2)


@pytest.mark.parametrize("index", ["", " ", "Unnamed: 0", "__index_level_0__"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_an_index_without_a_name_is_no_column(tmp_path, index: str, suffix: str):
    names, cells = (index, "text", "y"), [(number, f"text {number}", "pos") for number in range(3)]
    if suffix == ".jsonl":
        path = rows(tmp_path / "a.jsonl", *[dict(zip(names, row, strict=True)) for row in cells])
    else:
        sign = "," if suffix == ".csv" else "\t"
        lines = [sign.join(map(str, row)) for row in [names, *cells]]
        path = written(tmp_path / f"a{suffix}", "\n".join(lines) + "\n")
    for task, role in (("classify", "label"), ("qa", "question"), ("similarity", "pair")):
        with pytest.raises(UsageError, match=f"no column for the {role}; it has `text`, `y`$"):
            examples(path, task)
    assert [(e.inputs, e.target) for e in examples(path, label="y")] == [
        ({"text": f"text {number}"}, "pos") for number in range(3)
    ]


@pytest.mark.parametrize(
    ("columns", "task", "fitting"),
    [
        ({"messages": []}, "classify", "`--task chat`"),
        ({"question": "a", "context": "b", "answer": "c"}, "classify", "`--task chat` or `qa`"),
        ({"source": "a", "target": "b"}, "classify", "`--task translate` or `summarize`"),
        ({"text": "a", "label": "b"}, "qa", "`--task classify`"),
        ({"text": "a", "y": "b"}, "classify", ""),
    ],
)
def test_the_task_that_the_columns_fit_is_named(tmp_path, columns, task, fitting):
    with pytest.raises(UsageError) as caught:
        examples(rows(tmp_path / "a.jsonl", columns), task)
    assert caught.value.hint.startswith(f"these columns fit {fitting}; or name it" if fitting else "name it")


def test_the_index_of_a_parquet_table_is_no_column(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install pyarrow")
    import pyarrow as pa

    table = pa.table({"text": ["a", "b"], "y": ["pos", "neg"], "__index_level_0__": [0, 1]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="no column for the label; it has `text`, `y`"):
        examples(tmp_path / "a.parquet")
    assert [e.target for e in examples(tmp_path / "a.parquet", label="y")] == ["pos", "neg"]
