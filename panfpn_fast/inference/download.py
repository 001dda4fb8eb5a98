"""Reads images from addresses on the web."""

from __future__ import annotations

import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import quote, urlsplit, urlunsplit

from panfpn_fast._errors import OutputError
from panfpn_fast.data.images import ImageArray, ImageReadError, read_image

# As large as an uncompressed image of the most pixels that Pillow reads.
_MAX_BYTES = 2**29
_MAX_SECONDS = 300.0
# How long a server may be silent.
_TIMEOUT_S = 30.0
_REMEDY = "download the file yourself and pass its path"
# Characters that stay as they are, besides letters and digits. % is one because the address may already be quoted.
_SAFE = "/%:@!$&'()*+,;=~?[]"


def is_address(source: object) -> bool:
    """Whether a source is an address, which begins with http:// or https:// in upper or lower case."""
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


@contextmanager
def downloaded(address: str) -> Iterator[Path]:
    """Downloads a file to a folder of temporary files, and removes it at the end of the `with` block.

    An `ImageReadError` in the block names the address instead of the file.

    Raises:
        ImageReadError: If the download fails, is too large or too slow; the message names the address.
        OutputError: If the folder of temporary files cannot be written to.
    """
    with ExitStack() as stack:
        try:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory()), "download")
            with open(path, "wb") as file:
                file.writelines(_chunks(address))
        except ImageReadError:
            raise
        except OSError as error:
            raise OutputError(
                f"{address}: the download cannot be kept in the folder of temporary files ({error.strerror or error}); "
                "set TMPDIR to a folder with free space"
            ) from error
        try:
            yield path
        except ImageReadError as error:
            raise ImageReadError(str(error).replace(str(path), address)) from None


def download_image(address: str) -> ImageArray:
    """Reads the image at an address.

    Returns:
        uint8 RGB [H, W, 3].

    Raises:
        ImageReadError: If the download fails, is too large or too slow, or is not an image; the message names the
            address.
        OutputError: If the folder of temporary files cannot be written to.
    """
    with downloaded(address) as path:
        return read_image(path)


def _chunks(address: str) -> Iterator[bytes]:
    """Downloads a file piece by piece."""
    size, end = 0, time.monotonic() + _MAX_SECONDS
    try:
        # Some servers refuse Python's own name.
        request = urllib.request.Request(_quoted(address), headers={"User-Agent": "panfpn_fast"})
        response: Any = urllib.request.build_opener(_Redirects).open(request, timeout=_TIMEOUT_S)
    except (OSError, ValueError, HTTPException) as error:  # ValueError: an invalid address
        raise ImageReadError(f"{address}: the download failed ({error}); check the address") from error
    with response:
        while True:
            try:
                chunk = response.read1(2**16)
            except (OSError, HTTPException) as error:
                raise ImageReadError(f"{address}: the download broke off ({error}); {_REMEDY}") from error
            if not chunk:
                break
            size += len(chunk)
            if size > _MAX_BYTES:
                raise ImageReadError(f"{address}: the file has more than {_MAX_BYTES} bytes; {_REMEDY}")
            if time.monotonic() > end:
                raise ImageReadError(
                    f"{address}: the download takes more than {_MAX_SECONDS:.0f} seconds; {_REMEDY}"
                )
            yield chunk
        if response.length:  # how much of Content-Length is left
            raise ImageReadError(
                f"{address}: the download broke off (got {size} of {size + response.length} bytes); {_REMEDY}"
            )


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to other web pages only; urllib follows those to ftp:// too."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """Returns the request for the new address."""
        if not is_address(newurl):
            raise URLError(f"it redirects to {newurl}, which begins with neither http:// nor https://")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _quoted(address: str) -> str:
    """Returns an address in ASCII, as servers take it."""
    parts = urlsplit(address)
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode("ascii")
    return urlunsplit((parts.scheme, host, quote(parts.path, _SAFE), quote(parts.query, _SAFE), ""))
