"""Published checkpoints by name: downloaded once, checked, kept."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from panfpn_fast._cache import cache_dir

BASE_URLS = {
    "detectron2": "https://dl.fbaipublicfiles.com/detectron2",
    "mmdetection": "https://download.openmmlab.com/mmdetection",
}
"""Where each framework's files are, by what its checkpoints' names begin with."""

_MMDETECTION = {
    "panoptic_fpn_r50_fpn_1x_coco": "20210821_101153-9668fd13",
    "panoptic_fpn_r50_fpn_mstrain_3x_coco": "20210824_171155-5650f98b",
    "panoptic_fpn_r101_fpn_1x_coco": "20210820_193950-ab9157a2",
    "panoptic_fpn_r101_fpn_mstrain_3x_coco": "20210823_114712-9c99acc4",
}

PUBLISHED: dict[str, str] = {
    f"detectron2://COCO-PanopticSegmentation/{path.split('/')[0]}": f"COCO-PanopticSegmentation/{path}"
    for path in (
        "panoptic_fpn_R_50_1x/139514544/model_final_dbfeb4.pkl",
        "panoptic_fpn_R_50_3x/139514569/model_final_c10459.pkl",
        "panoptic_fpn_R_101_3x/139514519/model_final_cafdb1.pkl",
    )
} | {
    f"mmdetection://{name}": f"v2.0/panoptic_fpn/{name}/{name}_{version}.pth"
    for name, version in _MMDETECTION.items()
}
"""Names, and their files' paths below :data:`BASE_URLS`. A file's name ends in the beginning of its sha256."""

BACKBONES: dict[str, str] = {
    f"detectron2://{path}": path
    for path in ("ImageNetPretrained/MSRA/R-50.pkl", "ImageNetPretrained/MSRA/R-101.pkl")
}
"""The same for ResNets trained on ImageNet, which training begins with; their names have no check sum."""

_CHUNK = 1 << 20
_TIMEOUT_S = 30.0


class DownloadError(OSError):
    """A checkpoint could not be downloaded; the message names the address, the reason and what to do."""


def fetch(name: str, cache: str | os.PathLike[str] | None = None, base_url: str | None = None) -> Path:
    """Returns a published checkpoint's file, downloading it if it is not there yet.

    An interrupted download goes on where it stopped. A file whose name has digits of its sha256, as all in
    :data:`PUBLISHED` have, gets that name only if it begins with them.

    Args:
        name: a key of :data:`PUBLISHED` or :data:`BACKBONES`, for example
            ``"detectron2://COCO-PanopticSegmentation/panoptic_fpn_R_50_3x"``.
        cache: the folder to keep it in; None: :func:`panfpn_fast._cache.cache_dir`.
        base_url: where the framework's files are; None: ``$PANFPN_DETECTRON2_URL`` or ``$PANFPN_MMDETECTION_URL``
            (a mirror), else :data:`BASE_URLS`.

    Returns:
        The file's path.

    Raises:
        ValueError: no checkpoint has that name; the message lists those there are.
        DownloadError: the server could not be reached or lacks the file, the connection broke, or the file
            that came is not the published one.
    """
    known = PUBLISHED | BACKBONES
    if name not in known:
        raise ValueError(f"unknown checkpoint {name!r}; known checkpoints: {', '.join(known)}")
    path = known[name]
    framework = name.partition("://")[0]
    base_url = base_url or os.environ.get(f"PANFPN_{framework.upper()}_URL") or BASE_URLS[framework]
    url = f"{base_url.rstrip('/')}/{path}"
    target = (Path(cache) if cache is not None else cache_dir()) / framework / path
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with _locked(target.with_name(target.name + ".lock")):
        if not target.is_file():  # another process may have fetched it meanwhile
            _download(url, part, target)
            if name in PUBLISHED:
                _verify(url, part)
            part.replace(target)
    return target


def _download(url: str, part: Path, target: Path) -> None:
    """Completes ``part``: what it holds already is asked for no more if the server can leave it out."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "panfpn_fast"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:  # nothing lies beyond what we have
            if error.headers.get("Content-Range") != f"bytes */{have}":
                part.unlink()
                _download(url, part, target)
            return
        raise DownloadError(f"{url}: the server answered {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise DownloadError(
            f"{url}: could not be reached ({reason}). Without a connection, put the file at {target} by hand."
        ) from error
    with response:
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise DownloadError(f"{url}: the server answered with another part than asked for; try again")
        length = response.headers.get("Content-Length")
        _receive(url, response, part, have if resumed else 0, int(length) if length else None)


def _receive(
    url: str, response: http.client.HTTPResponse, part: Path, start: int, length: int | None
) -> None:
    total = start + length if length is not None else None
    with (
        part.open("ab" if start else "wb") as file,
        tqdm(desc=url.rsplit("/", 1)[-1], initial=start, total=total, unit="B", unit_scale=True) as bar,
    ):
        reason = ""
        while True:
            try:
                chunk = response.read(_CHUNK)
            except (OSError, http.client.HTTPException) as error:
                # What did arrive with a broken connection is good; the next attempt goes on behind it.
                chunk = getattr(error, "partial", b"")
                reason = f" ({error})"
            file.write(chunk)
            bar.update(len(chunk))
            if not chunk or reason:
                break
        received = file.tell()
    if reason or (total is not None and received != total):
        raise DownloadError(
            f"{url}: the connection broke after {received} of {total or 'unknown'} bytes{reason}. "
            f"They are kept in {part}; the next attempt goes on from there."
        )


def _verify(url: str, part: Path) -> None:
    match = re.search(r"[-_]([0-9a-f]{6,})\.\w+$", url)
    if match is None:
        raise ValueError(f"{url}: the file's name ends in no check sum")
    digest = hashlib.sha256()
    with part.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if not digest.hexdigest().startswith(match[1]):
        part.unlink()
        raise DownloadError(
            f"{url}: what came is not the published file: its sha256 {digest.hexdigest()} does not begin "
            f"with {match[1]}. It has been removed; try again."
        )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lets one process at a time download a file (several start at once under torchrun)."""
    try:
        import fcntl
    except ImportError:  # Windows: two downloads at once would be caught by the check sum
        yield
        return
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
