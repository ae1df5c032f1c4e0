"""Labels: the problem they pose is seen, their set is sorted, and one outside it is named."""

import pytest

from llmctl.data.examples import Example
from llmctl.data.labels import Labels, labels_of, read_names
from llmctl.errors import NotFoundError, UsageError


def of(*values: object) -> list[Example]:
    return [Example(f"`a.csv` line {n}", {"text": "t"}, v, column="mood") for n, v in enumerate(values, start=2)]


@pytest.mark.parametrize(
    ("values", "problem", "names"),
    [
        (["10", "9", "0"], "single", ("0", "9", "10")),
        ([1, 0, 1.0], "single", ("0", "1")),
        ([True, False], "single", ("false", "true")),
        (["好", " 坏 "], "single", ("坏", "好")),
        (["2.5", "5.0", "3"], "regression", ()),
        ([0.5, 1], "regression", ()),
        (["5.0", "3.0"], "single", ("3.0", "5.0")),
        ([["a", "b"], [], ["c"]], "multi", ("a", "b", "c")),
        (["a|b", "c", "b | c"], "multi", ("a", "b", "c")),
        (["v1.5", "x"], "single", ("v1.5", "x")),
    ],
)
def test_the_problem_is_seen(values: list, problem: str, names: tuple[str, ...]):
    assert labels_of(of(*values)) == Labels(problem, names)


def test_targets():
    assert [labels_of(of("b", "a")).encode(e) for e in of("a", "b")] == [0, 1]
    assert [Labels("regression").encode(e) for e in of("2.5", 3, "1e-2")] == [2.5, 3.0, 0.01]
    multi = Labels("multi", ("a", "b", "c"))
    assert [multi.encode(e) for e in of("c|a", ["b"], [])] == [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


def test_given_names_are_taken_and_a_number_is_a_place_among_them(tmp_path):
    (tmp_path / "class.txt").write_text("finance\nrealty\n股票\n")
    names = read_names(str(tmp_path / "class.txt"))
    labels = labels_of(of("2", "0"), names)
    assert labels == Labels("single", names)
    assert [labels.encode(e) for e in of("2", "realty")] == [2, 1]
    assert Labels("single", ("2", "1")).encode(of("2")[0]) == 0, "a name is a name, even when it is a number"
    assert labels_of(of("a|b"), ("a|b", "c")).problem == "single", "a name may hold the separator"


@pytest.mark.parametrize(
    ("labels", "value", "parts"),
    [
        (Labels("single", ("good", "bad")), "god", ["line 2", "`mood`", "`god`", "`good`, `bad`", "did you mean"]),
        (Labels("single", ("good", "bad")), "2", ["line 2", "`2`"]),
        (Labels("single", ("good", "bad")), ["good"], ["line 2", "several"]),
        (Labels("single", ("good", "bad")), None, ["line 2", "`mood`", "empty"]),
        (Labels("single", ("good", "bad")), " ", ["line 2", "`mood`", "empty"]),
        (Labels("single", ("good", "bad")), float("nan"), ["line 2", "nan"]),
        (Labels("single", ("good", "bad")), {"a": 1}, ["line 2", "not a label"]),
        (Labels("multi", ("good", "bad")), "good|ugly", ["line 2", "`ugly`"]),
        (Labels("regression"), "many", ["line 2", "`many`", "not a number"]),
        (Labels("regression"), "1e999", ["line 2", "not a number"]),
        (Labels("regression"), 10**400, ["line 2", "not a number"]),
        (Labels("single", ("good", "bad")), 10**400, ["line 2", "1000"]),
    ],
)
def test_a_label_that_does_not_fit_is_named(labels: Labels, value: object, parts: list[str]):
    with pytest.raises(UsageError) as caught:
        labels.encode(of(value)[0])
    for part in parts:
        assert part in f"{caught.value} {caught.value.hint}"


def test_files_of_names(tmp_path):
    path = tmp_path / "class.txt"
    with pytest.raises(NotFoundError, match=r"class\.txt"):
        read_names(str(path))
    for content, part in [("a\nb\na\n", "line 3"), ("\n", "no labels")]:
        path.write_text(content)
        with pytest.raises(UsageError, match=part):
            read_names(str(path))
