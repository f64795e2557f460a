"""The demo page and its report in a real browser: Debian's chromium, driven by Playwright."""

import itertools
import os
import shutil
import socket
import time

import pytest
import timm
import torch
from awkward_images import write_huge, write_text

import models  # noqa: F401

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (requirements-dev.txt)")
pytest.importorskip("gradio", reason="gradio is an extra (requirements-demo.txt)")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("chromium is not installed (apt-get install chromium)", allow_module_level=True)

from visualize.npm import npm_package  # noqa: E402
from visualize.page import Page, serve  # noqa: E402
from visualize.report import UNTRAINED  # noqa: E402
from visualize.storage import Storage  # noqa: E402

HEIGHTS = {1280: 900, 390: 844}
"""Of a screen by its width: a laptop and a phone, in CSS pixels."""
WIDTHS = list(HEIGHTS)
SLOW = 60_000


@pytest.fixture(scope="module")
def outside():
    """Addresses off this machine that Python connected to while the page was served."""
    found = []
    connect = socket.socket.connect

    def watched(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            found.append(address)
        return connect(self, address)

    socket.socket.connect = watched
    yield found
    socket.socket.connect = connect


@pytest.fixture(scope="module")
def page(tmp_path_factory, outside):
    path = tmp_path_factory.mktemp("run_with_a_name_that_is_longer_than_a_phone_is_wide") / "best.pth"
    model = timm.create_model("debiformer_nano", num_classes=2)
    content = {"model": model.state_dict(), "args": {"model": "debiformer_nano", "input_size": 64}}
    torch.save({**content, "classes": ["cat", "dog"]}, path)
    with Storage() as storage:
        page = Page(storage, "debiformer_nano", [str(path)])
        yield page
        page.blocks.close()


@pytest.fixture(scope="module")
def address(page):
    return serve(page, "127.0.0.1")


@pytest.fixture(scope="module")
def reports(page):
    """The folder with one folder for each visitor's report."""
    return page.storage.folder


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """The page open in a browser, with what went wrong in `complaints` and what was asked elsewhere in `strangers`."""

    def __init__(self, browser, address, width=1280, link="", **context):
        self.context = browser.new_context(viewport={"width": width, "height": HEIGHTS[width]}, **context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(SLOW)
        self.complaints, self.strangers = [], []
        self.page.on("console", self.heard)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self.asked)
        self.address = address
        self.page.goto(f"{address}{link}")
        self.page.wait_for_selector("#panels figure")
        self.settle()

    def heard(self, message):
        if message.type == "error":
            self.complaints.append(message.text)

    def asked(self, request):
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.strangers.append(request.url)

    def settle(self):
        self.page.wait_for_function("!document.querySelector('.generating, .pending, .eta-bar')")
        self.page.evaluate("document.fonts.ready")

    def panels(self):
        return self.page.locator("#panels svg").evaluate_all("all => all.map(svg => svg.outerHTML)")

    def until_changed(self, before):
        end = time.monotonic() + SLOW / 1000
        while self.panels() == before:
            assert time.monotonic() < end, "the panels did not change"
            self.page.wait_for_timeout(50)
        self.settle()
        return self.panels()

    def close(self):
        self.context.close()
        assert self.complaints == []
        assert self.strangers == []


@pytest.fixture
def visit(browser, address):
    visits = []

    def start(**options):
        visits.append(Visit(browser, address, **options))
        return visits[-1]

    yield start
    for one in visits:
        one.close()


def overlaps(page):
    """Pairs of visible components of the page that cover each other, and what sticks out of it sideways."""
    boxes = page.evaluate(
        """() => [...document.querySelectorAll(
            'h1, .block, #panels figure, #evidence figure, button, .alarm, .predictions, figcaption, label'
        )].filter(e => e.checkVisibility() && e.getBoundingClientRect().width > 1).map((e, i) => {
            e.dataset.number = i
            const r = e.getBoundingClientRect()
            const above = []
            for (let p = e.parentElement; p; p = p.parentElement) if (p.dataset.number) above.push(+p.dataset.number)
            return {i, above, name: e.tagName + '#' + e.id + '.' + e.className, text: e.innerText.slice(0, 30),
                    left: r.left, top: r.top, right: r.right, bottom: r.bottom}
        })"""
    )
    wrong = [box["name"] for box in boxes if box["left"] < -0.5 or box["right"] > page.viewport_size["width"] + 0.5]
    for one, two in itertools.combinations(boxes, 2):
        if one["i"] in two["above"] or two["i"] in one["above"]:
            continue
        wide = min(one["right"], two["right"]) - max(one["left"], two["left"])
        high = min(one["bottom"], two["bottom"]) - max(one["top"], two["top"])
        if wide > 1 and high > 1:
            wrong.append((one["name"], one["text"], two["name"], two["text"]))
    return wrong


def scrolls_sideways(page):
    return page.evaluate("document.documentElement.scrollWidth > innerWidth")


def test_from_a_sample_to_the_report(visit, tmp_path):
    one = visit()
    page = one.page
    shown = one.panels()
    assert len(shown) == 6 + 4  # one of seven panels shows four agents
    assert UNTRAINED in page.inner_text("#facts")

    page.click("#sample label:has-text('flower')")
    shown = one.until_changed(shown)

    page.click("#picture svg", position={"x": 40, "y": 60})
    shown = one.until_changed(shown)
    assert page.input_value("#point input, #point textarea") != "32,32"

    page.click("#stages button:has-text('Stage 1')")
    shown = one.until_changed(shown)

    with page.expect_download() as download:
        page.click("#download")
    path = tmp_path / download.value.suggested_filename
    assert path.suffix == ".html"
    download.value.save_as(path)
    report = one.context.new_page()
    asked = []
    report.on("request", lambda request: asked.append(request.url))
    report.goto(path.as_uri())
    assert report.inner_text("h1") == "flower through debiformer_nano"
    assert UNTRAINED in report.inner_text("body")
    assert report.locator("figure").count() == 12  # the picture, its seven panels, and four stages
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]


@pytest.mark.parametrize("width", WIDTHS)
def test_picture_stages_and_panels_are_on_one_screen_after_a_click(visit, page, width):
    one = visit(width=width, link=f"?checkpoint={page.checkpoints[0]}&stage=2")
    before = one.panels()
    one.page.click("#picture svg", position={"x": 40, "y": 60})
    one.until_changed(before)
    assert one.page.evaluate("scrollY") == 0
    needed = {"#picture svg": 1, "#stages button": 4, "#panels figure": 7 if width == 1280 else 2}
    for selector, count in needed.items():
        boxes = [part.bounding_box() for part in one.page.locator(selector).all()[:count]]
        assert len(boxes) == count
        assert max(box["y"] + 0.9 * box["height"] for box in boxes) <= HEIGHTS[width], selector
    assert not scrolls_sideways(one.page)


def test_link_shows_the_same_again(visit):
    one = visit()
    one.page.click("#picture svg", position={"x": 40, "y": 60})
    shown = one.until_changed(one.panels())
    one.page.click("#stages button:has-text('Stage 2')")
    shown = one.until_changed(shown)
    two = visit(link=one.page.url.removeprefix(one.address))
    assert two.panels() == shown
    assert two.page.url == one.page.url


def test_keys_move_the_point_by_tokens_and_stay_on_the_picture(visit):
    one = visit()
    picture = one.page.get_by_role("application")
    picture.focus()
    place = one.page.locator("#point input, #point textarea")
    moves = {"ArrowRight": "48,32", "ArrowDown": "48,48", "ArrowLeft": "32,48", "ArrowUp": "32,32"}
    for key, point in moves.items():
        one.page.keyboard.press(key)
        playwright.expect(place).to_have_value(point)
        playwright.expect(picture).to_be_focused()
    playwright.expect(picture).to_have_accessible_name("The picture; the point is at 32,32. Arrow keys move it.")


def test_pointing_at_a_map_shows_its_number(visit):
    one = visit()
    map_of = one.page.locator("#panels figure").filter(has_text="Token attention")
    for cell in map_of.locator("tr:has(td)").all():
        point, value = (part.text_content() for part in cell.locator("td").all())
        x, y = (int(part) for part in point.split(","))
        svg = map_of.locator("svg").bounding_box()
        one.page.mouse.move(*(svg[edge] + (at + 0.5) / 64 * svg["width"] for edge, at in (("x", x), ("y", y))))
        words = map_of.locator("output").text_content()
        assert words.startswith(f"{point}: ")
        assert float(words.split()[1]) == pytest.approx(float(value.split()[0]), rel=2e-3)


def test_nothing_leaves_the_machine(visit, outside):
    one = visit()
    shown = one.panels()
    one.page.click("#sample label:has-text('flower')")
    one.until_changed(shown)
    assert outside == []
    fonts = one.page.evaluate("getComputedStyle(document.querySelector('.gradio-container')).fontFamily")
    assert "system-ui" in fonts


def test_trained_checkpoint_can_be_chosen(visit):
    one = visit()
    shown = one.panels()
    one.page.click("input[aria-label='Checkpoint']")
    one.page.click("[role=option]:has-text('best.pth')")
    one.until_changed(shown)
    assert UNTRAINED not in one.page.inner_text("#facts")
    assert "cat" in one.page.inner_text("#predictions")


def test_mistakes_become_a_sentence_and_the_page_goes_on(visit, tmp_path):
    one = visit()
    page, shown = one.page, one.panels()
    for path, words in (
        (write_text(tmp_path / "notes.txt"), "notes.txt is no image"),
        (write_huge(tmp_path / "huge.png"), "has more than 100,000,000 pixels"),
    ):
        page.set_input_files("#upload input[type=file]", path)
        page.wait_for_selector(f"#message [role=alert]:has-text('{words}')")
        one.settle()
    field = page.locator("#point input, #point textarea")
    field.fill("64,0")
    field.press("Enter")
    page.wait_for_selector("#message [role=alert]:has-text('64,0 lies outside')")
    assert "Traceback" not in page.inner_text("body")
    assert one.panels() == shown
    page.click("#picture svg", position={"x": 40, "y": 60})
    one.until_changed(shown)
    assert page.locator("#message [role=alert]").count() == 0


def test_two_visitors_do_not_mix(visit):
    one, two = visit(), visit()
    assert one.panels() == two.panels()
    before = one.panels()
    two.page.click("#sample label:has-text('flower')")
    flower = two.until_changed(before)
    one.page.click("#picture svg", position={"x": 30, "y": 30})
    assert one.until_changed(before) != flower
    assert two.panels() == flower


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overlaps(visit, reports, width, scheme):
    one = visit(width=width, color_scheme=scheme)
    field = one.page.locator("#point input, #point textarea")
    field.fill("1000,1")
    field.press("Enter")
    one.page.wait_for_selector("#message [role=alert]")  # the fullest page
    one.settle()
    assert overlaps(one.page) == []
    assert not scrolls_sideways(one.page)

    report = one.context.new_page()
    report.goto(max(reports.glob("*/*/report.html"), key=os.path.getmtime).as_uri())
    assert overlaps(report) == []
    assert not scrolls_sideways(report)
    page_colour = report.evaluate("getComputedStyle(document.body).backgroundColor")
    assert page_colour == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(21, 21, 21)")


def states(one, checkpoint):
    """Every state that the page has, by name: it is in it when this generator stands."""
    page = one.page

    def after(action):
        shown = one.panels()
        action()
        one.until_changed(shown)

    yield "begun"
    for stage in (1, 2, 4):
        after(page.locator(f"#stages button:has-text('Stage {stage}')").click)
        yield f"stage {stage}"
    for summary in page.locator("#panels summary").all():
        summary.click()
    yield "captions unfolded"
    page.get_by_role("application").focus()
    after(lambda: page.keyboard.press("ArrowRight"))
    yield "point moved by keys"
    for choice in ("smooth", "one for all"):
        after(page.locator(f"#settings label:has-text('{choice}')").click)
    yield "smooth maps of one scale"
    page.click("input[aria-label='Checkpoint']")
    page.wait_for_selector("[role=option]")
    yield "checkpoints unfolded"
    after(page.locator(f"[role=option]:has-text('{checkpoint}')").click)
    yield "trained"
    page.click("#ask-evidence")
    page.wait_for_selector("#evidence figure")
    one.settle()
    yield "class evidence"
    field = page.locator("#point input, #point textarea")
    field.fill("1000,1")
    field.press("Enter")
    page.wait_for_selector("#message [role=alert]")
    one.settle()
    yield "mistake"


ENDED = """Promise.allSettled(
    document.getAnimations().filter(one => one.effect.getComputedTiming().endTime < Infinity).map(one => one.finished)
).then(() => null)"""
"""What fades in has come: half of the way its contrast is too low."""


def faults(page, excluded=""):
    """What axe-core finds: the rule, its words and the places."""
    page.evaluate(ENDED)
    page.evaluate((npm_package("axe-core") / "axe.min.js").read_text())
    found = page.evaluate(f"axe.run({{ exclude: {[excluded] if excluded else []} }}).then(result => result.violations)")
    return [(fault["id"], fault["help"], [node["html"] for node in fault["nodes"]]) for fault in found]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_axe_finds_no_fault_in_any_state(visit, page, reports, width, scheme):
    one = visit(width=width, color_scheme=scheme)
    for state in states(one, page.checkpoints[0]):
        # The place to drop a file is Gradio's own, and its name is not the words on it.
        assert (state, faults(one.page, "#upload")) == (state, [])
        assert not scrolls_sideways(one.page), state
    report = one.context.new_page()
    report.goto(max(reports.glob("*/*/report.html"), key=os.path.getmtime).as_uri())
    assert faults(report) == []
