"""Two sets of batch-norm layers and the switch between them."""

import copy
import os
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from dkl.attacks.pgd import attack_mode
from dkl.engine.averaging import AverageSettings, WeightAverage
from dkl.engine.processes import average_batch_norm_buffers
from dkl.models import CheckpointError, add_dual_batch_norm, create_model, load_checkpoint

MODELS = [
    ("wrn_10_1", {}),
    ("wrn_10_1_silu", {}),
    ("preact_resnet18", {"width": 4}),
    ("resnet18_cifar", {"width": 4}),
    ("convnet_small", {"width": 4}),
]


def switch(model, on):
    """Switch as a method does: without knowing the model."""
    layers = [module for module in model.modules() if hasattr(module, "uses_auxiliary")]
    for layer in layers:
        layer.uses_auxiliary = on
    return len(layers)


def build(name="wrn_10_1", seed=0, **options):
    torch.manual_seed(seed)
    return create_model(name, 5, in_channels=1, mean=[0.3], std=[0.4], **options)


def build_dual(name="wrn_10_1", seed=0, **options):
    """Return a doubled model whose two sets differ in everything."""
    model = add_dual_batch_norm(build(name, seed, **options))
    for key, value in model.state_dict().items():
        if "_auto" in key and value.is_floating_point():
            value.uniform_(0.5, 1.5)
    return model


def images(count=6, seed=1):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model, before):
    return {name for name, value in model.state_dict().items() if not value.equal(before[name])}


@pytest.mark.parametrize(("name", "options"), MODELS)
def test_names_values_and_objects_of_the_model_stay(name, options):
    plain = build(name, **options)
    before, parameters = snapshot(plain), dict(plain.named_parameters())
    num_layers = sum(isinstance(module, _BatchNorm) for module in plain.modules())
    dual = add_dual_batch_norm(plain)
    assert dual is plain
    state = dual.state_dict()
    own = {key: value for key, value in state.items() if "_auto" not in key}
    assert list(own) == list(before)
    assert all(value.equal(before[key]) for key, value in own.items())
    named = dict(dual.named_parameters())
    assert all(named[key] is parameter for key, parameter in parameters.items())
    assert len(state) == len(before) + 5 * num_layers
    assert switch(dual, False) == num_layers
    auxiliary = [module for key, module in dual.named_modules() if key.endswith("_auto")]
    assert len(auxiliary) == num_layers
    assert all(type(module) is nn.BatchNorm2d for module in auxiliary)


@pytest.mark.parametrize(("name", "options"), MODELS)
def test_the_same_function_at_first_and_then_that_of_a_model_with_the_other_layers(name, options):
    plain = build(name, **options).eval()
    expected = plain(images())
    dual = build_dual(name, **options).eval()
    assert dual(images()).equal(expected)
    switch(dual, True)
    # The oracle: a plain model with the auxiliary values in the places of the base layers.
    layers = {key: module for key, module in dual.named_modules() if key.endswith("_auto")}
    bases = [key for key, module in dual.named_modules() if hasattr(module, "uses_auxiliary")]
    by_flat_name = {key.replace(".", "_") + "_auto": key for key in bases}
    for key, layer in layers.items():
        target = plain.get_submodule(by_flat_name[key.replace(".", "_")])
        target.load_state_dict(layer.state_dict())
    assert not plain(images()).equal(expected)
    assert dual(images()).equal(plain(images()))
    switch(dual, False)
    assert dual(images()).equal(expected)
    fresh = add_dual_batch_norm(build(name, **options)).eval()
    switch(fresh, True)
    assert fresh(images()).equal(expected)


def test_names_beside_the_layer_and_outside_of_numbered_containers():
    block = build_dual("wrn_10_1").state_dict()
    assert "block1.layer.0.bn1_auto.running_mean" in block
    assert "bn1_auto.weight" in block
    shortcut = build_dual("resnet18_cifar", width=4)
    assert "layer2.0.shortcut_1_auto.weight" in shortcut.state_dict()
    assert len(shortcut.layer2[0].shortcut) == 2
    assert "bn_2_auto.bias" in build_dual("convnet_small").state_dict()


@pytest.mark.parametrize("on", [False, True])
def test_only_the_set_in_use_gets_statistics_and_gradients(on):
    model = build_dual().train()
    switch(model, on)
    before = snapshot(model)
    model(images()).square().sum().backward()
    used = {key for key in before if ("_auto" in key) == on and ("running" in key or "num" in key)}
    assert changed(model, before) == used
    for name, parameter in model.named_parameters():
        is_other = ("bn" in name) and ("_auto" in name) != on
        assert (parameter.grad is None) == is_other, name


def test_both_sets_in_one_backward_pass():
    """Gradients are the sums of those of the two passes, weights shared and norms apart."""
    model = build_dual().eval()
    names = [name for name, _ in model.named_parameters()]

    def gradients(weights):
        model.zero_grad()
        loss = 0
        for on, weight in weights:
            switch(model, on)
            loss = loss + weight * model(images()).square().sum()
        loss.backward()
        zero = torch.zeros(())
        return [zero if p.grad is None else p.grad.clone() for p in model.parameters()]

    both = gradients([(False, 1.0), (True, 0.5)])
    base, auxiliary = gradients([(False, 1.0)]), gradients([(True, 0.5)])
    for name, total, one, other in zip(names, both, base, auxiliary, strict=True):
        torch.testing.assert_close(total, one + other, msg=lambda text, name=name: f"{name} {text}")


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("on", [False, True])
def test_copies_are_complete_and_independent(how, on):
    model = build_dual().eval()
    switch(model, on)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    expected = model(images())
    assert twin(images()).equal(expected)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    assert twin(images()).equal(expected)
    before = snapshot(twin)
    twin.train()(images())
    assert all(("_auto" in name) == on for name in changed(twin, before))


def test_state_dict_round_trip_and_conversions():
    model, other = build_dual(seed=0).eval(), build_dual(seed=3).eval()
    other.load_state_dict(model.state_dict())
    for on in (False, True):
        switch(model, on)
        switch(other, on)
        assert other(images()).equal(model(images()))
        double = copy.deepcopy(model).double()
        assert {value.dtype for value in double.parameters()} == {torch.float64}
        torch.testing.assert_close(double(images().double()).float(), model(images()))
    with torch.device("meta"):
        shadow = add_dual_batch_norm(create_model("wrn_70_16_silu", 10))
        switch(shadow, True)
        assert shadow(torch.empty(2, 3, 32, 32)).shape == (2, 10)
    assert all(tensor.is_meta for tensor in (*shadow.parameters(), *shadow.buffers()))


def test_moving_averages_keep_both_sets_apart():
    model = build_dual().train()
    average = WeightAverage(model, AverageSettings(decay=0.5))
    before = snapshot(average.model)
    for on in (False, True):
        switch(model, on)
        model(images())
    average.update(model, progress=1.0)
    for name, value in average.model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (before[name] + model.state_dict()[name]) / 2)
    switch(average.model, True)
    twin = copy.deepcopy(average.model)
    for name, value in twin.state_dict().items():
        if "_auto" not in name and "bn" in name:
            value.fill_(0.123)
    # What is in use after the switch is the averaged set, not the model's own.
    assert twin(images()).equal(average.model(images()))


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("mode", ["eval", "train", "batch-stats"])
def test_attack_modes_hold_for_both_sets(mode, on):
    model = build_dual().train()
    switch(model, on)
    before = snapshot(model)
    with attack_mode(model, mode):
        logits = model(images())
        assert all(module.training == (mode != "eval") for module in model.modules())
    statistics = changed(model, before)
    if mode == "train":
        assert statistics
        assert all(("_auto" in name) == on for name in statistics)
    else:
        assert not statistics
    oracle = copy.deepcopy(model).train(mode != "eval")
    assert logits.equal(oracle(images()))
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    assert all(layer.training and layer.track_running_stats for layer in layers)


def test_traced_by_torch_compile_with_either_set():
    model = build_dual().eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for on in (False, True, False):
        switch(model, on)
        torch.testing.assert_close(compiled(images()), model(images()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2), "Linear has no batch-norm layer"),
        (lambda: nn.BatchNorm2d(2), "the model stands in nothing but BatchNorm2d"),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)), "1 stands in nothing but"),
        (build_dual, "has auxiliary batch-norm layers already"),
        (lambda: nn.ModuleDict({"a": nn.SyncBatchNorm(2)}), "a is a SyncBatchNorm; only"),
    ],
)
def test_models_that_cannot_be_doubled_are_refused_unchanged(make, message):
    model = make()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        add_dual_batch_norm(model)
    assert [name for name, _ in model.named_modules()] == names


def test_a_name_that_is_taken_is_refused():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(2)
            self.bn_auto = nn.Linear(2, 2)

    with pytest.raises(ValueError, match="bn cannot be doubled: bn_auto exists beside it"):
        add_dual_batch_norm(Block())


def test_a_layer_used_twice_stays_one_layer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.BatchNorm1d(2)
            self.second = self.first

    model = add_dual_batch_norm(Twice())
    assert model.first is model.second
    assert [name for name, _ in model.named_children()] == ["first", "first_auto"]


def test_plain_and_dual_checkpoints(tmp_path):
    dual, plain = build_dual(seed=1), build(seed=2)
    torch.save({"module." + key: value for key, value in dual.state_dict().items()}, tmp_path / "d")
    torch.save(plain.state_dict(), tmp_path / "p")
    left_out = load_checkpoint(plain, tmp_path / "d")
    assert len(left_out) == len(dual.state_dict()) - len(plain.state_dict())
    assert all("_auto." in name for name in left_out)
    assert plain.eval()(images()).equal(dual.eval()(images()))

    other = build_dual(seed=4)
    assert load_checkpoint(other, tmp_path / "d") == []
    assert not changed(other, snapshot(dual))

    before = snapshot(other)
    with pytest.raises(CheckpointError, match="auxiliary batch-norm layers and the file has none"):
        load_checkpoint(other, tmp_path / "p")
    assert not changed(other, before)


class _Processes:
    """What ``average_batch_norm_buffers`` needs of an accelerator."""

    num_processes = 2

    def reduce(self, tensor, reduction):
        total = tensor.clone()
        dist.all_reduce(total)
        return total / 2


def _train_on_two(rank, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store)
    model = build_dual().train()
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        switch(model, False)
        loss = wrapped(images(4, seed=rank)).square().mean()
        switch(model, True)
        (loss + wrapped(images(4, seed=2 + rank)).square().mean()).backward()
        switch(model, False)
        optimizer.step()
        optimizer.zero_grad()
    average_batch_norm_buffers(_Processes(), model)
    torch.save(model.state_dict(), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_end_with_the_same_two_sets(tmp_path):
    mp.spawn(_train_on_two, args=(tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    start = build_dual().state_dict()
    for name, value in first.items():
        assert value.equal(second[name]), name
        if "bn" in name:
            # Both sets have learned and seen data.
            assert not value.equal(start[name]), name
