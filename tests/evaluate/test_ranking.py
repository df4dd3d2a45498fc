from phi3_plugin.evaluate import changed, worst
from tests.evaluate.made import ROWS, made


def test_the_worst_of_the_last_model_come_first():
    assert worst(made(), 10) == [3, 2]  # what is right is not among them
    assert worst(made(), 1) == [3]
    assert worst(made(adapter=False), 10)[0] == 4  # it said nothing
    assert worst(made(), 0) == []


def test_what_the_adapter_gained_and_lost():
    gained, lost = changed(made(), 10)
    assert set(gained) == {0, 1, 4} and gained[-1] == 1  # whose number was right before
    assert lost == [2, 3]  # a right number that is lost comes before another text
    assert changed(made(), 1) == (gained[:1], [2])
    assert changed(made(adapter=False), 10) == ([], [])


def test_equal_answers_are_neither():
    rows = [(prompt, reference, base, base) for prompt, reference, base, _ in ROWS]
    assert changed(made(rows=rows), 10) == ([], [])
