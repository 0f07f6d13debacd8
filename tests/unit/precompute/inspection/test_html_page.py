"""The page of an inspection, in a real browser."""

import html.parser
import io
import re
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.data.samples import ImageRef
from common.shards.manifest import shard_path
from precompute.inspection import html_charts
from precompute.inspection.collect import inspect_output
from precompute.inspection.html_page import MAX_TOKENS, NUM_SAMPLES, render_page
from tests.support.browser import chromium, count_colours
from tests.support.inspect_outputs import write_known_output, write_output

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;</style></title>"
PICTURE_RGB = (200, 30, 90)


def make_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), PICTURE_RGB).save(buffer, "PNG")
    return buffer.getvalue()


def render(output: Path) -> str:
    return render_page(inspect_output(output, num_samples=NUM_SAMPLES, max_tokens=MAX_TOKENS, progress=False))


class PageParser(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def attack_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of a sample that tries to be more than text."""
    root = tmp_path_factory.mktemp("page")
    images = (ImageRef(f"{ATTACK}.png", make_png()), ImageRef("broken.png", b"no image"), ImageRef("a/b.png"))
    write_known_output(root / "out", sample_id=ATTACK, answer=ATTACK, images=images)
    path = root / "page.html"
    path.write_text(render(root / "out"), "utf-8")
    return path


def test_the_page_requests_nothing_and_runs_nothing(attack_page: Path) -> None:
    source = attack_page.read_text("utf-8")
    found = PageParser(source)
    assert found.tags.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form", "video", "audio"})
    assert not [name for name, _ in found.attributes if name.startswith("on") or name in ("href", "action", "srcset")]
    sources = [value or "" for name, value in found.attributes if name == "src"]
    assert sources and all(value.startswith("data:image/jpeg;base64,") for value in sources)
    assert not re.search(r"https?://|url\(|@import", source)
    policies = [value for name, value in found.attributes if name == "content"]
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in policies


def test_text_that_looks_like_html_is_shown_as_text(attack_page: Path) -> None:
    found = PageParser(attack_page.read_text("utf-8"))
    # The attack is in the title of the sample and in its answer.
    assert found.text.count(ATTACK) == 2
    assert ("alt", f"{ATTACK}.png") in found.attributes


def test_images_that_cannot_be_shown_are_named(attack_page: Path) -> None:
    text = PageParser(attack_page.read_text("utf-8")).text
    assert "image broken.png, 8 bytes that are no image" in text
    assert "image a/b.png, not in the shard" in text


def test_text_on_every_step_of_a_scale_is_legible_and_steps_are_ordered() -> None:
    for theme, scales in html_charts.SCALES.items():
        for low, high in scales.values():
            steps = [
                html_charts.oklch(
                    *(a + i / (html_charts.NUM_LEVELS - 1) * (b - a) for a, b in zip(low, high, strict=True))
                )
                for i in range(html_charts.NUM_LEVELS)
            ]
            for step in steps:
                text = (0.0, 0.0, 0.0) if html_charts.text_colour(step) == "#000" else (1.0, 1.0, 1.0)
                assert html_charts.contrast(step, text) >= 4.5
            # Contrast to the page's background grows with each step.
            page_rgb = (1.0, 1.0, 1.0) if theme == "light" else (0.08, 0.09, 0.106)
            contrasts = [html_charts.contrast(step, page_rgb) for step in steps]
            assert contrasts == sorted(contrasts)
            assert contrasts[-1] > 5


def test_known_colours_in_oklch() -> None:
    # White, and the red that CSS Color 4 gives in OKLCH.
    assert html_charts.to_hex(html_charts.oklch(1, 0, 0)) == "#ffffff"
    assert html_charts.to_hex(html_charts.oklch(0.62796, 0.25768, 29.234)) == "#ff0000"


def test_ticks_are_few_round_and_inside() -> None:
    assert html_charts.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert html_charts.ticks(-23.9, 0) == [-20, -15, -10, -5, 0]
    assert html_charts.ticks(0.5, 3.5, whole=True) == [1, 2, 3]
    for low, high in ((0.0003, 3.1), (59, 451), (0.98, 1.0), (-1e-3, 2e-3)):
        found = html_charts.ticks(low, high)
        assert 3 <= len(found) <= 7
        width = high - low
        assert low - width / 50 <= found[0] and found[-1] <= high + width / 50


def test_every_distribution_has_a_histogram(tmp_path: Path) -> None:
    write_output(tmp_path, "dpo", num_samples=12, top_k=4)
    source = render(tmp_path)
    for name in ("kept mass", "entropy", "k", "own log-prob", "margin", "scored tokens", "length"):
        assert f'aria-label="histogram of {name},' in source
    assert source.count("<article>") == NUM_SAMPLES
    assert source.count("<h4>chosen</h4>") == source.count("<h4>rejected</h4>") == NUM_SAMPLES


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    images = (ImageRef("large.png", bytes(20_000_001)), *(ImageRef(f"{number}.png") for number in range(5)))
    write_known_output(tmp_path, images=images)
    text = PageParser(render(tmp_path)).text
    assert "image large.png, 20,000,001 bytes, too large for this page" in text
    assert "and 2 more images" in text


def test_damaged_shards_are_listed(tmp_path: Path) -> None:
    write_output(tmp_path)
    shard_path(tmp_path, 1).write_bytes(b"")
    text = PageParser(render(tmp_path)).text
    assert "Cannot be read" in text
    assert f"{shard_path(tmp_path, 1)}: has 0 bytes" in text


@pytest.mark.slow
def test_a_browser_shows_the_attack_as_text_and_runs_nothing(attack_page: Path, tmp_path: Path) -> None:
    found = PageParser(chromium(f"file://{attack_page}", "--dump-dom", profile=tmp_path))
    assert "script" not in found.tags
    assert found.text.count(ATTACK) == 2
    assert sum(name == "src" for name, _ in found.attributes) == 1
    # The last sections are there, so broken markup cut nothing off.
    assert "Provenance" in found.text and "own log-prob" in found.text and "rank 1 of 3 kept" in found.text


@pytest.mark.slow
@pytest.mark.parametrize(("theme", "by"), [("light", "e"), ("dark", "o")])
def test_a_browser_draws_the_heat_map_in_its_colours(attack_page: Path, tmp_path: Path, theme: str, by: str) -> None:
    # The legend has all colours, so it is hidden to leave those of the tokens. Room around the tokens shows their
    # background whatever the font, because the glyphs of a narrow token can cover nearly all of it.
    style = "<style>.legend{display:none!important}.t{padding:8px!important}</style></head>"
    source = attack_page.read_text("utf-8").replace("</head>", style)
    source = source.replace(' id="by-e" checked', ' id="by-e"').replace(f' id="by-{by}"', f' id="by-{by}" checked')
    path = tmp_path / "page.html"
    path.write_text(source, "utf-8")
    options = ["--blink-settings=preferredColorScheme=0"] if theme == "dark" else []
    found = count_colours(path, tmp_path / "profile", *options)

    scale = dict(re.findall(r"--([eo]\d+):(#[0-9a-f]{6})", html_charts.scale_css(theme)))
    steps = dict(zip("eo", zip(*re.findall(r'class="t (e\d+) (o\d+)', source), strict=True), strict=True))
    other = "o" if by == "e" else "e"
    assert len(steps["e"]) == 3
    for step in steps[by]:
        assert found[scale[step]] > 50, step
    # No colour of the other scale is drawn.
    assert not [step for step in steps[other] if found[scale[step]] > 50]
    assert found["#ffffff" if theme == "light" else "#14171b"] > 100_000
    # The bars of the histograms, and the stored image, whose colour JPEG changes slightly.
    assert found["#3f6fb5" if theme == "light" else "#7ea8e6"] > 1000
    near = sum(n for c, n in found.items() if np.abs(np.array([*bytes.fromhex(c[1:])]) - PICTURE_RGB).max() <= 3)
    assert near >= 64 * 48 * 0.9


@pytest.mark.slow
def test_a_focused_token_shows_its_alternatives(attack_page: Path, tmp_path: Path) -> None:
    source = attack_page.read_text("utf-8")
    (token,) = re.findall(r'id="(s0-0-2)"', source)
    path = tmp_path / "page.html"
    # The page is made so short that the browser does not scroll to the token.
    path.write_text(
        source.replace("</head>", "<style>.two,.charts,.wide{display:none!important}</style></head>"), "utf-8"
    )
    before = count_colours(path, tmp_path / "profile", size="1000,1000")
    after = count_colours(path, tmp_path / "profile", fragment=f"#{token}", size="1000,1000")
    # The heat map's background has the colour of the panel, so pixels of it exist before.
    assert after["#f5f7f9"] > before["#f5f7f9"] + 50_000


@pytest.mark.slow
def test_the_policy_makes_the_browser_stop_scripts_and_requests(attack_page: Path, tmp_path: Path) -> None:
    requests = []
    server = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                requests.append(connection.recv(4096))
                connection.sendall(b"HTTP/1.0 404 Not Found\r\n\r\n")

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.getsockname()[1]}/"
    smuggled = f'<img src="{address}"><script>document.title = "ran"</script></body>'
    source = attack_page.read_text("utf-8").replace("</body>", smuggled)
    assert smuggled in source
    results = {}
    try:
        for name, text in {
            "as it is": source,
            "without its policy": re.sub("<meta http-equiv[^>]*>", "", source),
        }.items():
            path = tmp_path / "page.html"
            path.write_text(text, "utf-8")
            requests.clear()
            dom = chromium(f"file://{path}", "--dump-dom", profile=tmp_path / "profile")
            results[name] = (len(requests) > 0, "<title>ran</title>" in dom)
    finally:
        server.close()
    assert results == {"as it is": (False, False), "without its policy": (True, True)}
