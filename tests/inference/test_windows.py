"""Long texts are cut into windows that overlap, fit the context and know where they are in the text."""

from llmctl.inference.windows import ranges, windows

LONG = "a list of strings 中文，诗。 " * 20


def test_windows_cover_a_text_and_share_their_ends():
    assert list(ranges(10, 4, 2)) == [(0, 4), (2, 6), (4, 8), (6, 10)]
    assert list(ranges(11, 4, 1)) == [(0, 4), (3, 7), (6, 10), (9, 11)]
    assert list(ranges(4, 4, 2)) == [(0, 4)]
    assert list(ranges(0, 4, 2)) == [(0, 0)]
    assert list(ranges(3, 1, 0)) == [(0, 1), (1, 2), (2, 3)]


def test_every_window_fits_and_knows_its_characters(make_loaded):
    loaded = make_loaded("learned", family="encoder", n_labels=5, head="tokens")
    tokenizer = loaded.tokenizer
    found, cut = windows(loaded, ["a list", LONG, ""], 40)
    assert not cut
    assert [window.text for window in found] == [0, *[1] * (len(found) - 2), 2]
    assert len(found) > 5
    for window in found:
        assert len(window.row.ids) <= 40
        assert window.row.ids[0] == tokenizer.bos_id
        assert window.row.ids[-1] == tokenizer.eos_id
        inner = window.row.ids[window.first : window.first + len(window.spans)]
        text = ("a list", LONG, "")[window.text]
        assert tokenizer.decode(inner) == text[window.spans[0][0] : window.spans[-1][1]] if inner else not text


def test_a_question_stands_before_every_window(make_loaded):
    loaded = make_loaded("learned", family="encoder", n_labels=2, head="span")
    tokenizer = loaded.tokenizer
    question = tokenizer.encode("a list")
    found, cut = windows(loaded, [LONG], 40, ["a list"])
    assert not cut
    for window in found:
        row = window.row
        assert row.ids[: window.first] == [tokenizer.bos_id, *question, tokenizer.eos_id]
        assert row.types == [0] * window.first + [1] * (len(row.ids) - window.first)
        assert len(row.ids) <= 40
    found, cut = windows(loaded, ["a list"], 40, [LONG])
    assert cut == {0}
    assert all(len(window.row.ids) <= 40 and window.spans for window in found)
