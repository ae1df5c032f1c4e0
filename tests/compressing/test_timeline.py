"""The time that is left of a compression, by a clock that the test moves."""

from llmctl.compressing.timeline import Timeline


class Clock:
    def __init__(self):
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def test_parts_take_as_long_as_those_of_their_kind_before():
    clock, said = Clock(), []
    line = Timeline(said.append, 600.0, clock)
    line.plan("pruned model", 3)
    line.plan("trial", 2)
    line.plan("quantizing", 1)
    assert line.left() == ""
    line.begin()
    clock.time += 10
    line.done("pruned model", "layers 3: 0.5")
    # Two more of 10 s, two trials of 40 s, 60 s of quantizing and 10 minutes of training.
    assert said == ["layers 3: 0.5  (12:40 left)"]
    line.plan("pruned model", -2)  # the others are hopeless
    line.begin()
    clock.time += 100
    line.done("trial", "trial 1")
    # Another trial of 100 s; quantizing by both: 6 * 110 / 5 s.
    assert said[-1] == "trial 1  (13:52 left)"


def test_a_training_without_minutes_is_only_named():
    clock, said = Clock(), []
    line = Timeline(said.append, None, clock)
    line.plan("trial", 2)
    clock.time += 5
    line.done("trial", "trial 1")
    assert said == ["trial 1  (0:05 left, and the training)"]
