"""What a run shows of its samples."""

from llmctl.runs.journal import Journal, without_repeats
from llmctl.runs.progress import Silent


def test_repeated_words_are_shown_twice():
    assert without_repeats(" the" * 40) == " the the…"
    assert without_repeats("a b" + " If the the" * 9 + " end") == "a b If the the If the the… end"
    assert without_repeats("." * 50) == "..…"
    assert without_repeats("one two two three") == "one two two three"


def test_the_same_sample_is_shown_once_and_recorded_each_time(tmp_path):
    said: list[str] = []
    progress = Silent()
    progress.say = said.append  # type: ignore[method-assign]
    journal = Journal(tmp_path, progress)
    for step, text in ((1, " a\nb"), (2, " a\nb"), (3, " c")):
        journal.show(step, [{"prompt": "p", "text": text}])
    assert said == ["  p| a b", "  p| c"]
    assert [line["step"] for line in journal.samples.read()] == [1, 2, 3]
