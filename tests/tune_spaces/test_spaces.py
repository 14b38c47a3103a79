"""The spaces that come with the project, the distributions they are made of, and a user's own files."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tune_spaces import SPACES, Choice, Integer, Relative, Uniform, When, draw, grid, load_space, resolve
from tune_spaces.loading import _checked

THREAT = {"evaluation": {"threat": {"norm": "linf", "eps": 0.1}}}
EPS = "evaluation.threat.eps"


def test_importing_the_spaces_imports_nothing_heavy():
    code = "import sys, tune_spaces; [tune_spaces.load_space(n) for n in tune_spaces.SPACES]; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "ray", "mlflow", "numpy", "pydantic", "pipeline", "yaml", "optuna"} & set(modules)


@pytest.mark.parametrize("name", SPACES)
def test_every_draw_has_the_unconditional_keys_and_only_the_conditional_ones_that_hold(name):
    space, rng = resolve(load_space(name), THREAT), random.Random(0)
    for _ in range(200):
        point = draw(space, rng)
        for key, rule in space.items():
            assert (key in point) == (not isinstance(rule, When) or point.get(rule.key) in rule.values)


@settings(max_examples=50)
@given(low=st.floats(1e-6, 1e3), width=st.floats(1e-3, 1e3), log=st.booleans(), seed=st.integers(0, 2**32))
def test_a_uniform_draw_is_inside_its_range(low, width, log, seed):
    distribution = Uniform(low, low + width, log=log)
    assert low <= distribution.sample(random.Random(seed)) <= low + width


@settings(max_examples=50)
@given(low=st.integers(1, 100), width=st.integers(1, 100), log=st.booleans(), seed=st.integers(0, 2**32))
def test_an_integer_draw_is_whole_and_inside_its_range(low, width, log, seed):
    value = Integer(low, low + width, log=log).sample(random.Random(seed))
    assert isinstance(value, int)
    assert low <= value <= low + width


def test_a_logarithmic_uniform_has_its_median_at_the_geometric_mean():
    rng, distribution = random.Random(0), Uniform(1e-4, 1.0, log=True)
    below = sum(distribution.sample(rng) < 1e-2 for _ in range(4000))
    assert abs(below / 4000 - 0.5) < 0.03  # four standard deviations


def test_both_ends_of_an_integer_are_drawn():
    rng = random.Random(0)
    for log in (False, True):
        assert {Integer(1, 4, log=log).sample(rng) for _ in range(200)} == {1, 2, 3, 4}


def test_a_grid_holds_every_combination_and_both_ends():
    points = list(grid({"a": Uniform(1.0, 100.0, log=True), "b": Integer(1, 3), "c": Choice("x", "y")}, 3))
    assert len(points) == 3 * 3 * 2
    assert sorted({round(point["a"], 9) for point in points}) == [1.0, 10.0, 100.0]
    assert {point["b"] for point in points} == {1, 2, 3}


def test_a_conditional_parameter_multiplies_a_grid_only_where_it_exists():
    space = {"kind": Choice("p", "t"), "beta": When("kind", ("t",), Uniform(0.0, 1.0))}
    assert list(grid(space, 2)) == [{"kind": "p"}, {"kind": "t", "beta": 0.0}, {"kind": "t", "beta": 1.0}]


def test_a_grid_is_made_point_by_point_so_that_its_size_does_not_matter():
    points = grid({f"x{n}": Uniform(0.0, 1.0) for n in range(20)}, 100)
    assert [next(points)["x19"] for _ in range(2)] == [0.0, 1 / 99]


@pytest.mark.parametrize("name", SPACES)
def test_the_spaces_of_the_project_pass_the_checks_of_a_users_file(name):
    assert _checked(load_space(name), Path(name)) == load_space(name)


def test_a_relative_range_is_scaled_by_the_configuration_also_under_a_condition():
    relative = Relative(0.5, 2.0, to=EPS, log=True)
    space = {"kind": Choice("p", "t"), "a": relative, "b": When("kind", ("t",), relative)}
    found = resolve(space, THREAT)
    assert found["a"] == Uniform(0.05, 0.2, log=True)
    assert found["b"] == When("kind", ("t",), Uniform(0.05, 0.2, log=True))
    assert found["kind"] == space["kind"]


@pytest.mark.parametrize(
    "to", ["evaluation.threat.epps", "evaluation.threat.norm", "evaluation.threat", "nowhere.at.all"]
)
def test_a_range_relative_to_no_positive_number_is_refused(to):
    with pytest.raises(ValueError, match=f"a is relative to {to}: expected a positive number"):
        resolve({"a": Relative(0.5, 2.0, to=to)}, THREAT)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(1.0, 1.0), "low < high"),
        (lambda: Uniform(0.0, float("inf")), "finite"),
        (lambda: Uniform(0.0, 1.0, log=True), "low > 0"),
        (lambda: Integer(3, 2), "low < high"),
        (lambda: Choice("a"), "at least two"),
        (lambda: Choice("a", "a"), "different"),
        (lambda: Choice([0.5, 0.75], [0.3, 0.6]), r"numbers, texts, true, false or null, got \[0.5, 0.75\]"),
        (lambda: Integer(1.9, 3), "whole numbers, got 1.9 and 3"),
        (lambda: Integer(False, 3), "whole numbers"),
        (lambda: When("kind", "trades", Integer(1, 2)), "a tuple of values, got 'trades'"),
        (lambda: When("kind", (), Integer(1, 2)), "a tuple of values"),
        (lambda: When("kind", ("trades",), 3), "got 3"),
        (lambda: When("kind", ("trades",), When("a", (1,), Integer(1, 2))), "expected a Uniform, Integer, Choice or"),
    ],
)
def test_a_distribution_that_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


YAML = """
training.threat.eps: {uniform: ["2/255", "8/255"]}
training.optimizer.lr: {log_uniform: [0.01, 0.5]}
training.method.attack.steps: {integer: [1, 10]}
training.method.kind: {choice: [pgd_at, trades]}
training.method.beta: {uniform: [1, 10], when: {training.method.kind: trades}}
training.method.attack.step_size: {log_uniform: [0.1, 1], relative_to: evaluation.threat.eps}
"""
PYTHON = """
from tune_spaces import Choice, Integer, Relative, Uniform, When
SPACE = {
    "training.threat.eps": Uniform(2 / 255, 8 / 255),
    "training.optimizer.lr": Uniform(0.01, 0.5, log=True),
    "training.method.attack.steps": Integer(1, 10),
    "training.method.kind": Choice("pgd_at", "trades"),
    "training.method.beta": When("training.method.kind", ("trades",), Uniform(1.0, 10.0)),
    "training.method.attack.step_size": Relative(0.1, 1.0, to="evaluation.threat.eps", log=True),
}
"""


def test_a_space_reads_the_same_from_yaml_and_from_python(tmp_path: Path):
    (tmp_path / "own.yaml").write_text(YAML)
    (tmp_path / "own.py").write_text(PYTHON)
    assert load_space(str(tmp_path / "own.yaml")) == load_space(str(tmp_path / "own.py"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "lr: {uniform: [1, 0]}", "low < high"),
        ("a.yaml", "lr: {gauss: [1, 0]}", "expected one of uniform, log_uniform"),
        ("a.yaml", "lr: {uniform: [1]}", "cannot be made of"),
        ("a.yaml", "lr: {uniform: [a, b]}", "cannot be made of"),
        ("a.yaml", "lr: 3", "expected one of uniform"),
        ("a.yaml", "- lr", "expected a mapping"),
        ("a.yaml", "lr: {uniform: [", "not valid YAML"),
        ("a.yaml", "{}", "at least one key"),
        ("a.yaml", "b: {integer: [1, 3]}\nb: {integer: [1, 9]}", "key 'b' stands in line 1 and again in line 2; leave"),
        ("a.yaml", "b: {uniform: [0, 1], when: {kind: x}}", "not above it"),
        ("a.yaml", "b: {uniform: [0, 1], when: x}", "expected one condition"),
        ("a.yaml", "a: {choice: [x, y]}\nb: {uniform: [0, 1], when: {a: []}}", "a.yaml: b: .* a tuple of values"),
        ("a.yaml", "a: {choice: [x, y]}\nb: {uniform: [0, 1], when: {a: [x, z]}}", "b depends on a='z', a value that"),
        ("a.yaml", "a: {integer: [1, 3]}\nb: {uniform: [0, 1], when: {a: 4}}", "b depends on a=4"),
        ("a.yaml", "a: {uniform: [1, 3]}\nb: {uniform: [0, 1], when: {a: 2}}", "b depends on a=2"),
        ("a.yaml", "lr: {integer: [1.9, 3]}", "whole numbers"),
        ("a.yaml", "lr: {log_integer: [1, 3.5]}", "whole numbers"),
        ("a.yaml", "lr: {uniform: [0, 1/0]}", "cannot be made of"),
        ("a.yaml", "lr: {choice: [2001-99-99, 1]}", "not valid YAML"),
        ("a.yaml", "b: {choice: [0, 1], relative_to: seed}", "beside uniform or log_uniform"),
        ("a.py", "import nonsense_module", "does not run: ModuleNotFoundError"),
        ("a.py", "raise SystemExit(0)", "does not run: SystemExit"),
        ("a.py", "x = 1", "expected SPACE"),
        ("a.py", "SPACE = {'lr': 3}", "expected a Uniform"),
        ("a.txt", "", "expected a search space"),
    ],
)
def test_a_bad_space_file_gives_one_clear_line(tmp_path: Path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_space(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_condition_may_name_an_option_of_a_conditional_parameter(tmp_path: Path):
    text = "a: {choice: [x, y]}\nb: {integer: [1, 3], when: {a: x}}\nc: {uniform: [0, 1], when: {b: [1, 3]}}"
    (tmp_path / "a.yaml").write_text(text)
    assert load_space(str(tmp_path / "a.yaml"))["c"] == When("b", (1, 3), Uniform(0.0, 1.0))


def test_yaml_is_read_as_the_configuration_is_where_off_and_010_are_words(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("a: {choice: [off, on]}\nb: {choice: [false, true]}\nc: {choice: [010, 10]}")
    expected = {"a": Choice("off", "on"), "b": Choice(False, True), "c": Choice("010", 10)}
    assert load_space(str(tmp_path / "a.yaml")) == expected


@pytest.mark.parametrize("method", ["read_text", "is_file"])
def test_a_file_that_may_not_be_read_is_a_clear_error(method, tmp_path: Path, monkeypatch):
    (tmp_path / "a.yaml").write_text("a: {choice: [1, 2]}")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "a.yaml")

    monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(ValueError, match=r"a\.yaml cannot be read: .*Permission denied"):
        load_space(str(tmp_path / "a.yaml"))


def test_an_unknown_space_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"activation, attack, joint, optim, strength.*got 'atack'"):
        load_space("atack")
