"""Equal documents are found whatever their length, and different ones keep their numbers."""

import numpy as np

from llmctl.preparing.duplicates import describe_duplicates, document_hashes, groups_of, hashes_of


def test_groups_are_numbered_in_the_order_of_their_first_document():
    assert groups_of(hashes_of(["b", "a", "b", "c", "a"])).tolist() == [0, 1, 0, 2, 1]
    assert groups_of(hashes_of(map(str, range(1000)))).tolist() == list(range(1000))


def test_long_documents_that_begin_alike_are_told_apart():
    begin = list(range(50))
    rows = [np.array([*begin, last], dtype=np.uint16) for last in (1, 2, 1)] + [np.array(begin[:40], dtype=np.uint16)]
    hashes = document_hashes(4, rows.__getitem__, np.array([len(row) for row in rows]))
    assert groups_of(hashes).tolist() == [0, 1, 0, 2]


def test_copies_and_leaks_are_counted():
    hashes = hashes_of(["a", "b", "a", "c"])
    assert describe_duplicates(hashes_of(["a", "b"]), np.array([1])) == []
    assert "same side" in describe_duplicates(hashes, np.array([3]))[0]
    assert "1 held-out documents are also" in describe_duplicates(hashes, np.array([2]))[1]
