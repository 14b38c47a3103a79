"""The configuration: presets are valid, overrides reach their key, and every mistake is one sentence that helps."""

from pathlib import Path

import pytest

from pipeline.config.base import ThreatModel
from pipeline.config.chain import ChainConfig
from pipeline.config.load import ConfigError, apply_overrides, load_config, overlay, preset_names
from pipeline.config.training import TRADESConfig


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_says_its_cost(name: str) -> None:
    assert load_config(name).name
    text = (Path(load_config.__code__.co_filename).parent / "presets" / f"{name}.yaml").read_text()
    assert "Hardware:" in text
    assert "Time:" in text


def test_defaults_alone_are_valid() -> None:
    assert ChainConfig() == ChainConfig.model_validate({})


def test_round_trip_through_json_changes_nothing() -> None:
    config = load_config("demo")
    assert ChainConfig.model_validate_json(config.model_dump_json()) == config


def test_override_replaces_one_value_and_reads_fractions() -> None:
    config = load_config("demo", ["training.threat.eps=8/255", "seed=3", "transfer.0.name=other"])
    assert config.training.threat.eps == pytest.approx(8 / 255)
    assert config.seed == 3
    assert config.transfer[0].name == "other"
    assert config.training.epochs == load_config("demo").training.epochs


def test_on_and_off_are_words_and_true_is_a_boolean(tmp_path: Path) -> None:
    config = load_config("demo", ["training.compile=off", "evaluation.audit.budget=off", "search.enabled=true"])
    assert (config.training.compile, config.evaluation.audit.budget, config.search.enabled) == ("off", "off", True)
    path = tmp_path / "mine.yaml"
    path.write_text("training: {compile: on}\ntracking: {enabled: False}\n")
    config = load_config(str(path))
    assert (config.training.compile, config.tracking.enabled) == ("on", False)


def test_numbers_are_decimal_and_a_leading_zero_or_a_colon_makes_a_word() -> None:
    numbers = "data.path=x data.dataset=folder data.classes=[7,-3,+4,0x1f,0o17,00014,010,1:30,1:30.5,0b1,2.5e-1,.5]"
    found = apply_overrides({}, numbers.split())["data"]["classes"]
    assert found == [7, -3, 4, 31, 15, "00014", "010", "1:30", "1:30.5", "0b1", 0.25, 0.5]
    assert [type(value) for value in found[:5]] == [int] * 5
    config = load_config("demo", ["seed=010", "training.optimizer.lr=1e-3", "training.threat.eps=8/255"])
    assert (config.seed, config.training.optimizer.lr, config.training.threat.eps) == (10, 1e-3, 8 / 255)


@pytest.mark.parametrize(
    ("threat", "label", "key"),
    [
        (ThreatModel(), "linf 8/255", "linf 0.03137"),
        (ThreatModel(eps=0.2), "linf 0.2", "linf 0.2"),
        (ThreatModel(eps=0.2 * 3), "linf 0.6", "linf 0.6"),
        (ThreatModel(eps=0.03), "linf 0.03", "linf 0.03"),
        (ThreatModel(eps=2.5 / 255), "linf 0.009804", "linf 0.009804"),
        (ThreatModel(norm="l2", eps="128/255"), "l2 128/255", "l2 0.502"),
    ],
)
def test_a_radius_is_shown_as_it_is_written(threat: ThreatModel, label: str, key: str) -> None:
    assert (threat.label, threat.key) == (label, key)


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("seed: 1\nname: x\nseed: 2\n", "seed", (1, 3)),
        ("training:\n  epochs: 1\n  optimizer: {lr: 0.1}\n  epochs: 2\n", "epochs", (2, 4)),
        ("model: {name: resnet8,\n  name: resnet14}\n", "name", (1, 2)),
    ],
)
def test_a_key_that_stands_twice_is_refused_by_its_name_and_lines(tmp_path: Path, text: str, key: str, lines) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    expected = rf"mine\.yaml is not valid YAML: the key '{key}' stands in line {lines[0]} and again in line {lines[1]};"
    with pytest.raises(ConfigError, match=expected) as caught:
        load_config(str(path))
    assert "\n" not in str(caught.value)


def test_what_is_merged_in_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "training: {optimizer: &base {lr: 0.5, momentum: 0.8}}\n"
        "study: {standard: {evaluation: {}, training: {optimizer: &own {<<: *base, lr: 0.3}}}}\n"
        "transfer: [{name: x, training: {optimizer: {<<: *own, momentum: 0.7}}}]\n"
    )
    config = load_config(str(path))
    own = config.transfer[0].training
    assert own is not None
    assert (own.optimizer.lr, own.optimizer.momentum) == (0.3, 0.7)


def test_override_can_bring_a_whole_section() -> None:
    config = load_config("demo", ["training.method={kind: trades, beta: 3}"])
    assert config.training.method.kind == "trades"


def test_overlay_is_checked_like_a_file() -> None:
    config = load_config("demo")
    assert overlay(config, {"training.epochs": 3}).training.epochs == 3
    with pytest.raises(ConfigError, match=r"training\.epochs"):
        overlay(config, {"training.epochs": 0})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bank={}", "bank: .*expected one of pretrained, registered and path, got none"),
        ("bank={pretrained: a, path: b}", "got pretrained and path"),
        ("bank.registered=sparta-activation@champion", "NAME/VERSION, got 'sparta-activation@champion'.*registry show"),
        ("trainng.epochs=3", r"unknown key 'trainng'; did you mean 'training'\?"),
        (
            "scaling.num_workers=33",
            r"training.batch_size=64 is less than two images for each of 33 workers; .*num_workers",
        ),
        (
            "scaling.num_workers=[1,33]",
            r"training.batch_size=64 is less than two images for each of 33 workers; .*num_workers",
        ),
        ("scaling.collective_timeout=.inf", r"scaling\.collective_timeout: .*finite number, got inf"),
        ("transfer.\u00b2=x", "expected an index below 2 at '\u00b2'"),
        (
            "training.threat={norm: l2, eps: 128}",
            r"training\.threat: expected an l2 radius of at most 50, got 128: ",
        ),
        ("training.epoch=3", r"unknown key 'training\.epoch'; did you mean 'epochs'\?; known here: .*batch_size"),
        ("transfer.0.nmae=x", r"unknown key 'transfer\.0\.nmae'; did you mean 'name'\?"),
        ("training.method.stepz=3", r"unknown key .*stepz"),
        ("training.epochs=many", r"training\.epochs: .*integer.*got 'many'"),
        ("training.epochs=1:30", r"training\.epochs: .*integer.*got '1:30'"),
        ("training.epochs=0", r"training\.epochs: .*greater than or equal to 1, got 0"),
        ("training.threat.eps=0", r"training\.threat\.eps: .*greater than 0, got 0"),
        ("training.threat.eps=2", r"training\.threat: expected 0 < eps <= 1 for linf, got 2\.0"),
        ("training.threat.eps=8/0", r"eps: expected a number or a fraction such as \"8/255\", got '8/0'"),
        ("model.name=resnet9", r"model\.name: unknown model 'resnet9'; known: .*resnet8"),
        ("model.activation.name=rulu", r"model\.activation: unknown activation 'rulu'; known: .*relu"),
        ("model.activation.name=[]", r"model\.activation\.name: .*valid string, got \[\]"),
        ("model.activation.options.kernal=3", r"model\.activation: .*kernal"),
        ("model.activation.options.kernel_size=9999999999999", r"model\.activation: .*does not take these options"),
        ("data.dataset=emnist", r"data\.dataset: .*'digits'.*got 'emnist'"),
        ("training.method.kind=fgsm", r"training\.method: .*pgd_at"),
        ("transfer.7.name=x", r"expected an index below 2 at '7'"),
        ("transfer.1.name=deeper", r"got twice: deeper"),
        ("transfer.1.name=source", r'other than "source".*got source; rename it'),
        ("transfer.1.name=source-control", "NAME-control, as .* the controls are called, got source-control; rename"),
        ("transfer.1.name=deeper-control", "NAME-control, as .* the controls are called, got deeper-control; rename"),
        ("seed", r"expected key\.path=value, got 'seed'"),
        ("seed={", r"not valid YAML"),
        ("augment={flip: true, flip: false}", r"the value of 'augment=.*' is not valid YAML: the key 'flip' stands in"),
        ("seed.a=1", r"seed: .*valid integer"),
        ("name=../../etc", r"name: .*pattern"),
    ],
)
def test_a_mistake_is_one_sentence(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config("demo", [override])
    assert "\n" not in str(caught.value)


def test_another_kind_keeps_of_its_section_what_it_has_too() -> None:
    method = load_config("cifar10_cpu", ["training.method.kind=trades"]).training.method
    assert isinstance(method, TRADESConfig)
    assert (method.attack.steps, method.attack.loss) == (3, "kl")
    assert load_config("cifar10_cpu", ["training.method.kind=standard"]).training.method.kind == "standard"
    first = load_config(
        "demo", ["training.schedule.final_factor=0.1", "training.schedule.kind=cosine"]
    ).training.schedule
    assert (first.kind, first.final_factor) == ("cosine", 0.1)
    attacks = ["evaluation.attacks=[{kind: pgd, steps: 3}, {kind: targeted}]", "evaluation.attacks.0.kind=fgsm"]
    assert [attack.kind for attack in load_config("demo", attacks).evaluation.attacks] == ["fgsm", "targeted"]
    with pytest.raises(
        ConfigError, match=r"unknown key 'training\.schedule\.peak'; known here: final_factor, kind, war"
    ):
        load_config("demo", ["training.schedule.peak=0.2", "training.schedule.kind=cosine"])


def test_every_mistake_has_a_line_and_a_key_that_can_be_typed() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("demo", ["training.method.attack.stepz=3", "scaling.num_workers=0", "model.activation=relu"])
    lines = [line.strip().partition(";")[0] for line in str(caught.value).splitlines()]
    assert lines == [
        "model.activation: expected a section, such as {key: value}, got 'relu'",
        "unknown key 'training.method.attack.stepz'",
        "scaling.num_workers: input should be greater than 0, got 0",
        "scaling.num_workers: input should be a valid tuple, got 0",
    ]


def test_a_chain_is_called_as_its_file_where_that_gives_no_name(tmp_path: Path) -> None:
    for file, name in (("Pets 2.yaml", "pets-2"), ("...yaml", "demo"), ("a=b.yaml", "a-b")):
        (tmp_path / file).write_text("seed: 1\n")
        assert load_config(str(tmp_path / file)).name == name
    (tmp_path / "named.yaml").write_text("name: mine\n")
    assert load_config(str(tmp_path / "named.yaml")).name == "mine"
    assert load_config("seed=3", ["name=x"]).name == "x"


def test_no_memory_is_taken_to_try_an_activation() -> None:
    kernel = 3_000_001  # 288 TB for the 8 channels that it is tried with
    assert load_config("demo", [f"model.activation.options.kernel_size={kernel}"]).model.activation.options


def test_unknown_preset_lists_the_known_and_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"expected a preset \(.*demo.*did you mean 'demo'"):
        load_config("demoo")


@pytest.mark.parametrize("content", ["- a list", "just text", "a: [", "a: \x00", ""])
def test_malformed_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        load_config(str(path))
