"""Frame of the self-contained pages: no script, no network, images inside; text from outside is escaped."""

import base64
import html
import io

from PIL import Image

from common.console import escape_control
from common.errors import ConfigError
from common.storage.files import Location, read_bytes
from precompute.inspection import html_charts
from precompute.inspection.html_style import STYLE

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_MAX_HEAD_BYTES = 1000
_THUMBNAIL_PIXELS = 320


def check_page_destination(location: Location) -> None:
    """Checks that a page replaces nothing but an earlier one.

    Raises:
        ConfigError: there is another file, or a directory.
    """
    try:
        is_page = _POLICY.encode() in read_bytes(location)[:_MAX_HEAD_BYTES]
    except FileNotFoundError:
        return
    except OSError:
        is_page = False
    if not is_page:
        raise ConfigError(f"--html {location}: exists and is no page of this program; choose another name")


def render_document(title: str, heading: str, body: str, rules: str = "") -> str:
    """Returns a whole page.

    Args:
        title: of the window, not escaped yet.
        heading: above the page, not escaped yet.
        body: HTML.
        rules: CSS beside the common style sheet.
    """
    light, dark = html_charts.scale_css("light"), html_charts.scale_css("dark")
    style = f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{rules}{STYLE}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f"<header><h1>{escape(heading)}</h1></header><main>{body}</main>"
        "</body></html>\n"
    )


def thumbnail(picture: Image.Image, name: str) -> str:
    """Returns an image as HTML, scaled down in place; `name` is escaped already.

    The image is encoded again, so that nothing but its pixels gets into the page.
    """
    picture.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{name}" title="{name}">'


def escape(text: str) -> str:
    """Returns text escaped for any place in the page, with control characters spelled out."""
    return html.escape(escape_control(text))
