"""`panfpn-fast data` leaves the user's files as they are, whatever `--out` is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from panfpn_fast.cli.main import main
from panfpn_fast.data.coco_panoptic import CocoPanopticDataset
from support.annotated_folders import CLASSES, WRITERS

pytest.importorskip("pycocotools")
pytest.importorskip("yaml")

pytestmark = pytest.mark.usefixtures("one_thread")

OTHER_FILE = "there is a file that this command did not make; give another --out"


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def run(action: str, kind: str, where: tuple[str, str], out: Path) -> int:
    own = ["--classes", *CLASSES, "--label-divisor", "1000"] if kind == "masks" else []
    named = ["--kind", kind, "--images", where[0], "--annotations", where[1], *own]
    return main(["data", action, *named, "--out", str(out)])


def check_refusal(
    action: str, kind: str, where: tuple[str, str], out: Path, capsys: pytest.CaptureFixture[str]
) -> str:
    """Returns the message of a command that must change no file in the folder of its inputs."""
    root = Path(where[1]).parent
    before = contents(root)
    assert run(action, kind, where, out) == 2
    after = contents(root)
    assert {path: after.get(path) for path in before} == before
    return capsys.readouterr().err


@pytest.mark.parametrize("option", ["images", "annotations"])
@pytest.mark.parametrize("action", ["check", "show", "convert"])
def test_folders_of_the_inputs(
    action: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = WRITERS["masks"](tmp_path, "train")
    out = Path(where[option == "annotations"])
    out = out.with_suffix(".json") if action == "convert" else out
    said = check_refusal(action, "masks", where, out, capsys)
    assert (
        f"expected another path than --{option}, which the command reads, got {out.with_suffix('')}" in said
    )


@pytest.mark.parametrize("action", ["check", "show", "convert"])
def test_images_that_data_yaml_names(action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, data = WRITERS["yolo"](tmp_path, "train")
    folder = tmp_path / "images" / "train"
    out = folder.with_suffix(".json") if action == "convert" else folder
    said = check_refusal(action, "yolo", ("train", data), out, capsys)
    assert f"{folder / '0.png'}: {OTHER_FILE}" in said
    assert not out.is_file()


def test_pngs_of_the_annotations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = WRITERS["coco_panoptic"](tmp_path, "val")
    folder = Path(where[1]).with_suffix("")
    assert OTHER_FILE in check_refusal("show", "coco_panoptic", where, folder, capsys)
    # PNGs of `data convert` are not those of `data show`.
    converted = tmp_path / "new" / "converted.json"
    assert run("convert", "coco_panoptic", where, converted) == 0
    where = where[0], str(converted)
    assert OTHER_FILE in check_refusal("show", "coco_panoptic", where, converted.with_suffix(""), capsys)


def test_an_annotation_among_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = WRITERS["labelme"](tmp_path, "train")
    out = Path(where[1]) / "1.json"
    said = check_refusal("convert", "labelme", where, out, capsys)
    assert f"--out: expected a new file, or one outside of --annotations, got {out}" in said


def test_results_of_an_earlier_run_are_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = WRITERS["coco_instances"](tmp_path, "train")
    for action, out in (("convert", tmp_path / "train_a.json"), ("show", tmp_path / "shown")):
        assert run(action, "coco_instances", where, out) == 0
        picture = out.with_suffix("") / "0.png"
        first = picture.read_bytes()
        with Image.open(picture) as image:
            assert image.info["Software"] == f"panfpn-fast data {action}"
        run("check", "coco_instances", where, tmp_path / "shown")
        assert run(action, "coco_instances", where, out) == 0
        assert picture.read_bytes() == first


def test_images_with_similar_ids_have_files_of_their_own(tmp_path: Path) -> None:
    """The third image's id is the second's without the folder, and the next free name looks like the first's id."""
    images, path = WRITERS["coco_instances"](tmp_path, "train")
    ids = ["a_2", "a", "../a"]
    content = json.loads(Path(path).read_text())
    for entry in (*content["images"], *content["annotations"]):
        key = "id" if "file_name" in entry else "image_id"
        entry[key] = ids[entry[key]]
    Path(path).write_text(json.dumps(content))
    for action, out in (("convert", tmp_path / "new.json"), ("show", tmp_path / "new")):
        assert run(action, "coco_instances", (images, path), tmp_path / action / out.name) == 0
        written = (tmp_path / action / "new").glob("*.png")
        assert sorted(file.name for file in written) == ["a.png", "a_2.png", "a_3.png"]
    converted = CocoPanopticDataset(images, tmp_path / "convert" / "new.json")
    assert [len(converted.load(i).label) for i in range(3)] == [3, 4, 1]
