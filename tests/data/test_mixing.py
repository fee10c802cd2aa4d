"""MixedSource: proportions, passes, resumption, and what a batch holds."""

from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from dkl.data import GeneratedImages, ImageData, MixedSource, write_npz

NUM_REAL, NUM_GENERATED = 37, 53


def image_data(num: int, first: int = 0) -> ImageData:
    """Images that tell their number."""
    numbers = torch.arange(first, first + num)
    images = torch.zeros(num, 1, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = numbers.to(torch.uint8)
    return ImageData(images, numbers % 10, 10, tuple("abcdefghij"))


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> GeneratedImages:
    folder = tmp_path_factory.mktemp("parts")
    paths = [
        write_npz(image_data(20, NUM_REAL), folder / "a.npz"),
        write_npz(image_data(NUM_GENERATED - 20, NUM_REAL + 20), folder / "b.npz"),
    ]
    return GeneratedImages(paths, num_classes=10, image_shape=(1, 2, 2))


def make(
    generated: GeneratedImages,
    fraction: float = 0.7,
    samples_per_epoch: int = 50,
    batch_size: int = 16,
) -> MixedSource:
    return MixedSource(
        image_data(NUM_REAL),
        generated,
        fraction=fraction,
        samples_per_epoch=samples_per_epoch,
        batch_size=batch_size,
    )


CASES = [(0.7, 50, 16), (0.8, 64, 16), (0.5, 10, 32), (0.3, 200, 7), (1.0, 20, 8), (0.99, 100, 10)]


@pytest.mark.parametrize(("fraction", "samples", "size"), CASES)
def test_every_batch_has_its_share(
    generated: GeneratedImages, fraction: float, samples: int, size: int
) -> None:
    source = make(generated, fraction, samples, size)
    assert len(source) == samples
    for epoch in range(3):
        order = source.epoch_order(seed=1, epoch=epoch)
        assert (order.dtype, tuple(order.shape)) == (torch.int64, (samples,))
        assert 0 <= int(order.min()) <= int(order.max()) < NUM_REAL + NUM_GENERATED
        for batch in order.split(size):
            assert int((batch >= NUM_REAL).sum()) == int(len(batch) * fraction)


@pytest.mark.parametrize(("fraction", "samples", "size"), CASES)
def test_micro_batches_are_mixed_alike(
    generated: GeneratedImages, fraction: float, samples: int, size: int
) -> None:
    order = make(generated, fraction, samples, size).epoch_order(seed=1, epoch=0)
    for batch in order.split(size):
        is_generated = (batch >= NUM_REAL).double()
        for length in range(1, len(batch) + 1):
            for run in is_generated.unfold(0, length, 1):
                assert abs(float(run.sum()) - length * float(is_generated.mean())) < 1 + 1e-9


@pytest.mark.parametrize(("fraction", "samples", "size"), CASES)
def test_every_real_image_comes_once_per_pass(
    generated: GeneratedImages, fraction: float, samples: int, size: int
) -> None:
    source = make(generated, fraction, samples, size)
    orders = [source.epoch_order(seed=5, epoch=epoch) for epoch in range(20)]
    drawn = torch.cat([order[order < NUM_REAL] for order in orders])
    assert (len(drawn) == 0) == (fraction == 1)
    passes = drawn.split(NUM_REAL)
    for one in passes:
        assert len(one.unique()) == len(one)
    for one, following in pairwise(passes[:-1]):
        assert not torch.equal(one, following)


def test_a_small_real_set_is_passed_several_times_in_an_epoch(generated: GeneratedImages) -> None:
    source = MixedSource(
        image_data(5), generated, fraction=0.5, samples_per_epoch=100, batch_size=10
    )
    order = source.epoch_order(seed=0, epoch=3)
    assert torch.equal(order[order < 5].bincount(), torch.full((5,), 10))


def test_generated_images_are_drawn_uniformly_with_replacement(generated: GeneratedImages) -> None:
    source = make(generated, 1.0, 50000, 100)
    counts = source.epoch_order(seed=0, epoch=0).sub(NUM_REAL).bincount(minlength=NUM_GENERATED)
    expected = 50000 / NUM_GENERATED
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert len(counts) == NUM_GENERATED
    assert 20 < chi_square < 110  # 52 degrees of freedom: deviation about 10
    few = make(generated, 1.0, 20, 20).epoch_order(seed=0, epoch=0)
    assert len(few.unique()) < 20


def test_an_epoch_alone_equals_the_epoch_in_sequence(generated: GeneratedImages) -> None:
    source = make(generated)
    sequence = [source.epoch_order(seed=7, epoch=epoch) for epoch in range(5)]
    assert torch.equal(make(generated).epoch_order(seed=7, epoch=3), sequence[3])
    assert torch.equal(source.epoch_order(seed=7, epoch=3), sequence[3])


def test_seed_and_epoch_matter(generated: GeneratedImages) -> None:
    source = make(generated)
    orders = [source.epoch_order(seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    for number, one in enumerate(orders):
        for other in orders[number + 1 :]:
            is_real = one < NUM_REAL
            assert (one[is_real] == other[is_real]).double().mean() < 0.5
            assert (one[~is_real] == other[~is_real]).double().mean() < 0.5


def test_the_order_is_the_same_for_ever(generated: GeneratedImages) -> None:
    order = make(generated, 0.5, 12, 6).epoch_order(seed=3, epoch=2)
    assert order.tolist() == [15, 80, 16, 52, 10, 50, 27, 40, 3, 49, 14, 78]


def test_global_generators_do_not_matter(generated: GeneratedImages) -> None:
    source = make(generated)
    torch.manual_seed(0)
    np.random.seed(0)
    one = source.epoch_order(seed=0, epoch=0)
    torch.manual_seed(1)
    np.random.seed(1)
    state = torch.get_rng_state()
    assert torch.equal(source.epoch_order(seed=0, epoch=0), one)
    assert torch.equal(torch.get_rng_state(), state)


def numbers_of(batch: tuple[Tensor, Tensor]) -> list[int]:
    images, labels = batch
    numbers = images[:, 0, 0, 0].long()
    assert torch.equal(labels, numbers % 10)
    return numbers.tolist()


def test_batches_hold_the_images_of_their_indices(generated: GeneratedImages) -> None:
    source = make(generated)
    total = NUM_REAL + NUM_GENERATED
    index_batches = [
        torch.randint(0, total, (40,)),
        torch.tensor([total - 1, 0, NUM_REAL, NUM_REAL - 1, NUM_REAL + 20]),
        torch.tensor([3]),  # only real
        torch.tensor([total - 2]),  # only generated
        torch.empty(0, dtype=torch.int64),
    ]
    got = list(source.batches(iter(index_batches), "cpu"))
    assert [numbers_of(batch) for batch in got] == [one.tolist() for one in index_batches]
    assert {(images.dtype, labels.dtype) for images, labels in got} == {(torch.uint8, torch.int64)}
    assert list(source.batches([], "cpu")) == []


def test_any_cut_over_processes_gives_the_same_samples(generated: GeneratedImages) -> None:
    source = make(generated)
    steps = source.epoch_order(seed=0, epoch=1).split(16)[:3]  # the fourth has two samples
    whole = [numbers_of(batch) for batch in source.batches(steps, "cpu")]
    for num_processes in (2, 3):
        streams = [
            make(generated).batches([one.chunk(num_processes)[rank] for one in steps], "cpu")
            for rank in range(num_processes)
        ]
        for expected, *cut in zip(whole, *streams, strict=True):
            assert list(chain.from_iterable(map(numbers_of, cut))) == expected


def test_indices_are_taken_one_ahead(generated: GeneratedImages) -> None:
    taken: list[int] = []

    def indices():  # type: ignore[no-untyped-def]
        for number in range(5):
            taken.append(number)
            yield torch.tensor([number])

    stream = make(generated).batches(indices(), "cpu")
    assert numbers_of(next(stream)) == [0]
    assert taken == [0, 1]
    stream.close()


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([90]), r"0 to 89 for 37 real and 53 generated images; got 90 to 90"),
        (torch.tensor([-1]), r"got -1 to -1"),
        (torch.ones(6, dtype=torch.bool), r"got torch.bool"),
    ],
)
def test_bad_indices_are_explained_at_their_turn(
    generated: GeneratedImages, indices: Tensor, message: str
) -> None:
    stream = make(generated).batches([torch.tensor([1]), indices], "cpu")
    assert numbers_of(next(stream)) == [1]
    with pytest.raises(ValueError, match=message):
        next(stream)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fraction": 0.0}, r"above 0 and at most 1.*leave the generated data away"),
        ({"fraction": 1.1}, r"got 1.1"),
        ({"fraction": float("nan")}, r"got nan"),
        ({"batch_size": 0}, r"at least 1; got 0 and 50"),
        ({"samples_per_epoch": 0}, r"at least 1; got 16 and 0"),
        ({"fraction": 0.05}, r"a batch of 16 with fraction 0.05 has int\(0.8\) = 0"),
    ],
)
def test_bad_settings_are_explained(
    generated: GeneratedImages, change: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(generated, **change)  # type: ignore[arg-type]


def test_data_that_do_not_fit_together_are_explained(generated: GeneratedImages) -> None:
    settings = {"fraction": 0.5, "samples_per_epoch": 10, "batch_size": 5}
    images, labels = torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"53 images of 1x2x2, 10 classes.*4 images of 1x2x2, 2"):
        MixedSource(ImageData(images, labels, 2, ("a", "b")), generated, **settings)  # type: ignore[arg-type]
    names = tuple("abcdefghij")
    wide = images.expand(4, 3, 2, 2)
    with pytest.raises(ValueError, match=r"ImageData\(4 images of 3x2x2"):
        MixedSource(ImageData(wide, labels, 10, names), generated, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"real must have images for a share of 0.5"):
        MixedSource(ImageData(images[:0], labels[:0], 10, names), generated, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="epoch must be 0 or more"):
        make(generated).epoch_order(seed=0, epoch=-1)
