"""The bank: what it takes out, how it maps to other networks, what frozen means, and which files it refuses."""

import hashlib
import json
import os

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from sparta_models import ActivationBank, Sparta, activations, build_model, frozen_parameters, install, sites
from sparta_models.files import _seal
from sparta_models.sites import SiteInfo, named_sites
from sparta_models.transfer import match


def trained(name="resnet8", activation="sparta", seed=0, **kwargs):
    """A network whose activations are away from their starting points."""
    torch.manual_seed(seed)
    model = build_model(name, activation=activation, **{"width": 4, **kwargs})
    with torch.no_grad():
        for site in sites(model):
            for parameter in model.get_submodule(site.name).function.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def function(model, name):
    return model.get_submodule(name).function


def step(model, optimizer, size=8):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(torch.rand(4, 3, size, size)), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()


ACTIVATIONS = ["sparta", "frelu", "acon_c", {"name": "sparta", "sharing": "stage"}, "relu", "atac"]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_save_and_load_give_an_equal_bank(tmp_path, activation):
    bank = ActivationBank.from_model(trained(activation=activation), source={"dataset": "digits"})
    loaded = ActivationBank.load(bank.save(tmp_path / "bank"))
    assert loaded == bank
    assert loaded.digest == bank.digest
    assert (loaded.sites, loaded.architecture, loaded.source) == (bank.sites, "resnet8", {"dataset": "digits"})
    assert sorted(p.name for p in (tmp_path / "bank").iterdir()) == ["bank.json", "bank.safetensors"]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_a_bank_put_back_gives_the_same_outputs(activation):
    source = trained(activation=activation).eval()
    target = build_model("resnet8", activation="relu", width=4).eval()
    rest = {k: v for k, v in source.state_dict().items() if k in target.state_dict()}
    target.load_state_dict(rest)
    ActivationBank.from_model(source).apply_to(target)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(target(x), source(x))
    assert ActivationBank.from_model(target) == ActivationBank.from_model(source)


def test_the_digest_sees_values_options_and_nothing_else():
    model = trained()
    bank = ActivationBank.from_model(model)
    assert ActivationBank.from_model(model, source={"dataset": "other"}) == bank
    nn.init.normal_(model.conv1.weight)
    assert ActivationBank.from_model(model) == bank
    with torch.no_grad():
        function(model, "layer2.0.act1").gate.weight[0, 0, 0, 0] += 1e-6
    assert ActivationBank.from_model(model) != bank
    assert ActivationBank.from_model(build_model("resnet8", activation="silu")) != ActivationBank.from_model(
        build_model("resnet8", activation="mish")
    )


def test_a_bank_is_a_copy():
    model = trained()
    bank = ActivationBank.from_model(model)
    before = bank.digest
    with torch.no_grad():
        function(model, "act1").gate.weight.zero_()
    assert bank.digest == before


def names(target, source, stage):
    a, b = (sites(build_model(n, activation="relu", width=4)) for n in (target, source))
    plan = match(a, b)
    return {s.name: plan[s.name].name for s in a if s.stage == stage}


def test_resnet18_goes_to_resnet34_by_stage_and_relative_depth():
    assert names("resnet34", "resnet18", 0) == {"act1": "act1"}
    blocks = [0, 0, 0, 1, 1, 1]
    expected = {f"layer3.{i}.act{j}": f"layer3.{b}.act{j}" for i, b in enumerate(blocks) for j in (1, 2)}
    assert names("resnet34", "resnet18", 3) == expected


def test_in_a_bottleneck_the_last_site_gets_the_function_from_behind_an_addition():
    plan = names("resnet50", "resnet34", 1)
    assert [plan[f"layer1.0.act{j}"] for j in (1, 2, 3)] == ["layer1.0.act1", "layer1.0.act1", "layer1.0.act2"]


def test_other_numbers_of_stages_correspond_by_relative_number():
    assert set(names("resnet18", "resnet8", 1).values()) == {"layer1.0.act1", "layer1.0.act2"}
    assert set(names("resnet18", "resnet8", 4).values()) == {"layer3.0.act1", "layer3.0.act2"}
    assert {v.split(".")[0] for v in names("vgg16_bn", "resnet18", 5).values()} == {"layer4"}
    assert {v.split(".")[0] for v in names("wideresnet28_10", "resnet18", 3).values()} == {"layer4"}


def test_stages_without_blocks_of_several_sites_correspond_by_relative_depth():
    layer2 = [f"layer2.{i}.act{j}" for i in (0, 1) for j in (1, 2)]
    # 3 sites take from 4 the numbers 0, 1.5 and 3, and 4 from 3 the numbers 0, 2/3, 4/3 and 2; halves go down.
    assert list(names("vgg16_bn", "resnet18", 3).values()) == [layer2[0], layer2[1], layer2[3]]
    vgg = [s.name for s in sites(build_model("vgg16_bn", activation="relu", width=4)) if s.stage == 4]
    assert list(names("resnet18", "vgg16_bn", 3).values()) == [vgg[0], vgg[1], vgg[1], vgg[2]]


def test_numbers_of_blocks_may_have_gaps():
    def place(name, depth, block, position):
        return SiteInfo(name, 1, depth, block, position, 4, name)

    source = [place("a1", 0, 3, 0), place("a2", 1, 3, 1), place("b1", 2, 7, 0), place("b2", 3, 7, 1)]
    plan = match(sites(build_model("resnet18", activation="relu", width=4))[1:5], source)
    assert [s.name for s in plan.values()] == ["a1", "a2", "b1", "b2"]


def test_a_stem_without_a_counterpart_gets_the_first_stages_function():
    assert names("resnet18", "preactresnet18", 0) == {"act1": "layer1.0.act2"}


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "resnet50", "vgg16_bn", "wideresnet28_10", "preactresnet18"])
def test_a_network_maps_to_itself_site_by_site(name):
    places = sites(build_model(name, activation="relu", width=4))
    assert match(places, places) == {s.name: s for s in places}


@pytest.mark.parametrize("adapt", ["mean", "interpolate"])
@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("resnet34", {"width": 4}),
        ("resnet34", {"width": 4, "stem": "imagenet"}),
        ("resnet50", {"width": 4}),
        ("wideresnet28_10", {"width": 4, "widen": 2}),
        ("wideresnet34_10", {"width": 4, "widen": 1}),
        ("vgg16_bn", {"width": 2}),
        ("preactresnet18", {"width": 8}),
        ("mobilenet_v2", {"width_mult": 0.1}),
    ],
)
def test_a_resnet18_bank_runs_frozen_in_every_other_network(target, options, adapt):
    bank = ActivationBank.from_model(trained("resnet18"))
    model = build_model(target, activation="relu", **options)
    bank.apply_to(model, adapt=adapt)
    before = ActivationBank.from_model(model).digest
    step(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), size=32)
    assert ActivationBank.from_model(model).digest == before
    assert {info.channels for info in sites(model)} == {
        function(model, info.name).num_channels for info in sites(model)
    }


def test_equal_widths_are_copied_exactly_with_or_without_a_rule():
    bank = ActivationBank.from_model(trained("resnet18"))
    plain, ruled = (build_model("resnet34", width=4) for _ in range(2))
    bank.apply_to(plain)
    bank.apply_to(ruled, adapt="mean")
    assert ActivationBank.from_model(plain) == ActivationBank.from_model(ruled)
    kernel = function(plain, "layer3.5.act2").gate.weight
    assert torch.equal(kernel, bank.entries["layer3.1.act2"].tensors["gate.weight"])


def test_mean_rule_gives_every_channel_the_mean_kernel():
    bank = ActivationBank.from_model(trained("resnet18"))
    model = bank.apply_to(build_model("resnet18", width=6), adapt="mean")
    mean = bank.entries["layer1.0.act1"].tensors["gate.weight"].mean(0, keepdim=True)
    torch.testing.assert_close(function(model, "layer1.0.act1").gate.weight, mean.expand(6, 1, 5, 5))


def test_interpolate_rule_is_linear_in_the_channels_number():
    bank = ActivationBank.from_model(trained("resnet18"))
    model = bank.apply_to(build_model("resnet18", width=7), adapt="interpolate")
    old, new = bank.entries["act1"].tensors["gate.weight"], function(model, "act1").gate.weight
    torch.testing.assert_close(new[::2], old)
    torch.testing.assert_close(new[1::2], (old[:-1] + old[1:]) / 2)


def test_one_shared_kernel_needs_no_rule():
    activation = {"name": "sparta", "variant": "shared", "sharing": "network"}
    bank = ActivationBank.from_model(trained("resnet8", activation))
    model = bank.apply_to(build_model("resnet18", activation="relu", width=6))
    assert torch.equal(model.shared_activations["network"].gate.weight, bank.entries["network"].tensors["gate.weight"])


def test_another_width_without_a_rule_is_refused_naming_both_widths_and_the_rules():
    bank = ActivationBank.from_model(trained("resnet18"))
    with pytest.raises(
        ValueError, match=r"expected 8 channels at site 'act1', got a function for 4 .*interpolate, mean"
    ):
        bank.apply_to(build_model("resnet18", width=8))
    with pytest.raises(ValueError, match="unknown adapt rule 'nearest'; known: interpolate, mean"):
        bank.apply_to(build_model("resnet18", width=8), adapt="nearest")


@pytest.mark.parametrize(
    "activation", ["se_relu", "atac", "dy_relu_b", {"name": "sparta", "variant": "lowrank"}], ids=str
)
def test_functions_that_mix_channels_have_no_rule_for_another_width(activation):
    bank = ActivationBank.from_model(trained("resnet18", activation, width=16))
    assert bank.apply_to(build_model("resnet34", activation="relu", width=16))
    with pytest.raises(
        ValueError, match=r"expected a function of each channel by itself .* got one that mixes the channels"
    ):
        bank.apply_to(build_model("resnet18", activation="relu", width=32), adapt="mean")


@pytest.mark.parametrize(
    "activation", ["prelu", "acon_c", "frelu", {"name": "sparta", "variant": "smoothmax"}], ids=str
)
def test_functions_of_each_channel_fit_every_width_by_a_rule(activation):
    bank = ActivationBank.from_model(trained("resnet8", activation))
    for adapt in ("mean", "interpolate"):
        model = bank.apply_to(build_model("resnet8", activation="relu", width=6), adapt=adapt)
        assert model(torch.rand(2, 3, 8, 8)).isfinite().all()


def test_a_refused_bank_leaves_the_network_as_it_was():
    model = trained("resnet18", width=8)
    before = ActivationBank.from_model(model)
    with pytest.raises(ValueError, match="expected 8 channels"):
        ActivationBank.from_model(trained("resnet18")).apply_to(model)
    assert ActivationBank.from_model(model) == before


def test_unfrozen_application_trains():
    bank = ActivationBank.from_model(trained())
    model = bank.apply_to(build_model("resnet8", width=4), freeze=False)
    assert frozen_parameters(model) == {}
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert ActivationBank.from_model(model) != bank


@pytest.fixture(params=["sparta", "frelu", {"name": "sparta", "sharing": "stage", "bias": True}], ids=str)
def frozen(request):
    source = trained(activation=request.param)
    source(torch.rand(8, 3, 8, 8))  # moves running statistics
    bank = ActivationBank.from_model(source)
    return bank, bank.apply_to(build_model("resnet8", width=4))


def test_frozen_survives_training_with_weight_decay_in_an_optimizer_of_all_parameters(frozen):
    bank, model = frozen
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    weight = model.conv1.weight.clone()
    for _ in range(3):
        model.train()
        step(model, optimizer)
    assert not torch.equal(model.conv1.weight, weight)
    assert ActivationBank.from_model(model) == bank


def test_frozen_survives_ema(frozen):
    bank, model = frozen
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(5):
        step(model, optimizer)
        ema.update_parameters(model)
    assert ActivationBank.from_model(ema) == bank


def test_frozen_survives_a_new_estimate_of_running_statistics(frozen):
    bank, model = frozen
    before = model.bn1.running_mean.clone()
    update_bn([torch.rand(4, 3, 8, 8)], model)
    assert not torch.equal(model.bn1.running_mean, before)
    assert ActivationBank.from_model(model) == bank


def test_frozen_is_pinned_again_by_the_next_change_of_mode(frozen):
    bank, model = frozen
    # As after an attack that asked for the input's gradient alone.
    model.requires_grad_(False).requires_grad_(True)
    model.train()
    assert not any(p.requires_grad for p in frozen_parameters(model).values())
    step(model, torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1))
    assert ActivationBank.from_model(model) == bank


def test_frozen_survives_a_checkpoint_of_the_same_and_refuses_one_of_others(frozen):
    bank, model = frozen
    model.load_state_dict(model.state_dict())
    assert ActivationBank.from_model(model) == bank
    other = trained(activation=bank.spec.mapping(), seed=5)
    with pytest.raises(RuntimeError, match="expected the frozen values, got others"):
        model.load_state_dict(other.state_dict())
    assert ActivationBank.from_model(model) == bank


def test_frozen_survives_distributed_data_parallel(frozen, tmp_path):
    bank, model = frozen
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model)
        step(parallel, torch.optim.SGD(parallel.parameters(), lr=0.5, weight_decay=0.1))
        assert ActivationBank.from_model(parallel) == bank
        assert set(frozen_parameters(parallel)) == {f"module.{name}" for name in frozen_parameters(model)}
        assert frozen_parameters(parallel).keys() <= dict(parallel.named_parameters()).keys()
    finally:
        torch.distributed.destroy_process_group()


def _two_frozen_ranks(rank, directory, digests):
    """Rank 1 begins from other convolutions and sees other images; what DistributedDataParallel broadcasts goes over
    the frozen values."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    try:
        for name, digest in digests.items():
            torch.manual_seed(rank)
            bank = ActivationBank.load(f"{directory}/{name}")
            parallel = DistributedDataParallel(bank.apply_to(build_model("resnet8", width=4)))
            before = parallel.module.conv1.weight.clone()
            optimizer = torch.optim.SGD(parallel.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
            for _ in range(2):
                step(parallel.train(), optimizer)
            weight = parallel.module.conv1.weight.detach()
            assert not torch.equal(weight, before)
            gathered = [torch.empty_like(weight) for _ in range(2)]
            torch.distributed.all_gather(gathered, weight)
            assert torch.equal(*gathered)
            assert ActivationBank.from_model(parallel).digest == digest
            del parallel, optimizer
        # A rank that leaves while the other still talks to it may abort.
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_frozen_banks_keep_their_digest_on_both_of_two_ranks(tmp_path):
    banks = {name: ActivationBank.from_model(trained(activation=name)) for name in ("sparta", "frelu")}
    for name, bank in banks.items():
        bank.save(tmp_path / name)
    mp.spawn(_two_frozen_ranks, (str(tmp_path), {name: bank.digest for name, bank in banks.items()}), nprocs=2)


def test_a_shared_function_trains_under_distributed_data_parallel(tmp_path):
    model = trained(activation={"name": "sparta", "sharing": "stage"})
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        before = ActivationBank.from_model(model)
        parallel = DistributedDataParallel(model)
        step(parallel, torch.optim.SGD(parallel.parameters(), lr=0.5))
        assert ActivationBank.from_model(model) != before
    finally:
        torch.distributed.destroy_process_group()


def test_frozen_parameters_are_those_of_the_activations(frozen):
    _, model = frozen
    held = {id(p) for p in frozen_parameters(model).values()}
    assert held == {id(p) for s in sites(model) for p in function(model, s.name).parameters()}
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in frozen_parameters(model).items())
    assert not any(p.requires_grad for p in frozen_parameters(model).values())


def test_application_follows_the_networks_type_and_mode():
    model = build_model("resnet8", width=4).double().eval()
    ActivationBank.from_model(trained()).apply_to(model)
    assert function(model, "act1").gate.weight.dtype == torch.float64
    assert model(torch.rand(2, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64


def reseal(directory, **changes):
    path = directory / "bank.json"
    meta = {**json.loads(path.read_text()), **changes}
    meta["sha256"] = hashlib.sha256((directory / "bank.safetensors").read_bytes()).hexdigest()
    path.write_text(json.dumps({**meta, "seal": _seal(meta)}))


def edit_tensors(directory, edit):
    path = directory / "bank.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def flip_a_byte(directory):
    path = directory / "bank.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def truncate(name):
    def cut(directory):
        path = directory / name
        path.write_bytes(path.read_bytes()[:-20])

    return cut


def put_nan(directory):
    edit_tensors(directory, lambda t: t["act1/gate.weight"].fill_(float("nan")))
    reseal(directory)


def put_other_values(directory):
    edit_tensors(directory, lambda t: t["act1/gate.weight"].add_(1))
    reseal(directory)


def test_a_saved_bank_spells_out_every_option(tmp_path):
    bank = ActivationBank.from_model(build_model("resnet8", width=4, activation="sparta"))
    bank.save(tmp_path)
    meta = json.loads((tmp_path / "bank.json").read_text())
    defaults = {"variant": "smoothmax", "kernel_size": 5, "dilation": 1, "beta": 1.0, "bias": False, "init": "silu"}
    assert meta["activation"] == {"name": "sparta", "sharing": "site", **defaults}
    assert ActivationBank.load(tmp_path) == bank


def test_a_saved_bank_outlives_an_option_that_a_later_version_adds(tmp_path, monkeypatch):
    bank = ActivationBank.from_model(build_model("resnet8", width=4, activation="frelu"))
    bank.save(tmp_path)

    class Later(activations.ACTIVATIONS["frelu"]):
        def __init__(self, num_channels, *, kernel_size=3, batch_norm=True, groups=1):
            super().__init__(num_channels, kernel_size=kernel_size, batch_norm=batch_norm)

    monkeypatch.setitem(activations.ACTIVATIONS, "frelu", Later)
    assert ActivationBank.load(tmp_path).digest == bank.digest


def put_another_shape(directory):
    edit_tensors(directory, lambda t: t.update({"act1/gate.weight": torch.ones(4, 1, 3, 3)}))
    reseal(directory)


def put_a_stranger(directory):
    edit_tensors(directory, lambda t: t.update({"act9/gate.weight": torch.ones(4, 1, 3, 3)}))
    reseal(directory)


def put_into_first_site(**changes):
    def put(directory):
        (first, *rest) = json.loads((directory / "bank.json").read_text())["sites"]
        reseal(directory, sites=[{**first, **changes}, *rest])

    return put


def write_text(text):
    return lambda directory: (directory / "bank.json").write_text(text)


def edit_text(old, new):
    def edit(directory):
        path = directory / "bank.json"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return edit


def replace_by_pickle(directory):
    torch.save({"act1/gate.weight": torch.ones(4, 1, 3, 3)}, directory / "bank.safetensors")
    reseal(directory)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (flip_a_byte, "expected sha256 .*damaged or altered"),
        (truncate("bank.safetensors"), "expected sha256 .*damaged or altered"),
        (truncate("bank.json"), "expected JSON"),
        (put_nan, "expected finite values, got NaN or infinity in 'act1/gate.weight'"),
        (put_other_values, "expected a bank with digest"),
        (put_another_shape, r"what 'sparta' has, .*\(4, 1, 5, 5\).*, got .*\(4, 1, 3, 3\)"),
        (put_a_stranger, "tensors that belong to no site: act9/gate.weight"),
        (replace_by_pickle, "expected a safetensors file"),
        (edit_text('"schema": 1', '"schema": 7'), "expected schema 1, got 7"),
        (edit_text('"stage": 1', '"stage": 2'), "expected seal .* the file is altered"),
        (edit_text('"resnet8"', '"resnet9"'), "expected seal .* the file is altered"),
        (edit_text('"digest"', '"digits"'), "expected keys"),
        (lambda d: reseal(d, activation={"name": "sparter"}), "unknown activation 'sparter'"),
        (lambda d: reseal(d, activation={"name": "sparta", "size": 3}), "unexpected keyword argument 'size'"),
        (lambda d: reseal(d, sites=[{"name": "act1"}]), "missing .* required"),
        (put_into_first_site(channels=10**18), "expected sites and tensors of one activation"),
        (put_into_first_site(channels=10**30), "expected sites and tensors of one activation"),
        (put_into_first_site(key=5), "expected sites and tensors of one activation"),
        (write_text("[]"), "expected schema 1, got list"),
        (write_text("[" * 100_000), "expected JSON"),
        (write_text('{"schema": ' + 5000 * "1" + "}"), "expected JSON"),
        (lambda d: (d / "bank.safetensors").unlink(), "no readable .*bank.safetensors"),
        (lambda d: (d / "bank.json").unlink(), "no readable .*bank.json"),
    ],
)
def test_files_that_are_amiss_are_refused(tmp_path, harm, message):
    directory = ActivationBank.from_model(trained()).save(tmp_path)
    assert ActivationBank.load(directory)
    harm(directory)
    with pytest.raises(ValueError, match=message):
        ActivationBank.load(directory)


def test_double_values_beyond_single_precision_are_finite(tmp_path):
    model = build_model("resnet8", activation="prelu").double()
    with torch.no_grad():
        dict(named_sites(model))["layer1.0.act1"].function.weight.fill_(1e300)
    bank = ActivationBank.from_model(model)
    assert ActivationBank.load(bank.save(tmp_path)) == bank


def test_a_bank_with_nan_is_not_written(tmp_path):
    model = trained()
    torch.nn.init.constant_(function(model, "act1").gate.weight, float("nan"))
    with pytest.raises(ValueError, match="expected finite values, got NaN or infinity"):
        ActivationBank.from_model(model).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_bank_whose_keys_are_no_text_is_refused(tmp_path):
    ActivationBank.from_model(trained(activation="relu")).save(tmp_path)
    put_into_first_site(key=5)(tmp_path)
    with pytest.raises(ValueError, match="expected sites and tensors of one activation"):
        ActivationBank.load(tmp_path)


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_write_of_either_file_leaves_the_old_bank(tmp_path, monkeypatch, failing):
    bank = ActivationBank.from_model(trained())
    bank.save(tmp_path)
    calls = []

    def fsync(_):
        calls.append(None)
        if len(calls) == failing:
            raise OSError("disk full")

    monkeypatch.setattr("sparta_models.files.os.fsync", fsync)
    with pytest.raises(OSError, match="disk full"):
        ActivationBank.from_model(trained(seed=3)).save(tmp_path)
    assert ActivationBank.load(tmp_path) == bank
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bank.json", "bank.safetensors"]


def test_a_bank_is_readable_by_whom_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        ActivationBank.from_model(trained()).save(tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


def test_what_no_network_could_take_is_no_bank():
    model = build_model("resnet8")
    dict(named_sites(model))["layer1.0.act1"].fill(Sparta(16, kernel_size=3))
    with pytest.raises(
        ValueError, match=r"expected under 'layer1.0.act1' what 'sparta' has, .*16, 1, 5, 5.*got .*16, 1, 3, 3"
    ):
        ActivationBank.from_model(model)
    with pytest.raises(ValueError, match="got one on the meta device"):
        ActivationBank.from_model(build_model("resnet8").to("meta"))


def test_a_network_without_sites_has_no_bank():
    with pytest.raises(ValueError, match="expected a network made by build_model or convert"):
        ActivationBank.from_model(nn.Conv2d(3, 3, 3))


def test_a_bare_frozen_activation_names_its_own_parameters():
    assert list(frozen_parameters(activations.build_activation("prelu", 3).freeze())) == ["weight"]


@pytest.mark.parametrize("sharing", ["site", "stage"])
def test_a_network_inside_a_users_own_is_the_one_that_is_filled(sharing):
    """A bank that goes to what stands around a network is one with a bank that went to the network itself."""
    bank = ActivationBank.from_model(trained(activation={"name": "sparta", "dilation": 2}))
    inner = trained(activation={"name": "sparta", "sharing": sharing})
    outer = nn.Sequential(nn.Identity(), inner)
    assert ActivationBank.from_model(outer) == ActivationBank.from_model(inner)
    bank.apply_to(outer)
    assert ActivationBank.from_model(inner) == ActivationBank.from_model(outer) == bank
    assert [name for name in inner.state_dict() if "shared" in name] == []


def test_two_networks_in_one_are_filled_as_one_by_install_and_one_by_one_by_a_bank():
    first, second = (trained(activation={"name": "sparta", "sharing": "stage"}, seed=seed) for seed in (0, 1))
    both = nn.ModuleList([first, second])
    with pytest.raises(ValueError, match="got 14 sites that were not filled as one network's"):
        ActivationBank.from_model(both)
    bank = ActivationBank.from_model(trained(activation="frelu"))
    with pytest.raises(ValueError, match="expected one network, got 2 in one; apply the bank to each of them"):
        bank.apply_to(both)
    install(both, "frelu")
    assert ActivationBank.from_model(both).spec.name == "frelu"
    assert not any("shared_activations" in name for name in both.state_dict())
    with pytest.raises(ValueError, match="got 7 sites that were not filled as one network's"):
        ActivationBank.from_model(first)


def test_a_rule_in_the_place_of_freeze_is_refused():
    bank = ActivationBank.from_model(trained())
    with pytest.raises(ValueError, match=r"expected freeze to be True or False, got 'mean'; a rule .* is adapt="):
        bank.apply_to(trained(), "mean")


@pytest.mark.parametrize("source", ["CIFAR", {"path": pytest}, {1: "a"}, [("a", "b")]], ids=str)
def test_a_source_that_cannot_be_saved_is_refused_at_once(source):
    with pytest.raises(ValueError, match="expected source to be a mapping of names to texts"):
        ActivationBank.from_model(trained(), source=source)


def test_a_bank_is_shown_on_one_line():
    bank = ActivationBank.from_model(trained(), source={"dataset": "digits"})
    assert bank.digest[:12] in repr(bank)
    assert "7 functions of resnet8" in repr(bank)
    assert len(repr(bank)) < 400


def test_a_bank_keeps_its_source_when_the_callers_changes():
    source = {"dataset": "digits"}
    bank = ActivationBank.from_model(trained(), source=source)
    source["dataset"] = "others"
    assert bank.source == {"dataset": "digits"}
