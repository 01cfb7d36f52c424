"""The report in a real browser, opened from disk: nothing missing, loaded or cut off."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

pytestmark = [pytest.mark.eval, pytest.mark.browser]

SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def executable(playwright):
    """The system's Chromium, or else the one that `playwright install chromium` has fetched."""
    own = playwright.chromium.executable_path
    found = next(filter(None, map(shutil.which, NAMES)), own if Path(own).exists() else None)
    return found or pytest.skip(
        "no Chromium is installed: apt-get install chromium, or playwright install chromium"
    )


@pytest.fixture(scope="module")
def browser():
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed: pip install playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=executable(playwright))
        yield running
        running.close()


@pytest.fixture(scope="module")
def report(sweep, model_name, tmp_path_factory):
    """A page of two models, with every part that there is."""
    return sweep(
        tmp_path_factory.mktemp("browser") / "out",
        models=(model_name, "qwen2_vl"),
        methods=("vtc_cls", "shortv"),
        keeps=(0.5, 0.06),
        pictures=1,
    ).report


@pytest.fixture(scope="module", params=SIZES)
def opened(browser, report, request):
    """A page with what it said and asked for."""
    width, height = SIZES[request.param]
    page = browser.new_page(viewport={"width": width, "height": height})
    page.said, page.asked = [], []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("request", lambda asked: page.asked.append(asked.url))
    page.goto(report.as_uri())
    yield page
    page.close()


def test_nothing_goes_wrong_and_nothing_is_loaded(opened, report):
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith("data:")] == [report.as_uri()]


def test_it_is_small_enough_to_be_sent(report):
    assert report.stat().st_size <= 5_000_000


def test_all_pictures_are_there(opened):
    found = opened.evaluate(
        "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth, () => 0)))"
    )
    assert len(found) > 20 and all(width > 0 for width in found)


def test_the_page_is_not_wider_than_the_screen(opened):
    def widths():
        return opened.evaluate(
            "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )

    assert widths()[0] <= widths()[1]
    opened.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert widths()[0] <= widths()[1]


def test_letters_are_large_enough(opened):
    """Of text; letters in figures are scaled with them."""
    sizes = opened.evaluate(
        """[...document.querySelectorAll('main *')]
        .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
        .map(e => parseFloat(getComputedStyle(e).fontSize))"""
    )
    assert min(sizes) >= 11
    scales = opened.evaluate(
        """[...document.querySelectorAll('.plots img')]
        .filter(i => i.checkVisibility()).map(i => i.clientWidth / i.naturalWidth)"""
    )
    # of 9 points, 12 pixels
    assert scales and min(scales) * 12 >= 9


def test_one_model_is_shown_at_a_time_or_all(opened):
    def shown():
        return set(
            opened.evaluate(
                "[...document.querySelectorAll('.of:not([hidden])')].map(p => p.dataset.model)"
            )
        )

    assert shown() == {"llava"}
    opened.get_by_role("button", name="qwen2_vl").click()
    assert shown() == {"qwen2_vl"}
    opened.get_by_role("button", name="all").click()
    assert shown() == {"llava", "qwen2_vl"}
    opened.get_by_role("button", name="llava").click()


def test_every_keep_can_be_chosen_by_kind(opened):
    for keep in ("0.5", "0.06"):
        opened.locator(".of:not([hidden]) select.keep").first.select_option(keep)
        visible = opened.locator(".heats > div:visible")
        assert [d.get_attribute("data-keep") for d in visible.all()] == [keep]


def test_a_click_on_a_heading_sorts_by_it(opened):
    table = opened.locator("table.main:visible").first
    head = table.locator("thead th", has_text="accuracy").first
    column = head.evaluate("h => h.cellIndex")

    def values():
        cells = table.locator("tbody tr").evaluate_all(
            "(rows, column) => rows.map(r => r.cells[column].textContent)", column
        )
        return [float(cell.split(" ")[0]) for cell in cells]

    before = values()
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert values() == sorted(before, reverse=True)
    head.get_by_role("button").press("Enter")
    assert values() == sorted(before)


def test_a_command_can_be_copied(opened):
    row = opened.locator("table.main:visible tbody tr").first
    button, command = row.get_by_role("button", name="copy"), row.locator("code").inner_text()
    button.click()
    assert command.startswith("vtc trace . --model llava")
    assert opened.evaluate("getSelection().toString()").strip() == command


def test_the_keyboard_reaches_results_first(opened):
    opened.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    opened.keyboard.press("Tab")
    first = opened.evaluate("document.activeElement.textContent")
    assert opened.evaluate("document.activeElement.tagName") in ("A", "BUTTON", "DIV")
    assert first


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(opened, scheme):
    """WCAG 2.2, 1.4.3: by 4.5 to 1."""
    opened.emulate_media(color_scheme=scheme)
    pairs = opened.evaluate(
        """[...document.querySelectorAll('main *, header *')]
        .filter(e => e.checkVisibility())
        .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
        .map(e => {
          const behind = (b) => getComputedStyle(b).backgroundColor;
          let b = e;
          while (b.parentElement && behind(b) === 'rgba(0, 0, 0, 0)') b = b.parentElement;
          return [getComputedStyle(e).color, behind(b)];
        })"""
    )
    opened.emulate_media(color_scheme="light")
    assert len(pairs) > 100
    assert [pair for pair in {tuple(p) for p in pairs} if contrast(*pair) < 4.5] == []


def contrast(a, b):
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(color):
    numbers = [float(n) for n in re.findall(r"[\d.]+", color)[:3]]
    # color-mix() is reported as shares, others in 255ths
    channels = numbers if color.startswith("color(") else [n / 255 for n in numbers]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_it_can_be_printed_with_all_of_its_parts(browser, report, tmp_path):
    page = browser.new_page()
    page.goto(report.as_uri())
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    assert {p.get_attribute("data-model") for p in page.locator(".of:visible").all()} == {
        "llava",
        "qwen2_vl",
    }
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() > 0
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()


def test_without_scripts_everything_is_visible(browser, report):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator(".of[hidden]").count() == 0
    assert page.locator(".heats > div:visible").count() == 4
    context.close()
