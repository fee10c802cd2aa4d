"""Feature maps of our own networks, and what reading them must not do."""

import copy
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from dkl.models import (
    Tap,
    TapPoints,
    create_model,
    feature_maps,
    list_models,
    outputs_of,
    tap_norms,
    tap_shapes,
)


def images(count=2, size=16):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Small(nn.Module):
    """A user's network: no method of ours, one ReLU for all, one addition in place."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.second = nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU(inplace=True)
        self.unused = nn.Conv2d(4, 4, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4, 5)

    def forward(self, images):
        hidden = self.relu(self.first(images))
        total = self.second(hidden)
        total += hidden
        return self.head(self.pool(self.relu(total)).flatten(1))


@pytest.mark.parametrize("name", list_models())
def test_every_own_model_tells_where_its_maps_are(name):
    with torch.device("meta"):
        model = create_model(name, 7, in_channels=1)
    shapes = tap_shapes(model, (1, 32, 32))
    assert len(shapes.maps) >= 3
    assert shapes.maps == shapes.pre_activations
    assert (shapes.num_features, shapes.num_classes) == (model.num_features, 7)
    assert len(tap_norms(model)) in (0, len(shapes.maps))
    assert model.get_submodule(model.tap_points().classifier) is model.get_classifier()
    # Features for methods go from fine to coarse.
    heights = [height for _, height, _ in shapes.maps]
    assert heights == sorted(heights, reverse=True)


@pytest.mark.parametrize(
    "name", ["resnet8", "wrn_10_1", "vgg8", "shufflenet_v2", "preact_resnet10"]
)
def test_the_call_stays_what_it_is(name):
    model = create_model(name, 7, mean=[0.4] * 3, std=[0.2] * 3).eval()
    hooks = count_hooks(model)
    features = feature_maps(model, images())
    assert torch.equal(features.logits, model(images()))
    normalised = (images() - 0.4) / 0.2
    last = model.forward_features(normalised)
    assert torch.equal(features.pooled, model.forward_head(last, pre_logits=True))
    assert torch.equal(features.logits, model.get_classifier()(features.pooled))
    assert count_hooks(model) == hooks


def test_gradients_flow_through_every_value():
    model = create_model("resnet8", 7, width=4)
    for group in ("maps", "pre_activations"):
        for index in range(4):
            model.zero_grad()
            getattr(feature_maps(model, images()), group)[index].sum().backward()
            assert model.conv1.weight.grad.abs().sum() > 0
            assert model.fc.weight.grad is None
    feature_maps(model, images()).pooled.sum().backward()
    assert model.fc.weight.grad is None
    with torch.no_grad():
        assert not feature_maps(model, images()).maps[0].requires_grad


def test_gradients_are_those_of_the_plain_call():
    model = create_model("shufflenet_v2", 7)
    other = copy.deepcopy(model)
    feature_maps(model, images()).logits.square().sum().backward()
    other(images()).square().sum().backward()
    for parameter, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad)


def test_dry_run_changes_nothing():
    model = create_model("wrn_10_1", 7, dropout=0.5).train()
    model.block1.eval()  # a part that its user froze
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    shapes = tap_shapes(model, (3, 32, 32))
    assert shapes.maps == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert [module.training for module in model.modules()] == modes
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dry_run_takes_type_and_device_of_the_model():
    assert tap_shapes(create_model("resnet8", 7).bfloat16(), (3, 8, 8)).maps[-1] == (64, 2, 2)
    with torch.device("meta"):
        shapes = tap_shapes(create_model("mobilenet_v1", 1000), (3, 224, 224))
    assert (shapes.maps[-1], shapes.num_features) == ((1024, 7, 7), 1024)


def test_names_of_modules_of_any_network():
    model = Small().eval()
    features = feature_maps(model, images(), ["pool"])
    assert features.maps[0].shape == (2, 4, 1, 1)
    assert (features.pre_activations, features.pooled.shape) == ([], (2, 4))
    assert torch.equal(features.logits, model(images()))


def test_taps_see_values_before_and_after_an_activation_in_place():
    model = Small().eval()
    points = TapPoints(
        (Tap("second", "input"), Tap("relu", call="last")),
        "head",
        (Tap("second", "input"), Tap("relu", "input", call="last")),
    )
    features = feature_maps(model, images(), points)
    hidden = model.first(images()).clamp(min=0)
    total = model.second(hidden) + hidden
    assert (total < 0).any()
    torch.testing.assert_close(features.pre_activations, [hidden, total])
    torch.testing.assert_close(features.maps, [hidden, total.clamp(min=0)])
    features.pre_activations[1].sum().backward()
    assert model.first.weight.grad.abs().sum() > 0


def test_layout_makes_a_map_of_anything():
    points = TapPoints(
        (Tap("head", "input", layout=lambda value, size: value.view(-1, 1, 2, 2) * size[0]),),
        "head",
    )
    features = feature_maps(Small(), images(), points)
    assert torch.equal(features.maps[0], features.pooled.view(-1, 1, 2, 2) * 16)


def test_inference_mode_keeps_values_too():
    model = Small().eval()
    expected = feature_maps(model, images(), ["pool"])
    with torch.inference_mode():
        features = feature_maps(model, images(), ["pool"])
        assert torch.equal(features.maps[0], expected.maps[0])
        # Nobody counts changes in this mode, so that what was there has been copied.
        before = feature_maps(model, images(), ["second"]).maps[0]
        assert torch.equal(before, model.second(model.first(images()).clamp(min=0)))


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (["third"], r"Small has no module 'third'; its modules are first, second, relu"),
        ([""], "no module ''"),
        ("first", r"must be a list, such as \['first'\]"),
        ([], "at least one module"),
        (["unused"], "'unused' did not run in this call"),
        (["relu"], r"'relu' ran 2 times.*call=\"last\""),
        (["second"], "output of the module 'second' was changed in place by a later layer"),
        (["head"], r"a feature map must be \[N, C, H, W\]; the output of 'head' is \[2, 5\]"),
        (None, "feature maps of Small are not known; give the names"),
        (TapPoints(outputs_of("pool"), "last"), "no module 'last'"),
        (TapPoints(outputs_of("pool"), "pool"), r"pooled features \[N, D\], got \[2, 4, 14, 14\]"),
        (TapPoints(outputs_of("pool"), "head", outputs_of("third")), "no module 'third'"),
        (
            TapPoints(outputs_of("pool"), "head", outputs_of("pool"), ("third",)),
            "no module 'third'",
        ),
    ],
)
def test_wrong_places(points, message):
    model = Small()
    with pytest.raises(ValueError, match=message):
        feature_maps(model, images(), points)
    assert count_hooks(model) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), "fc"), "at least one module for a feature map"),
        ((outputs_of("a", "b"), "fc", outputs_of("a")), "as many pre_activations.*1 for 2"),
        ((outputs_of("a"), "fc", outputs_of("a"), (None, "b")), "as many norms.*2 for 1"),
        ((outputs_of("a"), "fc", (), ("b",)), "as many norms.*1 for 0"),
    ],
)
def test_points_must_agree(arguments, message):
    with pytest.raises(ValueError, match=message):
        TapPoints(*arguments)


def test_outputs_that_are_no_tensors():
    class Pair(nn.Module):
        def forward(self, value):
            return value, value

    class Model(Small):
        def __init__(self, of_the_model):
            super().__init__()
            self.pair, self.of_the_model = Pair(), of_the_model

        def forward(self, images):
            logits = super().forward(self.pair(images)[0])
            return (logits,) if self.of_the_model else logits

    with pytest.raises(
        ValueError, match=r"output of the module 'pair' must be a tensor.*got tuple"
    ):
        feature_maps(Model(False), images(), ["pair"])
    with pytest.raises(ValueError, match=r"must return logits \[N, K\].*got tuple"):
        feature_maps(Model(True), images(), ["pool"])
    with pytest.raises(ValueError, match=r"must return logits \[N, K\].*got \[2, 4, 14, 14\]"):
        feature_maps(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(14, 14)), images(), ["0"])


def test_hooks_go_when_the_call_fails():
    model = create_model("resnet8", 7)
    with pytest.raises(RuntimeError, match="channels"):
        feature_maps(model, torch.rand(1, 4, 8, 8))
    assert count_hooks(model) == 0


def test_threads_do_not_mix_their_maps():
    model = create_model("resnet8", 7, width=4).eval()
    inputs = [torch.full((1, 3, 16, 16), float(number)) for number in range(4)]
    expected = [feature_maps(model, value) for value in inputs]
    start, right = threading.Barrier(len(inputs)), []

    def work(number):
        start.wait()
        for _ in range(20):
            features = feature_maps(model, inputs[number])
            same = zip(features.maps, expected[number].maps, strict=True)
            right.append(all(torch.allclose(ours, theirs) for ours, theirs in same))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # A thread that failed has appended fewer.
    assert right == [True] * (20 * len(inputs))
    assert count_hooks(model) == 0


def test_distributed_data_parallel(tmp_path):
    torch.manual_seed(0)
    model = create_model("resnet8", 7, width=4)
    other = copy.deepcopy(model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        features = feature_maps(wrapped, images())
        assert tap_shapes(wrapped, (3, 32, 32)).num_features == 16
        assert tap_norms(wrapped)[1] is model.layer1[0].bn2
        # The wrapper's own forward ran, so that it is ready to reduce gradients in this backward.
        (features.maps[2].sum() + features.logits.sum()).backward()
    finally:
        dist.destroy_process_group()
    expected = feature_maps(other, images())
    (expected.maps[2].sum() + expected.logits.sum()).backward()
    assert torch.equal(features.maps[2], expected.maps[2])
    assert torch.equal(model.conv1.weight.grad, other.conv1.weight.grad)


def test_data_parallel_is_refused():
    with pytest.raises(ValueError, match=r"DataParallel.*use DistributedDataParallel"):
        feature_maps(DataParallel(create_model("resnet8", 7)), images())


@pytest.mark.parametrize("kind", ["wrapped", "in place", "a part"])
def test_compiled_models_are_refused_but_measured(kind):
    model = create_model("resnet8", 7, width=4)
    if kind == "wrapped":
        compiled = torch.compile(model, backend="eager")
    else:
        compiled = model
        (model if kind == "in place" else model.layer1).compile(backend="eager")
    with pytest.raises(ValueError, match=r"is compiled, and.*leave it uncompiled"):
        feature_maps(compiled, images())
    assert tap_shapes(compiled, (3, 32, 32)).maps[-1] == (16, 8, 8)
    assert len(tap_norms(compiled)) == 4


def test_a_compiled_function_may_read_maps():
    model = create_model("resnet8", 7, width=4).eval()

    def total(values):
        return feature_maps(model, 2 * values).maps[1].sum() + 1

    expected = total(images())
    torch.testing.assert_close(torch.compile(total, backend="eager")(images()), expected)


def test_models_of_others_may_have_the_method():
    class Model(Small):
        def tap_points(self):
            return TapPoints(outputs_of("pool"), "head")

    assert feature_maps(Model(), images()).maps[0].shape == (2, 4, 1, 1)


def test_the_values_are_a_named_tuple():
    """Wrappers that convert what a model returns know how to go through one."""
    features = feature_maps(create_model("resnet8", 7), images())
    assert features._fields == ("maps", "pre_activations", "pooled", "logits")
    doubled = torch.utils._pytree.tree_map(lambda value: 2 * value, features)
    assert torch.equal(doubled.maps[3], 2 * features.maps[3])
