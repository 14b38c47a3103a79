import importlib
import sys

import numpy as np
import pytest
import torch

from pipeline.config.tracking import TrackingConfig
from pipeline.evaluation import Evaluation
from pipeline.evaluation.__main__ import main
from pipeline.evaluation.judged_model import model_digest
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


def test_a_model_of_other_classes_is_refused(prepared, tmp_path, monkeypatch, capsys):
    (tmp_path / "other_classes_for_test.py").write_text(
        "from torch import nn\n"
        "def seven():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))\n"
        "def maps():\n    return nn.Conv2d(1, 10, 1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ("--data", prepared.directory, "--output", tmp_path / "out", *small())
    assert run("run", "other_classes_for_test:seven", *arguments) == 2
    assert "expected a model of the 10 classes of digits, got 7" in capsys.readouterr().err
    assert run("run", "other_classes_for_test:maps", *arguments) == 2
    assert "expected logits of shape (1, classes) for 1 image, got (1, 10, 8, 8)" in capsys.readouterr().err
    np.savez(tmp_path / "adv.npz", x_adv=np.zeros((3, 1, 8, 8), np.float32), y=np.array([0, 9, 1]))
    assert run("judge", "other_classes_for_test:seven", tmp_path / "adv.npz") == 2
    assert "expected a model of at least 10 classes, as the labels ask for, got 7" in capsys.readouterr().err


def test_a_device_that_is_not_here_is_one_line(prepared, tmp_path, capsys):
    model = saved(tmp_path / "model", "relu")
    arguments = ("--data", prepared.directory, "--output", tmp_path / "out", *small("--device", "cuda:77"))
    assert run("run", model, *arguments) == 2
    assert "error: expected a device that is here, got cuda:77" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nosuch", "or one of digits, mnist"),
        ("npz", "or one of digits, mnist"),
        (".", "a folder of images is prepared by"),
    ],
)
def test_data_that_cannot_be_judged_on_say_what_can(data, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = saved(tmp_path / "model", "relu")
    assert run("run", model, "--data", data, "--output", tmp_path / "out", *small()) == 2
    assert message in capsys.readouterr().err


def test_edited_code_never_reuses_what_was_judged_before(prepared, tmp_path, monkeypatch):
    """The slope is in no tensor and in no class name; what is printed of the model does not show it either."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    source = (
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def forward(self, x):\n        return SLOPE * x.flatten(1)[:, :10]\n"
    )
    digests = []
    for name, slope in (("my_net", "1.0"), ("my_net", "-1.0"), ("my_net", "1.0"), ("my_factory", "1.0")):
        (tmp_path / "my_net.py").write_text(source.replace("SLOPE", slope) + "def make():\n    return Net()\n")
        (tmp_path / "my_factory.py").write_text("from my_net import Net\ndef make():\n    return Net()\n")
        forget("my_net", "my_factory")
        options = small("--num-examples", "8")
        assert run("run", f"{name}:make", "--data", prepared.directory, "--output", tmp_path / "out", *options) == 0
        digests.append(Evaluation.load(tmp_path / "out").model_digest)
    assert digests[0] == digests[2]
    assert len(set(digests)) == 3
    assert len(list((tmp_path / "out" / "blocks").iterdir())) == 3


def forget(*modules: str) -> None:
    """Import anew what was written within the same second."""
    importlib.invalidate_caches()
    for name in modules:
        sys.modules.pop(name, None)


def test_code_of_a_class_in_another_file_counts_and_its_address_does_not(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    digests = []
    for comment in ("", "", "# edited\n"):
        (tmp_path / "my_layer.py").write_text(
            f"{comment}from torch import nn\nclass Layer(nn.Identity):\n"
            "    def extra_repr(self):\n        return repr(object())\n"
        )
        (tmp_path / "my_user.py").write_text("from my_layer import Layer\ndef make():\n    return Layer()\n")
        forget("my_layer", "my_user")
        digests.append(model_digest(open_model("my_user:make")))
    assert digests[0] == digests[1] != digests[2]


def test_other_adversaries_are_judged_beside_the_main_one(prepared, tmp_path):
    model, output = saved(tmp_path / "model", "relu"), tmp_path / "out"
    also = ("--also", "l2:0.5", "--also", "linf:8/255")
    assert run("run", model, "--data", prepared.directory, "--output", output, *small(*also)) == 0
    found = Evaluation.load(output).other_threats
    assert list(dict.fromkeys(result.threat.label for result in found)) == ["l2 0.5", "linf 8/255"]


def test_saved_images_are_judged_like_an_evaluation(tmp_path, monkeypatch, capsys):
    """In eval mode, and on a GPU in full float32."""
    (tmp_path / "my_judged.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def forward(self, x):\n"
        "        right = not self.training and not torch.backends.cudnn.allow_tf32\n"
        "        return torch.eye(10)[torch.full((len(x),), 3 if right else 4)]\n"
        "def make():\n    return Net()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    np.savez(tmp_path / "a.npz", x_adv=np.zeros((5, 1, 8, 8), np.float32), y=np.full(5, 3))
    assert run("judge", "my_judged:make", tmp_path / "a.npz") == 0
    assert "100.0 %" in capsys.readouterr().out


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


def test_under_another_threat_robust_accuracies_are_not_subtracted(prepared, tmp_path, capsys):
    for name, eps in (("sparta", "0.03"), ("relu", "0.15")):
        model = saved(tmp_path / name, name)
        run("run", model, "--data", prepared.directory, "--output", tmp_path / f"{name}-out", *small(), "--eps", eps)
    capsys.readouterr()
    assert run("compare", tmp_path / "sparta-out", tmp_path / "relu-out") == 0
    printed = capsys.readouterr().out
    assert "clean: candidate minus control" in printed
    assert "union: candidate minus control" not in printed
    assert "candidate and control cannot be compared: other threats" in printed


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


def test_the_registry_is_looked_for_where_chains_keep_it(tmp_path, monkeypatch, capsys):
    from pipeline.tracking.registry import Registry

    directory = saved(tmp_path / "model", "sparta")
    bank = ActivationBank.from_model(open_model(str(directory)))
    Registry(TrackingConfig(), tmp_path).register(bank.save(tmp_path / "bank"))
    np.savez(tmp_path / "images.npz", x_adv=np.zeros((2, 1, 8, 8), np.float32), y=np.zeros(2, np.int64))
    monkeypatch.setenv("SPARTA_RUNS", str(tmp_path))
    assert run("judge", "sparta-activation@candidate", tmp_path / "images.npz", "--network", directory) == 0
    assert "accuracy on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--eps", "2"), "threat: expected 0 < eps <= 1 for linf, got 2.0"),
        (("--eps", "x/255"), 'expected a number or a fraction such as "8/255"'),
        (("--norm", "l7"), "threat.norm: input should be 'linf' or 'l2', got 'l7'"),
        (("--attacks", "hard"), "unknown attack suite 'hard'; known: quick, standard, full"),
        (("--also", "l2"), "expected --also NORM:EPS, e.g. l2:0.5, got 'l2'"),
        (("--also", "l3:1"), "other_threats.0.norm: input should be 'linf' or 'l2', got 'l3'"),
        (("--audit", "huge"), "audit.budget: input should be 'off', 'quick' or 'full', got 'huge'"),
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


GOOD = np.full((4, 1, 8, 8), 0.5, np.float32)


@pytest.mark.parametrize(
    ("x_adv", "y", "message"),
    [
        ((255 * GOOD).astype("u1"), np.arange(4), r"got uint8 (4, 1, 8, 8) from 127 to 127"),
        (255 * GOOD, np.arange(4), "of floats in [0, 1], got float32 (4, 1, 8, 8) from 127.5 to 127.5"),
        (np.nan * GOOD, np.arange(4), "from nan to nan"),
        (GOOD[:0], np.arange(0), "got float32 (0, 1, 8, 8)"),
        (GOOD[0], np.arange(4), "got float32 (1, 8, 8)"),
        (np.full((4, 1, 8, 8), "a"), np.arange(4), "got <U1 (4, 1, 8, 8)"),
        (GOOD, np.arange(3), "expected y (4,) of labels from 0 on, got int64 (3,)"),
        (GOOD, np.arange(4)[:, None], "got int64 (4, 1)"),
        (GOOD, np.arange(4) + 0.5, "got float64 (4,)"),
        (GOOD, np.arange(4) - 1, "expected y (4,) of labels from 0 on"),
    ],
)
def test_images_of_another_scale_or_shape_are_not_judged(x_adv, y, message, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", x_adv=x_adv, y=y)
    assert run("judge", saved(tmp_path / "model", "relu"), tmp_path / "a.npz") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_architecture_is_built_without_pickles(tmp_path):
    model = open_model(str(saved(tmp_path / "run" / "model", "silu").parent))
    assert type(model) is type(build_model("resnet8", activation="silu", width=4))
    assert not model.training
