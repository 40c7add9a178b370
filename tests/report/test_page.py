"""The page in a real browser: every figure drawn, nothing in the console, sorted by a click, on a phone and in the dark."""

import shutil

import pytest

from safe_lab.report import read_source, write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()


@pytest.fixture
def show(browser, experiment, tmp_path):
    """Open the page of an experiment; what the console says is an error."""
    path = tmp_path / "page.html"
    path.write_text(write_page(read_source([experiment])))
    said, pages = [], []

    def open_page(**settings):
        page = browser.new_page(**settings)
        pages.append(page)
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on(
            "request",
            lambda request: (
                said.append(request.url) if not request.url.startswith(("file:", "data:", "blob:")) else None
            ),
        )
        page.goto(path.as_uri())
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not said


def count(page, selector):
    return page.locator(selector).count()


def test_every_figure_is_drawn_once_it_is_looked_at(show):
    page = show()
    for part in page.locator("details").all():
        if part.get_attribute("open") is None:
            part.locator("> summary").click()
    page.wait_for_function(
        "document.querySelectorAll('.chart').length == document.querySelectorAll('.chart .main-svg:first-child').length"
    )
    assert count(page, ".chart") >= 10
    # Each has something in it: a point, a line, an area or a map.
    marks = ".point, .js-line, .js-fill, .hm image, .points path"
    charts = "[...document.querySelectorAll('.chart')]"
    empty = page.evaluate(f"{charts}.filter(c => !c.querySelector('{marks}')).length")
    assert empty == 0


def test_a_click_on_a_heading_sorts(show):
    page = show()
    heading = page.locator("table.sortable th", has_text="memory peak")
    place = heading.evaluate("h => h.cellIndex")

    def values():
        return [
            float(text)
            for text in page.locator(f"table.sortable tbody td:nth-child({place + 1})").evaluate_all(
                "c => c.map(x => x.dataset.value)"
            )
        ]

    heading.locator("button").click()
    assert values() == sorted(values())
    heading.locator("button").click()
    assert values() == sorted(values(), reverse=True)
    assert heading.get_attribute("aria-sort") == "descending"


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_is_readable_at_every_width_and_in_both_themes(show, width, theme):
    page = show(viewport={"width": width, "height": 800}, color_scheme=theme)
    # Wide tables scroll by themselves, and the page does not.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (theme == "light")
    ink = page.evaluate("getComputedStyle(document.querySelector('.chart text')).fill")
    assert (ink == "rgb(27, 31, 36)") == (theme == "light")


def test_it_prints_all_of_it_on_white(show):
    page = show(color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert count(page, "details:not([open])") == 0
    page.set_viewport_size({"width": 794, "height": 1123})
    tables = "[...document.querySelectorAll('.scroll')]"
    assert page.evaluate(f"{tables}.every(part => part.scrollWidth <= part.clientWidth)")
