"""A real browser without a window."""

import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def chromium(url: str, *options: str, profile: Path) -> str:
    """Opens a page without a window and returns what the browser prints."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.fail(
            "no chromium was found; install it (apt install chromium), this test looks at the page in a browser"
        )
    fixed = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking")
    done = subprocess.run(
        [program, *fixed, f"--user-data-dir={profile}", *options, url],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


def count_colours(
    path: Path, profile: Path, *options: str, fragment: str = "", size: str = "1200,2400"
) -> Counter[str]:
    """Returns the number of pixels of each colour in a screenshot."""
    target = path.with_suffix(".png")
    chromium(f"file://{path}{fragment}", f"--screenshot={target}", f"--window-size={size}", *options, profile=profile)
    with Image.open(target) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    found, counts = np.unique(pixels, axis=0, return_counts=True)
    return Counter({"#" + bytes(c).hex(): int(n) for c, n in zip(found, counts, strict=True)})
