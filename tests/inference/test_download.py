"""Images from addresses, on a server of this process."""

from __future__ import annotations

import io
import resource
import urllib.parse
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from panfpn_fast.inference import ImageReadError, download
from panfpn_fast.inference.download import download_image, is_address
from support.web import QuietHandler, serving

PHOTO = np.random.default_rng(3).integers(0, 256, (30, 50, 3), dtype=np.uint8)


def png() -> bytes:
    with io.BytesIO() as file:
        Image.fromarray(PHOTO).save(file, format="PNG")
        return file.getvalue()


class Site(QuietHandler):
    """Serves a photograph in several ways, and redirects to what follows `/to?`."""

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        path = urllib.parse.unquote(path)
        if path == "/to":
            self.send_response(302)
            self.send_header("Location", query)
            self.end_headers()
            return
        if path not in ("/photo.png", "/ein grüner.png", "/short.png", "/unsized.png"):
            self.send_error(404)
            return
        content = png()
        self.send_response(200)
        if path != "/unsized.png":
            self.send_header("Content-Length", str(len(content) + 7 * (path == "/short.png")))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with serving(Site, monkeypatch) as address:
        yield address


@pytest.mark.parametrize(
    "page",
    [
        "photo.png",
        "unsized.png",
        "ein grüner.png",
        "ein%20gr%C3%BCner.png",
        "photo.png?a=ü b#c",
        "to?/photo.png",
    ],
)
def test_images(site: str, page: str) -> None:
    np.testing.assert_array_equal(download_image(f"{site}/{page}"), PHOTO)


def test_upper_case(site: str) -> None:
    assert is_address("HTTPS://example.org/a.png")
    np.testing.assert_array_equal(download_image(f"HTTP{site[4:]}/photo.png"), PHOTO)


def check_error(
    address: str, reason: str, remedy: str = "download the file yourself and pass its path"
) -> None:
    with pytest.raises(ImageReadError) as caught:
        download_image(address)
    assert str(caught.value).startswith(f"{address}: ")
    assert reason in str(caught.value)
    assert str(caught.value).endswith(f"; {remedy}")


def test_a_download_that_breaks_off(site: str) -> None:
    size = len(png())
    check_error(f"{site}/short.png", f"the download broke off (got {size} of {size + 7} bytes)")


def test_large_files(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_MAX_BYTES", 1000)
    for page in ("photo.png", "unsized.png"):
        check_error(f"{site}/{page}", "the file has more than 1000 bytes")


def test_slow_downloads(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_MAX_SECONDS", -1.0)
    check_error(f"{site}/photo.png", "the download takes more than -1 seconds")


def test_redirects_leave_the_web_for_nothing(site: str) -> None:
    target = "ftp://127.0.0.1:9/a.png"
    check_error(f"{site}/to?{target}", f"it redirects to {target}", "check the address")


@pytest.mark.parametrize("address", ["http://", "http://[::1/a.png", "http://a\x00b/", "http://.ü/"])
def test_invalid_addresses(address: str) -> None:
    check_error(address, "the download failed", "check the address")


def test_a_full_disk_is_no_wrong_address(site: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(
            OSError, match=r"photo\.png: the download cannot be kept .*File too large.*set TMPDIR"
        ):
            download_image(f"{site}/photo.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
