"""Downloads from a local HTTP server, which can break connections and serve wrong files."""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from panfpn_fast._files import cache_dir
from panfpn_fast.checkpoints import DownloadError, hub, load
from panfpn_fast.models.config import presets
from support.checkpoint_samples import (
    save_mmdetection,
    save_pickle,
    small_mmdetection_weights,
    small_network,
    small_weights,
)
from support.ranks import forked, run_ranks
from support.web import QuietHandler, serving

NAME = "detectron2://COCO-PanopticSegmentation/panoptic_fpn_R_50_3x"
BACKBONE = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
MMDETECTION_NAME = "mmdetection://panoptic_fpn_r50_fpn_1x_coco"


class Publisher:
    """Files and faults of the server, and the requests that it received."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.with_length = True
        self.breaks = 0  # number of answers that end early
        self.continues = threading.Event()  # each answer waits for it half-way
        self.continues.set()
        self.requests: list[tuple[str, str | None]] = []
        self.url = ""

    def publish(self, content: bytes, monkeypatch: pytest.MonkeyPatch) -> str:
        """Serves `content` as `NAME`, in a file named after its checksum."""
        digest = hashlib.sha256(content).hexdigest()[:6]
        path = f"COCO-PanopticSegmentation/panoptic_fpn_R_50_3x/1/model_final_{digest}.pkl"
        monkeypatch.setitem(hub.PUBLISHED, NAME, path)
        self.files[f"/base/{path}"] = content
        return path


@pytest.fixture
def publisher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Publisher]:
    state = Publisher()

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            state.requests.append((self.path, asked))
            content = state.files.get(self.path)
            if content is None:
                self.send_error(404, "Not Found")
                return
            self.send_response(200)
            if state.with_length:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            state.breaks -= 1
            with contextlib.suppress(OSError):  # the client was killed
                self.wfile.write(content[:1_500_000])
                state.continues.wait()
                if state.breaks < 0:
                    self.wfile.write(content[1_500_000:])

    with serving(Handler, monkeypatch) as address:
        state.url = f"{address}/base"
        monkeypatch.setenv("PANFPN_DETECTRON2_URL", state.url)
        monkeypatch.setenv("PANFPN_MMDETECTION_URL", f"{state.url}/mm")
        monkeypatch.setenv("PANFPN_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("pooch.core.time", SimpleNamespace(sleep=lambda seconds: None))  # between retries
        yield state
        state.continues.set()


CONTENT = bytes(range(256)) * 10_000  # 2.56 MB: several chunks


def _files(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_load_by_name(publisher: Publisher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = {"model": small_weights(), "__author__": "Detectron2 Model Zoo"}
    publisher.publish(save_pickle(tmp_path / "a.pkl", content).read_bytes(), monkeypatch)
    for _ in range(2):
        state = load(NAME).state_dict()
        assert all(torch.equal(value, state[name]) for name, value in small_network().state_dict().items())
    assert len(publisher.requests) == 1  # the second call uses the cache


def test_short_names(publisher: Publisher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = {"model": small_weights(), "__author__": "Detectron2 Model Zoo"}
    publisher.publish(save_pickle(tmp_path / "a.pkl", content).read_bytes(), monkeypatch)
    monkeypatch.chdir(tmp_path)
    found = hub.find("panoptic_fpn_R_50_3x")
    assert found == hub.find(NAME)
    assert not hub.SHORT.keys() & presets.keys()
    Path("panoptic_fpn_R_50_3x").touch()  # a file of that name comes first
    assert hub.find("panoptic_fpn_R_50_3x") == Path("panoptic_fpn_R_50_3x")


def test_load_mmdetection_by_name(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = save_mmdetection(tmp_path / "a.pth", small_mmdetection_weights()).read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:8]
    path = f"v2.0/panoptic_fpn/panoptic_fpn_r50_fpn_1x_coco/panoptic_fpn_r50_fpn_1x_coco_2021-{digest}.pth"
    monkeypatch.setitem(hub.PUBLISHED, MMDETECTION_NAME, path)
    publisher.files[f"/base/mm/{path}"] = content
    for _ in range(2):
        state = load(MMDETECTION_NAME).state_dict()
        assert all(torch.equal(value, state[name]) for name, value in small_network().state_dict().items())
    assert publisher.requests == [(f"/base/mm/{path}", None)]
    assert (tmp_path / "cache" / "mmdetection" / path).is_file()


def test_download(
    publisher: Publisher,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = publisher.publish(CONTENT, monkeypatch)
    got = hub.fetch(NAME)
    assert got == tmp_path / "cache" / "detectron2" / path
    assert got.read_bytes() == CONTENT
    assert _files(tmp_path) == [got.name]
    shown = capsys.readouterr().err
    assert re.search(r"100%.*2\.56M/2\.56M", shown)
    assert got.stat().st_mode & 0o777 == 0o644  # other users of the cache can read it
    assert publisher.requests == [(f"/base/{path}", None)]
    assert hub.fetch(NAME) == got
    assert len(publisher.requests) == 1


def test_a_server_that_sends_no_length(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher.publish(CONTENT, monkeypatch)
    publisher.with_length = False
    assert hub.fetch(NAME).read_bytes() == CONTENT


def test_arguments_come_before_the_environment(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = publisher.publish(CONTENT, monkeypatch)
    monkeypatch.setenv("PANFPN_DETECTRON2_URL", "http://127.0.0.1:9")
    got = hub.fetch(NAME, cache=tmp_path / "elsewhere", base_url=f"{publisher.url}/")
    assert got == tmp_path / "elsewhere" / "detectron2" / path
    assert got.read_bytes() == CONTENT


def test_a_broken_download_is_tried_again(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher.publish(CONTENT, monkeypatch)
    publisher.breaks = 2
    assert hub.fetch(NAME).read_bytes() == CONTENT
    assert len(publisher.requests) == 3


@pytest.mark.parametrize("name", [NAME, BACKBONE])  # with and without a checksum
def test_a_download_that_always_breaks_leaves_no_file(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    publisher.publish(CONTENT, monkeypatch)
    publisher.files[f"/base/{hub.BACKBONES[BACKBONE]}"] = CONTENT
    publisher.breaks = 3
    message = (
        r"^http://.*\.pkl: the download to .*\.pkl failed \(IncompleteRead\(1500000 bytes read, 1060000 more"
    )
    with pytest.raises(DownloadError, match=rf"{message}.*\. Try again, or download the file by hand"):
        hub.fetch(name)
    assert _files(tmp_path) == []
    assert len(publisher.requests) == 3
    assert hub.fetch(name).read_bytes() == CONTENT


def test_a_killed_download_leaves_no_file_that_is_taken_for_whole(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = publisher.publish(CONTENT, monkeypatch)
    publisher.continues.clear()
    folder = (tmp_path / "cache" / "detectron2" / path).parent
    with forked(lambda: hub.fetch(NAME)):
        deadline = time.monotonic() + 30
        while not any(file.stat().st_size for file in folder.glob("tmp*")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    publisher.continues.set()
    assert not (folder / Path(path).name).exists()
    assert hub.fetch(NAME).read_bytes() == CONTENT


def test_a_file_with_another_checksum_is_removed(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = publisher.publish(CONTENT, monkeypatch)
    publisher.files[f"/base/{path}"] = b"something else"
    digits = path[-10:-4]
    with pytest.raises(
        DownloadError, match=rf"SHA-256 [0-9a-f]{{64}} does not begin with {digits}, so the file was deleted"
    ):
        hub.fetch(NAME)
    assert _files(tmp_path) == []


def test_a_missing_file_and_an_absent_server(publisher: Publisher) -> None:
    with pytest.raises(DownloadError, match=r"panoptic_fpn_R_50_3x/.*404 Client Error: Not Found"):
        hub.fetch(NAME)
    with pytest.raises(
        DownloadError,
        match=r"^http://127.0.0.1:9/.*model_final_c10459.pkl failed \(\[Errno 111\].*by hand and pass its path\.$",
    ):
        hub.fetch(NAME, base_url="http://127.0.0.1:9")


def test_an_unusable_cache_directory(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    publisher.publish(CONTENT, monkeypatch)
    (tmp_path / "file").touch()
    message = r"^http://.*: no cache directory \(.*\)\. Set PANFPN_CACHE to a writable directory, or download"
    with pytest.raises(DownloadError, match=message):
        hub.fetch(NAME, cache=tmp_path / "file" / "cache")
    for name in ("PANFPN_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_entry(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", no_entry)  # a container's user without a name
    with pytest.raises(DownloadError, match=message):
        hub.fetch(NAME)
    assert publisher.requests == []


def test_downloads_at_the_same_time(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher.publish(CONTENT, monkeypatch)
    results: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: results.append(hub.fetch(NAME).read_bytes())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [CONTENT] * 4
    assert len(publisher.requests) == 1


def test_ranks_download_once(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher.publish(CONTENT, monkeypatch)

    def check(rank: int) -> None:
        assert hub.fetch(NAME).read_bytes() == CONTENT

    run_ranks(3, check)
    assert len(publisher.requests) == 1


def test_where_downloads_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PANFPN_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("PANFPN_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "panfpn_fast"
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_dir() == Path.home() / ".cache" / "panfpn_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "panfpn_fast"


def test_published_names_and_their_checksums() -> None:
    found = {name.rsplit("/", 1)[1]: path for name, path in hub.PUBLISHED.items()}
    sums = {name: re.split("[-_]", path)[-1].split(".")[0] for name, path in found.items()}
    assert sums == {
        "panoptic_fpn_R_50_1x": "dbfeb4",
        "panoptic_fpn_R_50_3x": "c10459",
        "panoptic_fpn_R_101_3x": "cafdb1",
        "panoptic_fpn_r50_fpn_1x_coco": "9668fd13",
        "panoptic_fpn_r50_fpn_mstrain_3x_coco": "5650f98b",
        "panoptic_fpn_r101_fpn_1x_coco": "ab9157a2",
        "panoptic_fpn_r101_fpn_mstrain_3x_coco": "9c99acc4",
    }
    url = f"{hub.BASE_URLS['detectron2']}/{hub.PUBLISHED[NAME]}"
    assert url == (
        "https://dl.fbaipublicfiles.com/detectron2/COCO-PanopticSegmentation/panoptic_fpn_R_50_3x/139514569/"
        "model_final_c10459.pkl"
    )
    url = f"{hub.BASE_URLS['mmdetection']}/{hub.PUBLISHED[MMDETECTION_NAME]}"
    assert url == (
        "https://download.openmmlab.com/mmdetection/v2.0/panoptic_fpn/panoptic_fpn_r50_fpn_1x_coco/"
        "panoptic_fpn_r50_fpn_1x_coco_20210821_101153-9668fd13.pth"
    )
    with pytest.raises(ValueError, match="unknown checkpoint 'detectron2://x'"):
        hub.fetch("detectron2://x")
