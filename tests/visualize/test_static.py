"""The page without a server shows what the model does, without a network; and one line for every mistake."""

import base64
import gzip
import re
import shutil

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from awkward_images import gradient
from PIL import Image
from support import complaint, scrambled

import models  # noqa: F401
from models.labels import in_words
from runtime.errors import UsageError
from visualize import maps
from visualize.images import open_image, to_tensor
from visualize.npm import npm_package
from visualize.static import main
from visualize.subject import load_subject

SLOW = 120_000
POINTS = [(0, 0), (63, 5), (24, 46)]


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A checkpoint of a small model whose attention is far from even."""
    path = tmp_path_factory.mktemp("weights") / "best.pth"
    kwargs = {"embed_dims": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
    torch.manual_seed(0)
    model = scrambled(timm.create_model("debiformer_nano", num_classes=3, img_size=64, **kwargs), seed=0)
    args = {"model": "debiformer_nano", "input_size": 64, "model_kwargs": kwargs}
    torch.save({"model": model.state_dict(), "args": args, "classes": ["cat", "dog", "<owl>"]}, path)
    return path


@pytest.fixture(scope="session")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    wide = np.concatenate([gradient(), gradient()[::-1]], axis=1)
    Image.fromarray(wide).resize((301, 200)).save(path)
    return path


@pytest.fixture(scope="session")
def page(weights, tmp_path_factory):
    """The page of that model, as a file."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    try:
        npm_package("onnxruntime-web")
    except UsageError as error:
        pytest.skip(str(error))
    main(["--checkpoint", str(weights), "--output", str(path)])
    return path


@pytest.fixture(scope="session")
def seen(weights, photo):
    """What the command and the server's page show of the photo: the subject, its view, the capture."""
    subject = load_subject(checkpoint=weights)
    view = subject.view(open_image(photo))
    return subject, view, subject.capture(view)


def expected_of(layer, x, y):
    """What the graph says of a layer, by the names that it has there."""
    row, column = maps.token_at(layer, (64, 64), x, y)
    expected = {"attention": layer.maps.token_attention(row, column)}
    if layer.routing:
        expected["windows"] = layer.routing.idx
    if layer.agents:
        ha, wa = layer.agents.agents
        expected["start"], expected["end"] = maps.agent_pixels(layer)
        expected["shares"] = layer.agents.agent_shares()[:, :ha, :wa]
        expected["listens"] = layer.agents.token_to_agents()[:, row, column]
        expected["reads"] = layer.agents.agent_reads().mean(0)
    return expected


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.xdist_group("static")
def test_graph_gives_what_the_capture_gives(page, seen):
    subject, view, capture = seen
    packed = re.search(r'id="model">([^<]+)<', page.read_text())[1]
    session = onnxruntime.InferenceSession(gzip.decompress(base64.b64decode(packed)))
    names = [output.name for output in session.get_outputs()]
    image = to_tensor(view, subject.pixels).numpy()
    for point in POINTS:
        found = dict(zip(names, session.run(None, {"image": image, "point": np.array(point)}), strict=True))
        expected = {"probabilities": capture.logits.softmax(-1)}
        for number, layer in enumerate(capture.layers):
            expected |= {f"{number}.{key}": value for key, value in expected_of(layer, *point).items()}
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=1e-4, rtol=1e-4, err_msg=name)


# -- in a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (requirements-dev.txt)")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, page):
    """visit(width): the file opened without a network, when it shows the first sample."""
    contexts, complaints, asked = [], [], []

    def start(width, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 844}, offline=True, **options))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(SLOW)
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(page.as_uri())
        settled(tab, "Point 32,32")
        return tab

    yield start
    for context in contexts:
        context.close()
    assert complaints == []
    assert {url for url in asked if not url.startswith(("data:", "blob:"))} == {page.as_uri()}


def settled(tab, status):
    tab.wait_for_selector(f"#status:text-matches('^{status}: .* ms$')")


def drawn(tab):
    return tab.eval_on_selector_all("#panels canvas", "all => all.map(one => one.toDataURL())")


def opened(tab, photo):
    tab.set_input_files("input[type=file]", photo)
    tab.wait_for_selector(".pictures:not(:has([aria-pressed=true]))")
    settled(tab, "Point 32,32")


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.xdist_group("static")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_click_shows_what_the_place_sees(visit, seen, photo, width):
    tab = visit(width)
    opened(tab, photo)
    subject, _, capture = seen
    shown = tab.locator("table td").all_inner_texts()
    best = maps.predictions(capture, in_words(subject.classes))
    assert shown == [text for name, share in best for text in (name, f"{100 * share:.1f} %")]

    assert tab.input_value("#stage") == "1"
    before = drawn(tab)
    side = tab.locator("#picture").bounding_box()["width"]
    tab.click("#picture", position={"x": 0.3 * side, "y": 0.7 * side})
    settled(tab, "Point 19,44")
    after = drawn(tab)
    assert len(after) == len(before) == 5
    assert [one == other for one, other in zip(before, after, strict=True)].count(
        True
    ) <= 2  # all agents; what they read
    windows, looks, _, listens, composed = tab.locator("figcaption").all_inner_texts()[1:]
    routed, agents = capture.block(1)
    assert "reads 1 of 4" in windows
    for words, layer in ((looks, routed), (composed, agents)):
        brightest = layer.maps.token_attention(44 // 4, 19 // 4).mean(0).max()
        assert f"gets {100 * brightest:.1f} %" in words
    most = agents.agents.token_to_agents()[:, 44 // 4, 19 // 4].mean(0).max()
    assert f"most: {100 * most:.1f} %" in listens

    assert not tab.evaluate("document.documentElement.scrollWidth > innerWidth")
    for selector in ("#picture", "#panels figure:first-child canvas"):
        box = tab.locator(selector).bounding_box()
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= 844


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.xdist_group("static")
def test_page_is_used_by_keyboard(visit):
    tab = visit(390)
    tab.focus("#picture")
    tab.keyboard.press("ArrowLeft")  # by a token of stage 1
    settled(tab, "Point 28,32")
    tab.select_option("#stage", "3")
    tab.focus("#picture")
    tab.keyboard.press("ArrowDown")
    settled(tab, "Point 28,48")
    tab.focus("button:has(img[alt=flower])")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("button[aria-pressed=true] img[alt=flower]")


def states(tab, photo, text):
    """Every state that the page has, by name: it is in it when this generator stands."""
    yield "begun"
    for stage in tab.locator("#stage option").all_inner_texts():
        tab.select_option("#stage", stage)
        yield f"stage {stage}"
    tab.select_option("#head", "0")
    tab.select_option("#block", "0")
    yield "one head of the first block"
    opened(tab, photo)
    yield "own picture"
    tab.focus("#picture")
    yield "picture in focus"
    tab.set_input_files("input[type=file]", text)
    tab.wait_for_selector("[role=alert]:has-text('is no image')")
    yield "mistake"


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.xdist_group("static")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_no_fault_in_any_state(visit, photo, tmp_path, width, scheme):
    tab = visit(width, color_scheme=scheme)
    (tmp_path / "notes.png").write_text("no picture")
    tab.evaluate((npm_package("axe-core") / "axe.min.js").read_text())
    for state in states(tab, photo, tmp_path / "notes.png"):
        found = tab.evaluate("axe.run()")["violations"]
        assert (state, [(each["id"], each["nodes"][0]["html"]) for each in found]) == (state, [])
        assert not tab.evaluate("document.documentElement.scrollWidth > innerWidth"), state


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.xdist_group("static")
def test_what_is_no_picture_becomes_a_sentence(visit, tmp_path):
    tab = visit(390)
    before = drawn(tab)
    (tmp_path / "notes.png").write_text("no picture")
    Image.new("RGB", (5, 300)).save(tmp_path / "thin.png")
    for name, words in (("notes.png", "notes.png is no image"), ("thin.png", "thin.png has 5x300 pixels")):
        tab.set_input_files("input[type=file]", tmp_path / name)
        tab.wait_for_selector(f"[role=alert]:has-text('{words}')")
    assert drawn(tab) == before


# -- mistakes


def test_folder_without_the_package_is_named(weights, tmp_path):
    words = complaint(main, ["--checkpoint", str(weights), "--onnxruntime_web", str(tmp_path)])
    assert f"{tmp_path} is no onnxruntime-web" in words
    assert "leave --onnxruntime_web out" in words


def test_output_that_is_a_folder_is_named(weights, tmp_path):
    assert "choose a file as --output" in complaint(main, ["--checkpoint", str(weights), "--output", str(tmp_path)])


def test_model_that_does_not_exist_is_named():
    assert "did you mean debiformer_nano" in complaint(main, ["--model", "debiformer_nono"])


def test_missing_npm_is_named_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("DEBIFORMER_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    assert "apt-get install npm" in complaint(npm_package, "onnxruntime-web")


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed (apt-get install npm)")
def test_registry_out_of_reach_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("DEBIFORMER_HOME", str(tmp_path))
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setenv("npm_config_fetch_retry_mintimeout", "1")
    assert "npm cannot fetch onnxruntime-web (ECONNREFUSED)" in complaint(npm_package, "onnxruntime-web")
    assert not (tmp_path / "npm").exists()
