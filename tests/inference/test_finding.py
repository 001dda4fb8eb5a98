"""What folders, patterns and lists of paths name, and how what is left out is counted."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from panfpn_fast.data import files
from panfpn_fast.inference.finding import Found, camera_number, file_name, find_source, find_sources, is_video


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fills the working directory with empty files, which nothing opens."""
    names = "p/b.JPG p/a.png p/c.heic p/notes.txt p/more.txt p/README p/.hidden.png p/clip.mp4 p/two/d.webp "
    names += "p/two/e.pdf p/.git/f.png q/only.txt q/clip.mov empty/x/g.tif [1]/h.png"
    for name in names.split():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("panfpn_fast.inference.finding.require_av", lambda: None)
    return tmp_path


def names(found: Found) -> list[str]:
    return [str(place) for place in found.places]


def without_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    files._register_heif.cache_clear()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)


def test_folders(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_heif(monkeypatch)
    found = find_sources(["p"])
    assert names(found) == ["p/a.png", "p/b.JPG"]
    assert not found.problems
    assert found.skipped == [
        "p: skipped 1 .heic file (HEIC images need another package: pip install pillow-heif), 2 .txt files, "
        "1 file without suffix, 2 folders, 1 hidden file, 1 video (.mp4)"
    ]


def test_folders_in_folders(here: Path) -> None:
    (here / "p" / "two" / "back").symlink_to(here / "p")
    (here / "p" / "broken.png").symlink_to(here / "nowhere.png")
    found = find_sources([Path("p")], recursive=True)
    assert names(found)[:2] + names(found)[-1:] == ["p/a.png", "p/b.JPG", "p/two/d.webp"]
    [message] = found.skipped
    assert "1 .pdf file, 2 .txt files, 1 broken link or device, 1 file without suffix, 2 folders" in message


def test_a_plugin_for_heic(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files._register_heif.cache_clear()
    registered: list[int] = []
    plugin = SimpleNamespace(register_heif_opener=lambda: registered.append(1))
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    assert names(find_sources(["p"])) == ["p/a.png", "p/b.JPG", "p/c.heic"]
    assert registered == [1]
    files._register_heif.cache_clear()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("p/*.png", ["p/a.png"]),
        ("p/**/*.[pw]*", ["p/a.png", "p/two/d.webp"]),
        ("p/*", ["p/a.png", "p/b.JPG", "p/clip.mp4"]),
        ("?/*.m*", ["p/clip.mp4", "q/clip.mov"]),
        ("[1]", ["[1]/h.png"]),  # the name of a folder comes first
        ("[1]/*", []),
    ],
)
def test_patterns(here: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, expected: list[str]) -> None:
    without_heif(monkeypatch)
    for given in (pattern, Path(pattern)):
        found = find_sources([given])
        assert names(found) == expected
        assert bool(found.problems) == (not expected)
        assert [str(place) for place in find_source(given)] == expected if expected else True


def test_what_has_no_images(here: Path) -> None:
    given = ["nope.png", "empty", "q", "q/*.txt", "*.jpg", "x" * 300, "a\0b"]
    found = find_sources(given)
    assert not found.places
    assert found.problems.pop().startswith("a\0b: ")
    assert found.problems == [
        "nope.png: no such file",
        "empty: no images in this folder (its subfolders are not searched); it has 1 folder",
        "q: no images in this folder (its subfolders are not searched); it has 1 .txt file, 1 video (.mov)",
        "q/*.txt: no image or video has such a name; it has 1 .txt file",
        "*.jpg: no image or video has such a name",
        f"{'x' * 300}: File name too long",
    ]
    assert find_sources(["q"], recursive=True).problems == [
        "q: no images in this folder; it has 1 .txt file, 1 video (.mov)"
    ]
    for source in given:
        with pytest.raises((OSError, ValueError)):
            find_source(source)


def test_each_file_counts_once(here: Path) -> None:
    same = ["p/a.png", f"{here}/p/a.png", "p/*.png"]
    found = find_sources([*same, "camera:1", "camera:1", "http://a/b", "q/only.txt"])
    assert names(found) == [
        "p/a.png",
        "camera:1",
        "http://a/b",
        "q/only.txt",
    ]  # a named file may have any suffix


def test_a_folder_that_cannot_be_read(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert find_sources(["p"]).problems == ["p: Permission denied"]


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_paths_in_the_standard_input(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = b"p/a.png\r\n\nnope.png\nhttps://x.org/b.png\np/*.JPG\n-\np/\xff.png"
    stdin(monkeypatch, lines)
    found = find_sources(["-"])
    assert names(found) == ["p/a.png", "https://x.org/b.png", "p/b.JPG"]
    assert found.problems == ["nope.png: no such file", "-: no such file", "p/\udcff.png: no such file"]
    for content, message in (
        (b"", "got nothing"),
        (b"\n\n", "got nothing"),
        (b"\x89PNG\0", "got other data"),
    ):
        stdin(monkeypatch, content)
        [problem] = find_sources(["-"]).problems
        assert problem.startswith("-: expected paths in the standard input, one a line")
        assert message in problem
    stdin(monkeypatch, b"p/a.png\np/b.JPG")
    assert find_source("-") == [Path("p/a.png"), Path("p/b.JPG")]


def test_results_of_an_earlier_run_are_no_images(here: Path) -> None:
    for name in (
        "out/a.png",
        "out/a_overlay.png",
        "out/b_overlay.png",
        "out/predictions/a.png",
        "out/c_overlay.mp4",
    ):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).touch()
    (here / "out" / "c_segments.jsonl").touch()
    found = find_sources(["out"], recursive=True, out=Path("out"))
    assert names(found) == ["out/a.png", "out/b_overlay.png"]
    assert found.skipped == ["out: skipped 1 .jsonl file, 3 results of predict"]
    assert names(find_sources(["out/*.mp4", "out/*_overlay.png"], out=Path("out"))) == ["out/b_overlay.png"]
    assert names(find_sources(["out/a_overlay.png"], out=Path("out"))) == ["out/a_overlay.png"]  # it is named


def test_cameras() -> None:
    assert [camera_number(f"camera:{number}") for number in (0, 12)] == [0, 12]
    others: list[object] = ["camera:", "camera:²", "camera:-1", "x:0", Path("camera:0"), b"camera:0", None]
    assert [camera_number(source) for source in others] == [None] * len(others)


def test_kinds_and_names() -> None:
    assert is_video("a.MP4")
    assert is_video("https://x.org/a.webm?b=c.png")
    assert not is_video("https://x.org/a.png?b=c.mp4")
    assert not is_video(3)
    assert file_name("https://x.org/c/a.png?b=/d") == "a.png"
    assert file_name(Path("c/a.png")) == "a.png"
    assert file_name("camera:0") == "camera:0"
