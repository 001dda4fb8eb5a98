"""Predicts a folder of images or a Parquet data set on all machines of a Ray cluster, and can be stopped and restarted.

    pip install ".[ray]"
    python examples/predict_with_ray.py photos/ --weights model.pth --out out/             # on this machine
    python examples/predict_with_ray.py photos.parquet --weights model.pth --out out/ --address auto  # on a cluster

Writes `predictions/NAME.png`, the panoptic maps, and `predictions.json`, the segments of all images in COCO's format. A
Parquet data set has a column with the bytes of image files and one with their unique names. The images, the weights and
`--out` must be on storage that all machines share under the same path.

Ray repeats the work of a process or a machine that is lost. Each result is one file that appears complete or not at
all, so a repetition changes nothing. A second run with the same arguments predicts the images that have no result yet.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.dataset
import ray
import ray.data

from panfpn_fast.checkpoints import read_config
from panfpn_fast.data.own_png import plain_name
from panfpn_fast.inference import CocoPanopticWriter, PredictToFolder, find_maps
from panfpn_fast.inference.finding import find_source, is_video
from panfpn_fast.inference.naming import Names


class Listed(NamedTuple):
    """The name of an image's result, and where the image is: its path, or its value in a column of the Parquet data."""

    name: str
    place: str


def list_images(source: Path, out: Path, column: str) -> list[Listed]:
    """Returns all images. A name depends on the image and on the results in the folder, so a restart repeats it."""
    if not is_parquet(source):
        places = [place for place in find_source(source) if not is_video(place)]
        return [Listed(job.name, str(job.place)) for job in Names(places, out, "none").jobs]
    values = pyarrow.dataset.dataset(source).to_table(columns=[column])[column].to_pylist()
    images = [Listed(plain_name(value), str(value)) for value in values]
    taken: dict[str, str] = {}
    for name, place in images:
        key = name.casefold()  # some file systems do not distinguish upper from lower case
        if key in taken:
            raise SystemExit(f"{taken[key]} and {place} have the same result, {name}.png; rename one of them")
        taken[key] = place
    return images


def is_parquet(source: Path) -> bool:
    """Whether the source is a Parquet file, or a folder with such files."""
    return source.suffix == ".parquet" or any(source.glob("*.parquet"))


def open_images(args: argparse.Namespace, images: list[Listed]) -> ray.data.Dataset:
    """Returns a data set with the columns `name`, `source` (the file name) and `image` (a path, or a file's bytes)."""
    if not is_parquet(args.source):
        return ray.data.from_items(
            [{"name": one.name, "source": Path(one.place).name, "image": one.place} for one in images]
        )
    names = {one.name for one in images}

    def select(batch: dict[str, Any]) -> dict[str, list[Any]]:
        found = [
            (plain_name(place), str(place), image)
            for place, image in zip(batch[args.names], batch[args.images], strict=True)
        ]
        kept = [row for row in found if row[0] in names]
        return {column: [row[i] for row in kept] for i, column in enumerate(("name", "source", "image"))}

    columns = [args.names, args.images]
    return ray.data.read_parquet(str(args.source), columns=columns).map_batches(select)


def check_settings(args: argparse.Namespace) -> None:
    """Ends the program if the results in the folder are those of other weights or sizes."""
    settings = {"weights": args.weights, "short_edge": args.short_edge, "max_edge": args.max_edge}
    if Path(args.weights).is_file():
        args.weights = str(Path(args.weights).absolute())  # processes may have other working directories
        settings["weights"] = hashlib.sha256(Path(args.weights).read_bytes()).hexdigest()
    path = args.out / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise SystemExit(f"{args.out} has the results of other weights or sizes; give another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings))


def count_actors(args: argparse.Namespace) -> int:
    """Returns the number of processes that predict: by default one for each GPU, or else one on the CPU."""
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    if gpus == 0 and args.device is None:
        args.device = "cpu"
    on_gpus = args.device != "cpu"
    count: int = args.actors or (gpus if on_gpus else 1)
    # Ray would wait for what the cluster does not have.
    if count >= cpus or (on_gpus and count > gpus):
        raise SystemExit(
            f"--actors: {count} processes need {count + 1} CPUs, one of them to read"
            + (f", and {count} GPUs" if on_gpus else "")
            + f"; the cluster has {cpus} CPUs and {gpus} GPUs; give a smaller number"
        )
    return count


def main(arguments: list[str] | None = None, predictor: type[PredictToFolder] = PredictToFolder) -> int:
    """Returns the exit status: 1 if images failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of image files, or Parquet file or folder")
    parser.add_argument("--weights", default="detectron2://COCO-PanopticSegmentation/panoptic_fpn_R_50_3x")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--images", default="bytes", help="Parquet column with the bytes of image files")
    parser.add_argument("--names", default="path", help="Parquet column with unique names")
    parser.add_argument("--short-edge", type=int, help="default: the network's own")
    parser.add_argument("--max-edge", type=int, help="default: the network's own")
    parser.add_argument("--device", help="cpu or cuda (default: the GPUs of the cluster)")
    parser.add_argument("--actors", type=int, help="processes that predict (default: one for each GPU)")
    parser.add_argument("--rows", type=int, default=8, help="images in a batch, which is repeated as a whole")
    parser.add_argument("--address", help="of a Ray cluster; by default Ray starts on this machine")
    args = parser.parse_args(arguments)
    args.source, args.out = args.source.absolute(), args.out.absolute()

    check_settings(args)
    categories = read_config(args.weights).categories
    if not ray.is_initialized():
        ray.init(address=args.address)
    actors = count_actors(args)
    images = list_images(args.source, args.out, args.names)
    done = find_maps(args.out, [one.name for one in images])
    missing = [one for one in images if one.name not in done]
    print(f"{len(images)} images, {len(done)} of them done before")
    failed: set[str] = set()
    if missing:
        results = open_images(args, missing).map_batches(
            predictor,
            fn_constructor_kwargs={
                "out": args.out,
                "model": args.weights,
                "images": "image",
                "short_edge": args.short_edge,
                "max_edge": args.max_edge,
                "device": args.device,
            },
            batch_size=args.rows,
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=1,
            num_gpus=0 if args.device == "cpu" else 1,
        )
        for row in results.iter_rows():
            if row["error"]:
                failed.add(row["name"])
                print(f"{row['source']}: {row['error']}", file=sys.stderr)
    # The files, not Ray's messages, say what is done.
    done |= find_maps(args.out, [one.name for one in missing])
    with CocoPanopticWriter(args.out, categories) as writer:  # writes the JSON of all maps in the folder
        print(f"{len(done)} of {len(images)} images are in {writer.json_path}")
    lost = len(images) - len(done | failed)
    if lost:
        print(f"{lost} images have no result; run the command again", file=sys.stderr)
    return 1 if failed or lost else 0


if __name__ == "__main__":
    sys.exit(main())
