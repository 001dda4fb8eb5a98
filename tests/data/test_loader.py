"""Batches depend only on the seed, not on workers, ranks or restarts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice

import pytest
import torch

from panfpn_fast.data.files import DataError
from panfpn_fast.data.loader import Batch, TrainLoader
from panfpn_fast.data.sample import Sample
from panfpn_fast.data.synthetic import SyntheticDataset
from panfpn_fast.data.transforms import Compose, Flip, Photometric, Resize
from support.processes import run

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


def test_a_resumed_run_continues_where_it_stopped() -> None:
    assert same(batches(6)[4:], batches(2, start=4))


def test_ranks_share_the_batches_of_one_process() -> None:
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
    """A dataset whose pixel values are the index of the image; some images cannot be read."""

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
    with pytest.raises(ValueError, match="expected at least one image"):
        TrainLoader(Numbered(0), TRANSFORM, 1)


@pytest.mark.parametrize(
    "then",
    [
        "",
        # torch's own clean-up of garbage fails here: the queue to a worker is finalized before the iterator.
        "circle = [batches, loader]; circle.append(circle); del circle, batches, loader; gc.collect()",
    ],
    ids=["in use", "garbage in a cycle"],
)
def test_process_with_an_open_loader_ends(then: str) -> None:
    """Its workers ignore SIGTERM, with which Python ends the children of a process that exits."""
    script = f"""
import gc

from panfpn_fast.data import SyntheticDataset, TrainLoader
from panfpn_fast.data.transforms import Compose

loader = TrainLoader(SyntheticDataset(8, seed=0, size=(64, 64)), Compose([]), 2, seed=0, workers=2)
batches = iter(loader)
print(len(next(batches).images))
{then}
"""
    finished = run([sys.executable, "-c", script], seconds=60)
    assert finished.stdout == "2\n"
    assert "Traceback" not in finished.stderr


def test_process_whose_workers_missed_their_end_ends() -> None:
    """The garbage collector deletes an iterator in any thread, where its message to the workers can be lost."""
    script = """
from panfpn_fast.data import SyntheticDataset, TrainLoader
from panfpn_fast.data.transforms import Compose

loader = TrainLoader(SyntheticDataset(8, seed=0, size=(64, 64)), Compose([]), 2, seed=0, workers=1)
batches = iter(loader)
print(len(next(batches).images))
loader._loader._iterator._shutdown = True  # it sends no message when it is deleted
batches.gi_frame.f_locals["batches"]._workers = []
del batches, loader
"""
    finished = run([sys.executable, "-c", script], seconds=60)
    assert finished.stdout == "2\n"


def test_an_error_while_loading_ends_the_workers() -> None:
    loader = TrainLoader(Numbered(3, bad=(0, 1, 2)), TRANSFORM, 1, workers=1)
    batches = iter(loader)
    with pytest.raises(DataError):
        next(batches)
    assert not any(worker.is_alive() for worker in loader._loader._iterator._workers)  # type: ignore[union-attr]
