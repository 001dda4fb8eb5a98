"""Downloads published checkpoints by name, checks them and keeps them in a cache directory."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pooch
from filelock import FileLock

from panfpn_fast._errors import similar
from panfpn_fast._files import cache_dir
from panfpn_fast.models.config import presets

BASE_URLS = {
    "detectron2": "https://dl.fbaipublicfiles.com/detectron2",
    "mmdetection": "https://download.openmmlab.com/mmdetection",
}
"""Address of each framework's files; the keys are the prefixes of its checkpoint names."""

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
"""Maps names to paths below `BASE_URLS`. The first digits of a file's SHA-256 are the end of its stem."""

BACKBONES: dict[str, str] = {
    f"detectron2://{path}": path
    for path in ("ImageNetPretrained/MSRA/R-50.pkl", "ImageNetPretrained/MSRA/R-101.pkl")
}
"""Maps names of ImageNet-trained ResNets, from which training starts, to paths. Their file names have no checksum."""

SHORT: dict[str, str] = {name.rpartition("/")[2]: name for name in PUBLISHED}
"""Maps the last parts of the names of published checkpoints, such as "panoptic_fpn_R_50_3x", to the names."""

_CHUNK = 1 << 20
_TIMEOUT_S = 30.0
_RETRIES = 2


class DownloadError(OSError):
    """A checkpoint could not be downloaded; the message names the address, the reason and a remedy."""


def find(path_or_name: str | os.PathLike[str]) -> Path:
    """Returns the file of a checkpoint; a name, which has "://" or is short, is passed to `fetch`.

    Args:
        path_or_name: A file, or a name for `fetch`, or its last part, such as "panoptic_fpn_R_50_3x". A file of that
            name comes first. A leading `~` is the home directory.

    Raises:
        TypeError: If the argument is not a string or path.
        FileNotFoundError: If the file does not exist.
        IsADirectoryError: If the path is a folder.
        ValueError, DownloadError: See `fetch`.
    """
    name = os.fspath(path_or_name)
    if not isinstance(name, str):
        raise TypeError(f"path_or_name: expected a string or path, got {type(name).__name__}")
    if "://" in name:
        return fetch(name)
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        [inside] = sorted(path.glob("*.pth"))[:1] or [path / "model.pth"]
        raise IsADirectoryError(f"{name or '.'}: expected a checkpoint file, such as {inside}, got a folder")
    if path.exists():
        return path
    if name in SHORT:
        return fetch(SHORT[name])
    if name in presets:
        raise FileNotFoundError(
            f"{name}: no such file. This is the name of a preset, which has no trained weights; "
            f"PanopticFPN.from_config({name!r}) makes the network"
        )
    raise FileNotFoundError(
        f"{name}: no such file; a published checkpoint has a name such as {similar(name, PUBLISHED, 1)}"
    )


def fetch(name: str, cache: str | os.PathLike[str] | None = None, base_url: str | None = None) -> Path:
    """Returns the file of a published checkpoint; downloads it unless it is in the cache.

    The file appears in the cache only when it is complete and, for the names in `PUBLISHED`, when its SHA-256 begins
    with the digits in its file name. Processes that ask for the same file at the same time download it once.

    Args:
        name: A key of `PUBLISHED` or `BACKBONES`, for example
            `"detectron2://COCO-PanopticSegmentation/panoptic_fpn_R_50_3x"`.
        cache: Cache directory; None selects `$PANFPN_CACHE`, else `$XDG_CACHE_HOME/panfpn_fast`, else
            `~/.cache/panfpn_fast`.
        base_url: Address of the framework's files; None selects the mirror in `$PANFPN_DETECTRON2_URL` or
            `$PANFPN_MMDETECTION_URL`, else `BASE_URLS`.

    Returns:
        The path of the file.

    Raises:
        ValueError: If no checkpoint has that name; the message has similar names.
        DownloadError: If there is no writable cache directory, the server cannot be reached or does not have the file,
            the connection breaks, or the downloaded file is not the published one. Each download is tried three times.
    """
    known = PUBLISHED | BACKBONES
    if name not in known:
        if name.startswith(("http://", "https://", "ftp://", "s3://", "file://")):
            raise ValueError(f"{name}: an address, not a name; download the file and pass its path")
        raise ValueError(f"unknown checkpoint {name!r}; similar names: {similar(name, known, 2)}")
    path = known[name]
    framework = name.partition("://")[0]
    base_url = base_url or os.environ.get(f"PANFPN_{framework.upper()}_URL") or BASE_URLS[framework]
    url = f"{base_url.rstrip('/')}/{path}"
    remedy = "or download the file by hand and pass its path."
    try:
        target = (Path(cache) if cache is not None else cache_dir()) / framework / path
        if target.is_file():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        raise DownloadError(
            f"{url}: no cache directory ({error}). Set PANFPN_CACHE to a writable directory, {remedy}"
        ) from error
    files = pooch.create(
        target.parent, url.removesuffix(target.name), registry={target.name: None}, retry_if_failed=_RETRIES
    )
    try:
        with FileLock(f"{target}.lock"):
            files.fetch(target.name, downloader=_downloader(_digits(target) if name in PUBLISHED else ""))
    # NotImplementedError: the file system has no locks.
    except (OSError, ValueError, NotImplementedError) as error:
        raise DownloadError(
            f"{url}: the download to {target} failed ({_reason(error)}). Try again, {remedy}"
        ) from error
    return target


def _digits(path: Path) -> str:
    """Returns the digits of the SHA-256 at the end of a file's stem."""
    match = re.search(r"[-_]([0-9a-f]{6,})$", path.stem)
    if match is None:
        raise ValueError(f"{path.name}: the file name does not end in digits of a SHA-256")
    return match[1]


def _downloader(digits: str) -> Callable[[str, str, object], None]:
    """Returns a downloader for pooch, which itself compares whole checksums only."""
    http = pooch.HTTPDownloader(progressbar=True, chunk_size=_CHUNK, timeout=_TIMEOUT_S)

    def download(url: str, output: str, files: object) -> None:
        http(url, output, files)
        digest = pooch.file_hash(output)
        if not digest.startswith(digits):
            raise ValueError(f"SHA-256 {digest} does not begin with {digits}, so the file was deleted")
        # pooch's temporary file is readable only by its owner, but users can share a cache directory.
        os.chmod(output, 0o644)

    return download


def _reason(error: BaseException) -> str:
    """Returns the message of the first cause, which requests and urllib3 wrap several times."""
    if error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)
