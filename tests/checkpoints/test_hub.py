"""Downloads: a local HTTP server plays the publisher, with and without ranges, honest and not."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from checkpoint_samples import (
    save_mmdetection,
    save_pickle,
    small_mmdetection_weights,
    small_network,
    small_weights,
)

from panfpn_fast._cache import cache_dir
from panfpn_fast.checkpoints import DownloadError, hub, load

NAME = "detectron2://COCO-PanopticSegmentation/panoptic_fpn_R_50_3x"
MMDETECTION_NAME = "mmdetection://panoptic_fpn_r50_fpn_1x_coco"


class Publisher:
    """What the server serves, how it behaves, and what it was asked."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.ranges = True
        self.with_length = True
        self.break_after: int | None = None
        self.wrong_range = False
        self.requests: list[tuple[str, str | None]] = []
        self.url = ""

    def publish(self, content: bytes, monkeypatch: pytest.MonkeyPatch) -> str:
        """Serves ``content`` under :data:`NAME`, in a file that is named after its check sum."""
        digest = hashlib.sha256(content).hexdigest()[:6]
        path = f"COCO-PanopticSegmentation/panoptic_fpn_R_50_3x/1/model_final_{digest}.pkl"
        monkeypatch.setitem(hub.PUBLISHED, NAME, path)
        self.files[f"/base/{path}"] = content
        return path


@pytest.fixture
def publisher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Publisher]:
    state = Publisher()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            state.requests.append((self.path, asked))
            content = state.files.get(self.path)
            if content is None:
                self.send_error(404, "Not Found")
                return
            start = 0
            if asked is not None and state.ranges:
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
                if start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.end_headers()
                    return
                start = 0 if state.wrong_range else start
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            body = content[start:]
            if state.with_length:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: state.break_after])

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/base"
    monkeypatch.setenv("PANFPN_DETECTRON2_URL", state.url)
    monkeypatch.setenv("PANFPN_MMDETECTION_URL", f"{state.url}/mm")
    monkeypatch.setenv("PANFPN_CACHE", str(tmp_path / "cache"))
    # A proxy of the machine's must not stand between the test and its server.
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


CONTENT = bytes(range(256)) * 10_000  # 2.5 MB: several chunks


def test_load_by_name(publisher: Publisher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = {"model": small_weights(), "__author__": "Detectron2 Model Zoo"}
    publisher.publish(save_pickle(tmp_path / "a.pkl", content).read_bytes(), monkeypatch)
    for _ in range(2):
        state = load(NAME).state_dict()
        assert all(torch.equal(value, state[name]) for name, value in small_network().state_dict().items())
    assert len(publisher.requests) == 1  # the second time it is in the cache


def test_load_mmdetections_by_name(
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
    assert [p.name for p in got.parent.iterdir() if p.suffix != ".lock"] == [got.name]
    shown = capsys.readouterr().err
    assert re.search(rf"{got.name}: 100%.*2\.56M/2\.56M", shown)
    assert publisher.requests == [(f"/base/{path}", None)]
    assert hub.fetch(NAME) == got
    assert len(publisher.requests) == 1


def test_a_server_that_tells_no_length(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ranges: bool
) -> None:
    path = publisher.publish(CONTENT, monkeypatch)
    publisher.ranges = ranges
    publisher.break_after = 1_500_000
    part = tmp_path / "cache" / "detectron2" / f"{path}.part"
    with pytest.raises(DownloadError, match=r"broke after 1500000 of 2560000 bytes.*kept in .*\.part"):
        hub.fetch(NAME)
    assert part.read_bytes() == CONTENT[:1_500_000]
    publisher.break_after = None
    got = hub.fetch(NAME)
    assert got.read_bytes() == CONTENT
    assert not part.exists()
    assert [asked for _, asked in publisher.requests] == [None, "bytes=1500000-"]


def test_a_download_that_was_complete_but_not_renamed(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    part = tmp_path / "cache" / "detectron2" / f"{publisher.publish(CONTENT, monkeypatch)}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT)
    assert hub.fetch(NAME).read_bytes() == CONTENT
    assert [asked for _, asked in publisher.requests] == ["bytes=2560000-"]


@pytest.mark.parametrize("size", [3_000_000, 2_560_001])
def test_a_part_longer_than_the_file_is_dropped(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int
) -> None:
    part = tmp_path / "cache" / "detectron2" / f"{publisher.publish(CONTENT, monkeypatch)}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(size))
    assert hub.fetch(NAME).read_bytes() == CONTENT
    assert [asked for _, asked in publisher.requests] == [f"bytes={size}-", None]


def test_a_part_of_another_file_is_noticed_and_removed(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    part = tmp_path / "cache" / "detectron2" / f"{publisher.publish(CONTENT, monkeypatch)}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"from another file")
    with pytest.raises(DownloadError, match=r"not the published file.*It has been removed"):
        hub.fetch(NAME)
    assert not part.exists()
    assert hub.fetch(NAME).read_bytes() == CONTENT


def test_a_server_that_sends_another_range(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    part = tmp_path / "cache" / "detectron2" / f"{publisher.publish(CONTENT, monkeypatch)}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT[:1000])
    publisher.wrong_range = True
    with pytest.raises(DownloadError, match="another part than asked for"):
        hub.fetch(NAME)
    assert hub.fetch(NAME).read_bytes() == CONTENT


def test_a_file_with_another_check_sum_is_removed(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = publisher.publish(CONTENT, monkeypatch)
    publisher.files[f"/base/{path}"] = b"something else"
    wanted = path[-10:-4]
    with pytest.raises(DownloadError, match=rf"sha256 [0-9a-f]{{64}} does not begin with {wanted}.*removed"):
        hub.fetch(NAME)
    folder = (tmp_path / "cache" / "detectron2" / path).parent
    assert [p for p in folder.iterdir() if p.suffix != ".lock"] == []


def test_a_missing_file_and_an_absent_server(publisher: Publisher, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"panoptic_fpn_R_50_3x/.*the server answered 404 Not Found"):
        hub.fetch(NAME)
    with pytest.raises(
        DownloadError, match=r"could not be reached \(.*put the file at .*model_final_c10459.pkl"
    ):
        hub.fetch(NAME, base_url="http://127.0.0.1:9")


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


def test_published_names_and_their_check_sums() -> None:
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
