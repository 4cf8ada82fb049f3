from __future__ import annotations

import pytest

from resu_compile.experiments.search import trial_settings
from resu_compile.experiments.tuning import choose_settings

SPACE = {"a": [1, 2, 3], "b": {"low": 0.01, "high": 1.0, "log": True}}


def test_random_trials_are_always_the_same():
    found = trial_settings(SPACE, trials=8, strategy="random", seed="1000 t m 0.9")
    assert found == trial_settings(SPACE, trials=8, strategy="random", seed="1000 t m 0.9")
    assert found != trial_settings(SPACE, trials=8, strategy="random", seed="1001 t m 0.9")
    assert found[0] == {}
    assert len(found) == 8
    assert all(item["a"] in (1, 2, 3) and 0.01 <= item["b"] <= 1.0 for item in found[1:])


def test_random_trials_of_a_small_space_are_all_there_is():
    found = trial_settings({"a": [1, 2], "b": [True, False]}, trials=8, strategy="random", seed="")
    assert found[0] == {}
    assert sorted((i["a"], i["b"]) for i in found[1:]) == [
        (1, False),
        (1, True),
        (2, False),
        (2, True),
    ]


@pytest.mark.parametrize(
    ("trials", "expected"),
    [
        (0, []),
        (1, [{}]),
        (2, [{}, {"a": 2, "b": pytest.approx(0.1)}]),
        (
            4,
            [
                {},
                {"a": 1, "b": pytest.approx(0.01)},
                {"a": 2, "b": pytest.approx(0.1)},
                {"a": 3, "b": pytest.approx(1.0)},
            ],
        ),
    ],
)
def test_grid(trials, expected):
    assert trial_settings(SPACE, trials=trials, strategy="grid", seed="") == expected


def test_a_whole_grid():
    found = trial_settings({"a": [1, 2], "b": [3, 4]}, trials=8, strategy="grid", seed="")
    assert found == [{}, *({"a": a, "b": b} for a in (1, 2) for b in (3, 4))]


def test_a_method_without_a_space_has_one_trial():
    assert trial_settings({}, trials=8, strategy="random", seed="") == [{}]


# -- choosing --------------------------------------------------------------------------------
def trial(number, score, *, higher=True, status="done"):
    return {
        "trial": number,
        "status": status,
        "metric": "m",
        "higher_is_better": higher,
        "scores": {"validation": {"m": score}, "test": {"m": -number}},
        "settings": {"n": number},
    }


def test_the_best_validation_score_wins():
    assert choose_settings([trial(0, 0.5), trial(1, 0.7), trial(2, 0.6)]) == {"n": 1}
    scores = [0.5, 0.7, 0.4, 0.4]
    found = choose_settings([trial(i, s, higher=False) for i, s in enumerate(scores)])
    assert found == {"n": 2}  # of equal ones the first


def test_failed_trials_lose():
    failed = {"trial": 0, "status": "failed", "error": "boom"}
    assert choose_settings([failed, trial(1, None), trial(2, -5.0)]) == {"n": 2}
    with pytest.raises(ValueError, match="all 2 failed; the first one: boom"):
        choose_settings([failed, trial(1, None)])
