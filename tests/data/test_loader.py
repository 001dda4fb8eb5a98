"""Batches depend on the seed alone: not on workers, ranks or restarts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest
import torch

from panfpn_fast.data.files import DataError
from panfpn_fast.data.loader import Batch, TrainLoader
from panfpn_fast.data.sample import Sample
from panfpn_fast.data.synthetic import SyntheticDataset
from panfpn_fast.data.transforms import Compose, Flip, Photometric, Resize

TRANSFORM = Compose([Resize((48, 64), 96), Flip(), Photometric()])
DATASET = SyntheticDataset(7, seed=1, size=(48, 64))


def batches(count: int, **options: object) -> list[Batch]:
    loader = TrainLoader(DATASET, TRANSFORM, **{"batch_size": 3, "seed": 5, **options})  # type: ignore[arg-type]
    return list(islice(loader, count))


def flat(found: list[Batch]) -> Iterator[torch.Tensor]:
    for batch in found:
        for image, target, seed in zip(*batch, strict=True):
            yield from (image, *target, torch.tensor(seed))


def same(first: list[Batch], second: list[Batch]) -> bool:
    pairs = list(zip(flat(first), flat(second), strict=True))
    return all(torch.equal(a, b) for a, b in pairs)


def test_workers_change_nothing() -> None:
    assert same(batches(5), batches(5, workers=2))


def test_a_resumed_run_goes_on_where_it_stopped() -> None:
    assert same(batches(6)[4:], batches(2, start=4))


def test_ranks_share_what_one_process_sees() -> None:
    together = batches(3, batch_size=4)
    ranks = [batches(3, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    for step in range(3):
        images = [ranks[i % 2][step].images[i // 2] for i in range(4)]
        assert all(torch.equal(a, b) for a, b in zip(together[step].images, images, strict=True))


def test_seeds_and_epochs_differ() -> None:
    assert not same(batches(1), batches(1, seed=6))
    first, second = batches(14, batch_size=1)[:7], batches(14, batch_size=1)[7:]
    assert not same(first, second)


class Numbered:
    """A data set whose images tell their index; some cannot be read."""

    categories = DATASET.categories

    def __init__(self, length: int, bad: tuple[int, ...] = ()) -> None:
        self.length = length
        self.bad = bad

    def __len__(self) -> int:
        return self.length

    def load(self, index: int) -> Sample:
        if index in self.bad:
            raise DataError(f"image {index} is damaged")
        nothing = torch.zeros(0)
        image = torch.full((3, 1, 1), index, dtype=torch.uint8)
        return Sample(
            image,
            torch.zeros(1, 1, dtype=torch.int32),
            nothing.bool(),
            nothing.long(),
            nothing.bool(),
            nothing.long(),
            index,
            "",
        )


def indices(dataset: Numbered, count: int, **options: object) -> list[int]:
    loader = TrainLoader(dataset, Compose([]), 1, **options)  # type: ignore[arg-type]
    return [int(batch.images[0][0, 0, 0]) for batch in islice(loader, count)]


def test_each_epoch_has_every_image_once() -> None:
    found = indices(Numbered(9), 27)
    for epoch in range(3):
        assert sorted(found[9 * epoch : 9 * epoch + 9]) == list(range(9))
    assert found[:9] != found[9:18]


def test_a_subset_is_the_same_images_in_every_epoch() -> None:
    found = indices(Numbered(50), 20, subset=5)
    assert len(set(found)) == 5
    assert sorted(found[:5]) == sorted(found[5:10])
    assert indices(Numbered(3), 3, subset=5) != []


def test_a_damaged_image_is_an_error_or_skipped_and_counted() -> None:
    with pytest.raises(DataError, match="image 4 is damaged"):
        indices(Numbered(6, bad=(4,)), 6)
    loader = TrainLoader(Numbered(6, bad=(4,)), Compose([]), 2, skip_bad=True)
    with pytest.warns(UserWarning, match="skipped image 4 is damaged"):
        found = [int(image[0, 0, 0]) for batch in islice(loader, 3) for image in batch.images]
    assert len(found) == 6
    assert 4 not in found
    assert loader.skipped == {"image 4 is damaged"}


def test_nothing_readable_is_an_error() -> None:
    with pytest.raises(DataError, match="20 images in a row"):
        indices(Numbered(2, bad=(0, 1)), 1, skip_bad=True)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"batch_size": 0}, "batch_size"), ({"workers": -1}, "workers"), ({"subset": 0}, "subset")],
)
def test_bad_numbers_are_named(options: dict[str, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected"):
        TrainLoader(DATASET, TRANSFORM, **{"batch_size": 1, **options})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no images"):
        TrainLoader(Numbered(0), TRANSFORM, 1)
