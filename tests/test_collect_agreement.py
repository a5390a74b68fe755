"""Krippendorff's alpha against the published worked examples, and what is made of people's orders."""
import random

import pytest

from rlhf.collect.agreement import alpha, of_orders, ranks

NONE = None
# K. Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), https://repository.upenn.edu/asc_papers/43: the data of its sections A to D.
BINARY = ["0100000010", "1110010000"]
NOMINAL = ["aabbdcccedda", "babbbccceddd"]
FOUR_OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3],
    [NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE],
]
# https://en.wikipedia.org/wiki/Krippendorff%27s_alpha, "A computational example": three coders, 15 units
THREE_CODERS = ["*****34121133*3", "1*213343*******", "**21344*21133*4"]


def units(rows) -> list[list]:
    return [[value for value in column if value not in (None, "*")] for column in zip(*rows, strict=True)]


@pytest.mark.parametrize(("rows", "metric", "published"), [
    (BINARY, "nominal", 0.095), (NOMINAL, "nominal", 0.692),
    (FOUR_OBSERVERS, "nominal", 0.743), (FOUR_OBSERVERS, "ordinal", 0.815), (FOUR_OBSERVERS, "interval", 0.849), (FOUR_OBSERVERS, "ratio", 0.797),
    (THREE_CODERS, "nominal", 0.691), ([[int(value) if value != "*" else None for value in row] for row in THREE_CODERS], "interval", 0.811),
])
def test_published_examples(rows, metric, published):
    assert round(alpha(units(rows), metric), 3) == published


def test_by_hand():
    """Every step on paper, from the definition.

    Nominal, units (1 1), (1 2): o_11 = 2, o_12 = o_21 = 1; n_1 = 3, n_2 = 1, n = 4. D_o = 2/4, D_e = 2 * 3 * 1 / (4 * 3) = 1/2: alpha = 0.
    Ordinal, (1 2), (2 3), (1 1), (3 3) and a lone 2, which does not count: n_1 = 3, n_2 = 2, n_3 = 3, n = 8. d(1,2)^2 = (3 + 2 - 5/2)^2 = 6.25 = d(2,3)^2,
    d(1,3)^2 = (3 + 2 + 3 - 6/2)^2 = 25. 8 D_o = 4 * 6.25 = 25, 56 D_e = 2 (3 * 2 * 6.25 + 2 * 3 * 6.25 + 3 * 3 * 25) = 600: alpha = 1 - 7 * 25 / 600 = 17/24.
    Three values of a unit, (1 1 2), count by halves: o_11 = 2 * 1 / 2 = 1, o_12 = o_21 = 2 * 1 / 2 = 1; with (2 2), o_22 = 2. n_1 = 2, n_2 = 3, n = 5:
    5 D_o = 2, 20 D_e = 12: alpha = 1 - 4 * 2 / 12 = 1/3.
    """
    assert alpha([[1, 1], [1, 2]], "nominal") == pytest.approx(0, abs=1e-15)
    assert alpha([[1, 2], [2, 3], [1, 1], [3, 3], [2]], "ordinal") == pytest.approx(17 / 24, abs=1e-15)
    assert alpha([[1, 1, 2], [2, 2]], "nominal") == pytest.approx(1 / 3, abs=1e-15) == alpha([[1, 2, 1], [2, 2]], "ordinal")


def test_edges():
    assert alpha([["a", "a"], ["b", "b"]], "nominal") == 1
    assert alpha([], "nominal") is None and alpha([["a"], ["b"]], "ordinal") is None
    assert alpha([["a", "a"], ["a", "a"]], "nominal") is None  # one value only: nothing could have differed
    assert alpha([["a", "b"], ["b", "a"]], "nominal") < 0
    assert alpha([[1, 2], [7]], "interval") == alpha([[1, 2]], "interval")  # a unit with one value does not count
    with pytest.raises(ValueError, match="metric=rank"):
        alpha([], "rank")


def test_ordinal_does_not_depend_on_the_numbers_but_on_their_order():
    found = units(FOUR_OBSERVERS)
    stretched = [[value**3 for value in values] for values in found]
    assert alpha(found, "ordinal") == pytest.approx(alpha(stretched, "ordinal"), abs=1e-12) and alpha(found, "interval") != alpha(stretched, "interval")


def test_chance_is_zero():
    draw = random.Random(1)
    assert abs(alpha([[draw.randrange(4), draw.randrange(4)] for _ in range(20_000)], "nominal")) < 0.02
    orders = {str(task): {name: [[one] for one in draw.sample(["a", "b", "c"], 3)] for name in ("kim", "lee")} for task in range(5_000)}
    found = of_orders(orders)
    assert abs(found["order"]) < 0.03 and abs(found["best"]) < 0.03 and abs(found["pairs"] - 0.5) < 0.02


def test_ranks():
    assert ranks([["c"], ["a", "b"], ["d"]]) == {"c": 1, "a": 2.5, "b": 2.5, "d": 4}


def test_orders_of_people():
    found = of_orders({
        "1": {"kim": [["a"], ["b"], ["c"]], "lee": [["a"], ["b"], ["c"]]},
        "2": {"kim": [["a"], ["b"]], "lee": [["b"], ["a"]], "park": [["a"], ["b"]]},
        "3": {"kim": [["a"], ["b"]]},  # nobody to agree with
        "4": {"kim": [["a", "b"]], "lee": [["a"], ["b"]]},  # a tie says nothing of a pair
    })
    # pairs: 3 of 3 in task 1; kim-lee no, kim-park yes, lee-park no in task 2
    assert (found["tasks"], found["compared"], found["pairs"]) == (3, 6, 4 / 6)
    assert found["people"] == {"kim": [4 / 5, 5], "lee": [3 / 5, 5], "park": [1 / 2, 2]}
    assert found["best"] == alpha([["a", "a"], ["a", "b", "a"], ["ab", "a"]], "nominal")
    assert found["order"] == alpha([[1, 1], [2, 2], [3, 3], [1, 2, 1], [2, 1, 2], [1.5, 1], [1.5, 2]], "ordinal")
    assert of_orders({}) == {"tasks": 0, "order": None, "best": None, "pairs": None, "compared": 0, "people": {}}
