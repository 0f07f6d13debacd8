"""Values by which datasets give an image: a path, a data: URI, base64, encoded bytes, or an object with one of them."""

import base64
import binascii
import re
from typing import Any
from urllib.parse import unquote, urlsplit

from common.data.samples import ImageRef
from common.errors import DataError, describe_value

# How files of the readable formats begin. A text that decodes to one of these is base64, and no path.
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"\0\0\0")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")

_SOURCE_KEYS = ("bytes", "base64", "path", "image", "url", "image_url")


def parse_images(found: Any, where: str) -> tuple[ImageRef, ...]:
    """Returns the images of a value of `image` or `images`: one, a list, or nothing.

    Raises:
        DataError: the value of an image names none, or its address is on the web.
    """
    if found is None:
        return ()
    return tuple(parse_image(image, where) for image in (found if isinstance(found, list) else [found]))


def parse_image(found: Any, where: str) -> ImageRef:
    """Returns the image that a value gives. Raises DataError, as `parse_images`."""
    image = find_image(found, where)
    if image is None:
        raise DataError(f"{where}: image {describe_value(found)}; expected a path, bytes, base64 or a data: URI")
    return image


def find_image(found: Any, where: str) -> ImageRef | None:
    """Returns the image that a value gives, None if it gives none.

    An object gives it by one of the keys bytes, base64, path, image, url and image_url; a path beside bytes is a name.

    Raises:
        DataError: the address is on the web, the base64 is damaged, or two keys name different images.
    """
    if isinstance(found, bytes):
        return ImageRef(None, found) if found else None
    if isinstance(found, str):
        return _parse_text(found, where) if found else None
    if not isinstance(found, dict):
        return None
    images = [_parse_key(key, found[key], where) for key in _SOURCE_KEYS if found.get(key) not in (None, "", b"", {})]
    held = next((image for image in images if image is not None and image.data is not None), None)
    name = next((image for image in images if image is not None and image.data is None), None)
    for image in images:
        if image is not None and image not in (held, name):
            raise DataError(f"{where}: image {describe_value(found)} is given twice, and differently; keep one of them")
    return name if held is None else ImageRef(None if name is None else name.path, held.data)


def _parse_key(key: str, value: Any, where: str) -> ImageRef | None:
    if key in ("bytes", "base64") and isinstance(value, str):
        return ImageRef(None, _decode(value, where))
    return find_image(value, where)


def _parse_text(text: str, where: str) -> ImageRef:
    scheme = text[:8].lower().partition(":")[0]
    if scheme in ("http", "https"):
        raise DataError(
            f"{where}: image {describe_value(text)} is on the web, and nothing is downloaded; save the file below "
            "image_root, and give its path"
        )
    if scheme == "data":
        header, comma, content = text.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise DataError(f"{where}: image {describe_value(text)}; expected data:image/...;base64,...")
        return ImageRef(None, _decode(content, where))
    if scheme == "file":
        # file:///a/b.jpg and file://a/b.jpg; which folders are opened is checked where the file is.
        address = urlsplit(text)
        return ImageRef(unquote(("" if address.netloc == "localhost" else address.netloc) + address.path))
    if _BASE64.fullmatch(text) and (data := _find_file(text)) is not None:
        return ImageRef(None, data)
    return ImageRef(text)


def _find_file(text: str) -> bytes | None:
    """Returns the bytes of an image file in base64; None for another text, such as a path."""
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error:
        return None
    return data if data.startswith(_MAGIC) else None


def _decode(text: str, where: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise DataError(f"{where}: image {describe_value(text)} is no base64 ({error}); correct it") from error
