"""Configurations nobody meant: each is a few readable lines, never a traceback, and nothing is written."""

from pathlib import Path

import pytest
from hypothesis import strategies as st

from pipeline.config.base import MISTAKES
from pipeline.config.load import PRESETS, ConfigError, load_config, validate
from sparta_models import ACTIVATIONS
from tests.fuzz.bad_inputs import JUNK, all_refused, damaged, places, spoilt

DEMO = load_config("demo").model_dump(mode="json")
OPTIONS = ("kernel_size", "variant", "beta", "rank", "reduction", "init", "attention")
LINES = MISTAKES + 1  # and how many more there are
KEYS = sorted({".".join(map(str, path)) for path in places(DEMO)})


def test_damaged_configurations_are_refused() -> None:
    all_refused(damaged(DEMO), validate, ConfigError, count=500, lines=LINES)


def test_options_that_no_activation_takes_are_refused() -> None:
    options = st.dictionaries(st.sampled_from(OPTIONS) | st.text(max_size=4), JUNK, max_size=3)
    sections = st.fixed_dictionaries({"name": st.sampled_from(sorted(ACTIVATIONS)), "options": options})
    configs = sections.map(lambda section: {"model": {"activation": section}})
    all_refused(configs, validate, ConfigError, count=200, lines=LINES)


def test_overrides_of_any_kind_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = (
        JUNK.map(repr) | st.text(max_size=15) | st.sampled_from(["!!python/object:os.system", "&a [*a]", "2001-99-99"])
    )
    known = st.builds("{}={}".format, st.sampled_from(KEYS), values)
    anything = st.text(max_size=30) | st.builds("{}={}".format, st.text(max_size=20), st.text(max_size=20))
    all_refused(
        known | anything, lambda one: load_config(None, [one]), ConfigError, count=500, unchanged=tmp_path, lines=LINES
    )


@pytest.mark.parametrize("preset", ["demo"])
def test_files_that_are_no_configuration_are_refused(preset: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.touch()
    content = (PRESETS / f"{preset}.yaml").read_bytes()

    def use(data: bytes) -> None:
        file.write_bytes(data)
        load_config(str(file))

    all_refused(spoilt(content) | st.binary(max_size=40), use, ConfigError, count=300, unchanged=tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "a: " + "[" * 5000,
        "!!python/object/apply:os.system ['touch pwned']",
        "a: &a [x]\n" + "".join(f"b{n}: &b{n} [*{'a' if n == 0 else f'b{n - 1}'}, *a]\n" for n in range(5)),
        "&a [*a]",
        "name: &a {x: *a}",
        "training: {epochs: 2001-99-99}",
        "? {a: 1}\n: 2",
        "1: 2",
    ],
)
def test_files_made_to_hurt_are_refused(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError) as refusal:
        load_config("config.yaml")
    assert str(refusal.value).count("\n") < LINES
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_name_that_no_file_can_have_is_refused() -> None:
    all_refused(st.text(min_size=1, max_size=300) | st.just("x" * 5000), load_config, ConfigError, count=100)
