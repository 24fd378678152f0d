"""The documentation as a site: built as it is published, its links followed, its pages opened in a browser.

Nothing is fetched: a server on this machine hands out the pages, and whatever asks for another host fails the test.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from filelock import FileLock

from tests.browser import CHROMIUM, FLAGS

pytestmark = pytest.mark.skipif(
    not (find_spec("material") and find_spec("mkdocstrings")),
    reason="what builds the documentation is not installed: pip install -e '.[docs]'",
)
ROOT = Path(__file__).parent.parent
WIDE, NARROW = 1200, 400  # pixels: a laptop, a telephone
LETTERS = 7  # pixels: the smallest in a picture of the gallery
BUILD = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once however many processes share the tests."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    folder = shared / "site"
    with FileLock(shared / "site.lock"):
        if not folder.exists():
            made = folder.with_name("site-in-the-making")
            environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
            done = subprocess.run([*BUILD, str(made)], cwd=ROOT, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            made.rename(folder)
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    """By their address within the site."""
    found = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    return {name: Page((site / name).read_text(encoding="utf-8")) for name in found if name != "404.html"}


LOADED = {("img", "src"), ("script", "src"), ("link", "href"), ("iframe", "src"), ("source", "srcset")}


class Page(HTMLParser):
    """What a page can be pointed at by, what it points at, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = {""}
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value or "")
            elif (tag, name) in LOADED:
                self.loaded.append(value or "")
            elif tag == "a" and name == "href":
                self.links.append(value or "")
        if tag == "img":
            self.pictures.append(dict(attrs))


# ---------------------------------------------------------------------------------------------- what is linked


def broken(site: Path, pages: dict[str, Page]) -> list[str]:
    """What is pointed at within the site and not there."""
    found = []
    for name, page in pages.items():
        for target in page.links + page.loaded:
            place = urlsplit(urljoin(f"http://site/{name}", target))
            if place.netloc != "site":
                continue
            path = unquote(place.path).lstrip("/") or "index.html"
            anchored = path not in pages or unquote(place.fragment) in pages[path].anchors
            if not (site / path).is_file() or not anchored:
                found.append(f"{name}: {target}")
    return found


def test_no_link_within_the_site_is_broken(site: Path, pages: dict[str, Page]) -> None:
    assert sum(len(page.links) for page in pages.values()) > 1000
    assert broken(site, pages) == []


def test_broken_links_are_found(site: Path, pages: dict[str, Page]) -> None:
    html = '<a href="none.html">a</a> <a href="routing.html#none">b</a> <a href="routing.html#routing">c</a>'
    page = Page(
        f'{html} <img src="images/none.svg"> <a href="https://example.org/none">elsewhere</a> <a href="#x">d</a>'
    )
    found = broken(site, {"page.html": page, "routing.html": pages["routing.html"]})
    assert found == [f"page.html: {name}" for name in ("none.html", "routing.html#none", "#x", "images/none.svg")]


def test_pages_load_nothing_from_elsewhere(site: Path, pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        assert not [address for address in page.loaded if urlsplit(address).netloc], name
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()\s*['\"]?(?:https?:)?//[^)'\"]*", sheet.read_text(encoding="utf-8"))


def test_every_picture_says_what_it_shows(pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        assert all(picture.get("alt") for picture in page.pictures), name


def test_the_front_page_leads_everywhere(pages: dict[str, Page]) -> None:
    """By its own tables, not by the menu that every page has; to the first page where a folder has several."""
    text = re.sub(r"<!--.*?-->", "", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    own = {f"{link}.html" for link in re.findall(r"\]\(([\w/-]+)\.md\)", text)}
    assert {name for name in pages if "/" not in name} - own == {"index.html"}
    assert {name.split("/")[0] for name in pages if "/" in name} <= {link.split("/")[0] for link in own}


# ---------------------------------------------------------------------------------------------- in a browser

# One page after the other in a frame of the driver's, which may be as narrow as a telephone: measured, made narrow, and
# measured again, and never painted. The browser waits for the picture `hold`, and so for the last page.
DRIVER = """<!DOCTYPE html><title>driver</title><link rel="icon" href="data:,"><body><img src="/hold" alt="">
<iframe style="border: 0; height: 1000px; visibility: hidden"></iframe>
<script>
const frame = document.querySelector("iframe");
const scrolls = e => ["auto", "scroll"].includes(frame.contentWindow.getComputedStyle(e).overflowX);

// What reaches out of the window and not out of a box that scrolls.
function stickingOut(page) {
  const parts = page.querySelectorAll("article *, footer *, header .md-header__title");
  return [...parts].filter(e => {
    const box = e.getBoundingClientRect();
    if (!box.width || box.right <= frame.contentWindow.innerWidth + 0.5) return false;
    for (let p = e.parentElement; p && p !== page.body; p = p.parentElement) if (scrolls(p)) return false;
    return true;
  }).slice(0, 3).map(e => e.outerHTML.slice(0, 120));
}

// Is a part of a picture not seen: is it out of shape, or does it reach out of its card or of a box within?
function cut(picture) {
  const box = picture.getBoundingClientRect(), card = picture.closest("li");
  if (Math.abs(box.height / box.width - picture.naturalHeight / picture.naturalWidth) > 0.01) return true;
  for (let p = picture.parentElement; ; p = p.parentElement) {
    const around = p.getBoundingClientRect();
    const beyond = [around.left - box.left, around.top - box.top, box.right - around.right, box.bottom - around.bottom];
    if (Math.max(...beyond) > 0.5) return true;
    if (p === card) return false;
  }
}

function measured() {
  const view = frame.contentWindow, page = frame.contentDocument, root = page.documentElement;
  const pictures = [...page.images], gallery = [...page.querySelectorAll(".gallery img")];
  const grid = page.querySelector(".gallery ul");
  return {
    window: view.innerWidth,
    document: Math.max(root.scrollWidth, page.body.scrollWidth),
    stickingOut: stickingOut(page),
    unloaded: pictures.filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.src),
    elsewhere: view.performance.getEntriesByType("resource").map(entry => entry.name)
      .filter(name => !name.startsWith(location.origin) && !name.startsWith("data:")),
    columns: grid && view.getComputedStyle(grid).gridTemplateColumns.split(" ").length,
    gallery: gallery.map(i => [i.getAttribute("src"), i.getBoundingClientRect().width]),
    cut: gallery.filter(cut).map(i => i.getAttribute("alt")),
  };
}

async function run() {
  const found = {};
  for (const name of PAGES) {
    frame.style.width = WIDTHS[0] + "px";
    await new Promise(done => { frame.onload = done; frame.src = "/" + name; });
    found[name] = [];
    for (const width of WIDTHS) {
      frame.style.width = width + "px";
      found[name].push(measured());
    }
  }
  return found;
}
run().catch(error => ({ failed: String(error) })).then(
  found => fetch("/found", { method: "POST", body: JSON.stringify(found) }));
</script></body>"""
# A page of which everything is wrong that a page is held to.
BROKEN = """<!DOCTYPE html><meta charset="utf-8"><link rel="icon" href="data:,"><article>
<p style="width: 900px">too wide</p><div style="overflow-x: auto"><p style="width: 900px">in a box</p></div>
<img src="none.svg" alt="none"><img src="https://example.org/none.png" alt="elsewhere"></article>
<div class="gallery"><ul style="width: 300px">
<li><img src="images/card-cost.svg" alt="whole" style="display: block; width: 100%"></li>
<li><p style="height: 90px; overflow: hidden"><img src="images/card-cost.svg" alt="cut" style="width: 100%"></p></li>
<li style="height: 90px"><img src="images/card-cost.svg" alt="out of its card" style="width: 100%"></li>
<li><img src="images/card-cost.svg" alt="cropped" style="width: 100%; height: 90px; object-fit: cover"></li></ul></div>
<script>console.warn("broken.html complains")</script>"""


class Server(ThreadingHTTPServer):
    """Hands out a folder, the broken page and the driver of all pages, and takes in what the driver found."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        driver = DRIVER.replace("PAGES", json.dumps(names)).replace("WIDTHS", json.dumps([WIDE, NARROW]))
        self.made = {"/driver": driver, "/broken.html": BROKEN}
        self.missing: list[str] = []
        self.found: Any = None
        self.complete = threading.Event()


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.path == "/hold":
            self.server.complete.wait(240)
            self._answer('<svg xmlns="http://www.w3.org/2000/svg"/>', "image/svg+xml")
        elif self.path in self.server.made:
            self._answer(self.server.made[self.path], "text/html")
        else:
            super().do_GET()

    def do_POST(self) -> None:
        self.server.found = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer("", "text/plain")
        self.server.complete.set()

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        if code >= 400:
            self.server.missing.append(self.path)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: what is missing is remembered."""

    def _answer(self, text: str, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())


class Seen(NamedTuple):
    """What a browser saw: of each page, wide and narrow; its console's lines; what it asked the server for in vain."""

    pages: dict[str, list[dict[str, Any]]]
    console: list[str]
    missing: list[str]


@pytest.fixture(scope="module")
def seen(site: Path, pages: dict[str, Page], tmp_path_factory: pytest.TempPathFactory) -> Seen:
    if CHROMIUM is None:
        pytest.skip("there is no chromium here")
    server = Server(site, [*pages, "broken.html"])
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    flags = [*FLAGS.split(), "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    flags += [f"--user-data-dir={tmp_path_factory.mktemp('profile')}", f"--window-size={WIDE + 100},1400"]
    command = [CHROMIUM, *flags, "--dump-dom", f"http://127.0.0.1:{server.server_port}/driver"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    finally:
        server.complete.set()
        server.shutdown()
        server.server_close()
        thread.join()
    assert isinstance(server.found, dict), "the browser ended before it had seen all pages"
    assert "failed" not in server.found, server.found
    return Seen(server.found, [line for line in done.stderr.splitlines() if "CONSOLE" in line], server.missing)


def test_a_browser_shows_every_page_wide_and_narrow(seen: Seen, pages: dict[str, Page]) -> None:
    assert set(seen.pages) == {*pages, "broken.html"}
    for name in pages:
        for found, width in zip(seen.pages[name], (WIDE, NARROW), strict=True):
            assert found["window"] == width
            assert found["document"] <= width, (name, width)
            assert found["stickingOut"] == [], (name, width)
            assert found["unloaded"] == [], name
            assert found["elsewhere"] == [], name


def test_a_browser_has_nothing_to_complain_about_but_the_broken_page(seen: Seen) -> None:
    assert seen.missing == ["/none.svg"]
    assert [line for line in seen.console if "broken.html" not in line] == []
    wide, narrow = seen.pages["broken.html"]
    assert len(seen.console) == 1
    assert (len(wide["stickingOut"]), len(narrow["stickingOut"])) == (0, 1)
    assert narrow["document"] > NARROW
    assert len(wide["unloaded"]) == 2
    assert wide["elsewhere"] == ["https://example.org/none.png"]
    assert wide["cut"] == narrow["cut"] == ["cut", "out of its card", "cropped"]


def letters_of(picture: Path) -> float:
    """The smallest letters as a share of the width; matplotlib draws them as glyphs, at a hundredth of their size."""
    text = picture.read_text(encoding="utf-8")
    sizes = [100 * float(scale) for scale in re.findall(r"scale\(([\d.]+) -[\d.]+\)", text)]
    sizes += [float(size) for size in re.findall(r"font(?:-size)?[:=][\s\"]*([\d.]+)", text)]
    (box,) = re.findall(r'<svg[^>]* viewBox="[\d.]+ [\d.]+ ([\d.]+) ', text)
    return min(sizes) / float(box)


def test_the_gallery_is_read_on_a_telephone_and_seen_at_a_glance_on_a_desk(seen: Seen, site: Path) -> None:
    wide, narrow = seen.pages["index.html"]
    assert wide["columns"] >= 3
    assert narrow["columns"] == 1
    assert len(narrow["gallery"]) == len(wide["gallery"]) >= 12
    assert wide["cut"] == narrow["cut"] == []
    for name, width in narrow["gallery"] + wide["gallery"]:
        assert letters_of(site / name) * width >= LETTERS, f"{name} is {width} pixels wide"
