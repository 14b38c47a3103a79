"""The last lines of a chain: every accuracy with its number of images and its interval."""

from pathlib import Path

from pipeline.config.base import ThreatModel
from pipeline.config.evaluation import EvaluationConfig
from pipeline.config.load import load_config
from pipeline.evaluation import Accuracy, Evaluation
from pipeline.stages.node import Finished
from pipeline.stages.summary import closing_lines


def evaluated(directory: Path, clean: int, robust: int, dataset: str) -> Finished:
    Evaluation(
        dataset=dataset, data_digest="d", model_digest="m", reference_digest=None, seed=0, n=224, split_size=224,
        config=EvaluationConfig(threat=ThreatModel(eps=0.15)), clean=Accuracy.of(clean, 224), attacks=(),
        union=Accuracy.of(robust, 224), other_threats=(), curve=(), per_class=(), warnings=(), arrays_sha256="",
    ).save(directory)  # fmt: skip
    return Finished(directory, None)  # type: ignore[arg-type]  # the table reads the evaluation alone


def test_the_closing_table_says_n_and_both_intervals_within_120_columns(tmp_path: Path) -> None:
    done = {
        "evaluate:deeper": evaluated(tmp_path / "a", 221, 185, "digits 0-4"),
        "evaluate:digits-5-9-control": evaluated(tmp_path / "b", 224, 177, "digits 5-9"),
    }
    lines = closing_lines(load_config("demo"), tmp_path, done, {}).splitlines()
    columns = "model               role      network   activation       data        n    clean % [95 %]"
    row = "deeper              transfer  resnet14  sparta (frozen)  digits 0-4  224  98.7 [96.1, 99.5]"
    assert lines[1].startswith(columns)
    assert lines[3].startswith(row)
    assert lines[3].endswith("82.6 [77.1, 87.0]  off")
    assert lines[4].endswith("digits 5-9  224  100.0 [98.3, 100.0]  79.0 [73.2, 83.8]  off")
    assert lines[5] == "robust: per-example worst case over all attacks, linf 0.15; n: test images"
    assert max(map(len, lines[1:6])) <= 120
