import numpy as np
import pytest
import torch

from pipeline.config.tracking import TrackingConfig
from pipeline.evaluation import Evaluation
from pipeline.evaluation.__main__ import main
from pipeline.evaluation.sources import open_model
from pipeline.training.model_io import ModelMeta, save_model
from sparta_models import ActivationBank, build_model

META = {
    "name": "resnet8",
    "options": {"width": 4},
    "num_classes": 10,
    "in_channels": 1,
    "mean": (0.3,),
    "std": (0.4,),
    "image_size": 8,
    "dataset": "digits",
}


def saved(directory, activation: str):
    torch.manual_seed(0)
    meta = ModelMeta.model_validate({**META, "activation": {"name": activation, "sharing": "site"}})
    save_model(directory, meta.build(), meta)
    return directory


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def small(*more):
    return ("--eps", "0.1", "--attacks", "quick", "--audit", "off", "--num-examples", "24", *more)


def test_a_model_directory_is_evaluated_and_its_images_judged_again(prepared, tmp_path, capsys):
    model = saved(tmp_path / "model", "sparta")
    output = tmp_path / "out"
    assert run("run", model, "--data", prepared.directory, "--output", output, *small("--save-adversarial")) == 0
    result = Evaluation.load(output)
    assert f"{'union':<24} {result.union}" in capsys.readouterr().out
    assert run("judge", model, output / "evaluation.npz") == 0
    assert f"accuracy on {output / 'evaluation.npz'}: {result.union}" in capsys.readouterr().out


def test_a_users_function_is_evaluated(prepared, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_models_for_test.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\nnumber = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ("--data", prepared.directory, "--output", tmp_path / "out", *small())
    assert run("run", "my_models_for_test:make", *arguments) == 0
    assert Evaluation.load(tmp_path / "out").n == 24
    assert run("run", "my_models_for_test:number", *arguments) == 2
    assert "to return a torch.nn.Module, got int" in capsys.readouterr().err
    assert run("run", "my_models_for_test:nothing", *arguments) == 2
    assert "expected a function 'my_models_for_test:nothing'" in capsys.readouterr().err


def test_two_evaluations_are_compared_and_promotion_refused_with_reasons(prepared, tmp_path, capsys):
    for name in ("sparta", "relu"):
        model = saved(tmp_path / name, name)
        assert run("run", model, "--data", prepared.directory, "--output", tmp_path / f"{name}-out", *small()) == 0
    capsys.readouterr()
    assert run("compare", tmp_path / "sparta-out", tmp_path / "relu-out") == 0
    printed = capsys.readouterr().out
    assert "union: candidate minus control" in printed
    assert "McNemar p = " in printed
    assert "promotion: refused" in printed
    assert "expected an audit at full budget, got none" in printed


def test_a_registered_activation_is_judged_in_the_network_trained_with_it(tmp_path):
    from pipeline.tracking.registry import Registry

    directory = saved(tmp_path / "model", "sparta")
    bank = ActivationBank.from_model(open_model(str(directory)))
    Registry(TrackingConfig(), tmp_path).register(bank.save(tmp_path / "bank"))
    options = {"registry_root": tmp_path}
    model = open_model("sparta-activation@candidate", network=directory, **options)
    assert ActivationBank.from_model(model) == bank
    with pytest.raises(ValueError, match="expected --network DIRECTORY beside 'sparta-activation@candidate'"):
        open_model("sparta-activation@candidate", **options)
    torch.manual_seed(1)
    meta = ModelMeta.model_validate({**META, "activation": {"name": "sparta", "beta": 2.0}})
    save_model(tmp_path / "other", meta.build(), meta)
    with pytest.raises(ValueError, match="got one with another activation"):
        open_model("sparta-activation@candidate", network=tmp_path / "other", **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--eps", "2"), "threat: expected 0 < eps <= 1 for linf, got 2.0"),
        (("--eps", "x/255"), 'expected a number or a fraction such as "8/255"'),
        (("--norm", "l7"), "threat.norm: Input should be 'linf' or 'l2'"),
        (("--attacks", "hard"), "unknown attack suite 'hard'; known: quick, standard, full"),
        (("--audit", "huge"), "audit.budget: Input should be 'off', 'quick' or 'full'"),
        (("--num-examples", "100000"), "num_examples <= "),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, prepared, tmp_path, capsys):
    model = saved(tmp_path / "model", "relu")
    assert run("run", model, "--data", prepared.directory, "--output", tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("source", ["nowhere", "no/such/directory"])
def test_a_model_that_is_nowhere_lists_the_forms(source):
    with pytest.raises(ValueError, match=r"expected a directory with model\.json"):
        open_model(source)


def test_judging_needs_adversarial_images(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", y=np.zeros(3))
    assert run("judge", tmp_path, tmp_path / "a.npz") == 2
    assert "expected an .npz with x_adv" in capsys.readouterr().err


def test_the_architecture_is_built_without_pickles(tmp_path):
    model = open_model(str(saved(tmp_path / "run" / "model", "silu").parent))
    assert type(model) is type(build_model("resnet8", activation="silu", width=4))
    assert not model.training
