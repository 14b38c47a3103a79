"""An evaluation in a terminal."""

import pytest

from pipeline.config.evaluation import EvaluationConfig
from pipeline.evaluation import Accuracy, Evaluation
from pipeline.evaluation.records import ClassResult
from pipeline.evaluation.text import describe


def evaluation(num_classes: int) -> Evaluation:
    """The more robust, the lower the number of the class."""
    some, n = Accuracy.of(1, 2), 2 * num_classes
    per_class = tuple(
        ClassResult(name=str(label), clean=Accuracy.of(n, n), robust=Accuracy.of(n - label, n))
        for label in range(num_classes)
    )
    return Evaluation(
        dataset="digits", data_digest="d", model_digest="abc", reference_digest=None, seed=3, config=EvaluationConfig(),
        n=2, split_size=447, clean=some, attacks=(), union=some, other_threats=(), curve=(), per_class=per_class,
        warnings=(), arrays_sha256="",
    )  # fmt: skip


def test_the_first_line_says_how_many_of_the_images_were_judged():
    first = describe(evaluation(2)).splitlines()[0]
    assert first == "2 of 447 test images of digits, linf 8/255, seed 3, weights abc"


def test_every_class_is_there_with_its_numbers():
    lines = describe(evaluation(3)).splitlines()
    assert lines[-1] == "class 2                  66.7 % [30.0, 90.3] (n = 6), clean 100.0 % [61.0, 100.0] (n = 6)"
    assert [line.split()[1] for line in lines[-3:]] == ["0", "1", "2"]


@pytest.mark.parametrize("num_classes", [11, 1000])
def test_of_many_classes_the_least_robust_are_shown(num_classes):
    lines = describe(evaluation(num_classes)).splitlines()
    assert lines[-1] == f"and {num_classes - 10} classes that are no less robust"
    shown = [int(line.split()[1]) for line in lines if line.startswith("class ")]
    assert shown == list(range(num_classes - 10, num_classes))
