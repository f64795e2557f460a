"""The demo page's handlers, called as the page calls them."""

import os
import re
import shutil
import socket
import time
from dataclasses import replace
from html import escape
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qsl

import pytest
import timm
import torch
from awkward_images import ACCEPTED, REFUSED, write_huge
from PIL import Image
from support import command, complaint

import models  # noqa: F401
from runtime.errors import UsageError, exit_on_error
from visualize import session
from visualize.capture import capture, time_limit
from visualize.report import UNTRAINED

gr = pytest.importorskip("gradio", reason="gradio is an extra")
from visualize.app import check_address, find_checkpoints, first_subject, main, parser  # noqa: E402
from visualize.link import link_to  # noqa: E402
from visualize.page import COMMON_SCALE, EXACT, MEAN, NO_CHECKPOINT, OWN_SCALE, SMOOTH, Desk, Page  # noqa: E402
from visualize.storage import Storage  # noqa: E402

NANO = session.Choice("debiformer_nano")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "best.pth"
    model = timm.create_model("debiformer_nano", num_classes=2, img_size=32)
    args = {"model": "debiformer_nano", "input_size": 32}
    torch.save({"model": model.state_dict(), "args": args, "classes": ["cat", "dog"]}, path)
    return str(path)


@pytest.fixture(scope="module")
def page(trained):
    with Storage() as storage:
        yield Page(storage, "debiformer_nano", [trained])


class Visitor:
    """A browser session: keeps its state as the page would, and names what it sees."""

    def __init__(self, page, name="one", link=""):
        self.page, self.desk = page, None
        self.request = SimpleNamespace(session_hash=name, query_params=dict(parse_qsl(link.removeprefix("?"))))
        self.do("begin")

    def do(self, event, *values):
        updates = getattr(self.page, event)(self.desk, *values, request=self.request)
        seen = dict(zip(self.page.shown, updates, strict=True))
        if isinstance(seen[self.page.desk], Desk):
            self.desk = seen[self.page.desk]
        self.sees = seen
        return self

    @property
    def message(self):
        return self.sees[self.page.message]["value"]

    @property
    def panels(self):
        return self.sees[self.page.panels]


def at(x, y):
    """A click as gradio hands it on."""
    return gr.EventData(None, {"index": [x, y]})


def stage(number):
    return gr.EventData(None, {"stage": number})


@pytest.fixture
def visitor(page):
    return Visitor(page)


def test_new_visitor_sees_a_photograph_and_that_the_weights_are_untrained(page, visitor):
    assert visitor.message == ""
    assert visitor.panels.count("<figure>") == 7
    assert f"<strong>{UNTRAINED}</strong>" in visitor.sees[page.facts]
    assert visitor.sees[page.point] == "32,32"


def test_click_changes_the_panels(visitor):
    before = visitor.panels
    visitor.do("click", at(1, 62))
    assert visitor.sees[visitor.page.point] == "1,62"
    assert visitor.panels != before


def test_settings_change_the_panels_and_offer_what_there_is(page, visitor, trained):
    before = visitor.panels
    visitor.do("pick_stage", stage(4))
    assert visitor.panels != before
    assert visitor.sees[page.block]["choices"] == ["last", 0]
    assert visitor.sees[page.head]["choices"] == [MEAN, 0, 1, 2, 3]
    before = visitor.panels
    visitor.do("refine", 0, 3, OWN_SCALE, EXACT)
    assert visitor.panels != before
    assert visitor.desk.choice.head == 3
    visitor.do("choose", "debiformer_nano", trained)
    assert UNTRAINED not in visitor.sees[page.facts]
    assert "cat" in visitor.sees[page.predictions]
    assert visitor.desk.choice.head is None


def test_all_stages_are_shown_and_one_is_chosen(page, visitor):
    strip = visitor.do("pick_stage", stage(2)).sees[page.stages]
    assert strip.count("<button") == 4
    assert strip.count("<svg") == 4
    assert 'data-stage="2" aria-pressed="true"' in strip
    assert strip.count('aria-pressed="true"') == 1


def test_common_scale_ends_the_colour_bars_of_all_panels_at_the_greatest_value(visitor):
    own = scale_ends(visitor.panels)
    visitor.do("refine", "last", MEAN, COMMON_SCALE, EXACT)
    assert len(set(own)) == 3
    assert scale_ends(visitor.panels) == [max(own)] * 3


def scale_ends(part):
    """What stands at the right ends of the colour bars, in percent."""
    return [float(end) for end in re.findall(r"<span>0</span><i></i><span>([\d.]+) %", part)]


def test_overlay_is_drawn_with_the_edges_of_tokens_or_without(visitor):
    assert "image-rendering: auto" not in visitor.panels
    visitor.do("refine", "last", MEAN, OWN_SCALE, SMOOTH)
    assert "image-rendering: pixelated" not in visitor.panels


def test_photo_is_sent_once(page, visitor):
    photo = visitor.sees[page.photo]
    assert photo.count("data:image/jpeg") == 2
    visitor.do("click", at(3, 3))
    assert visitor.sees[page.photo] == gr.skip()
    assert visitor.do("pick_sample", "flower").sees[page.photo] != photo


def test_link_restores_what_was_shown(page, trained, visitor):
    visitor.do("pick_sample", "flower").do("choose", "debiformer_nano", trained).do("pick_stage", stage(2))
    visitor.do("refine", 0, 1, COMMON_SCALE, SMOOTH).do("click", at(7, 30))
    link = link_to(visitor.desk.photo, visitor.desk.choice)
    other = Visitor(page, "two", link)
    assert other.message == ""
    assert other.panels == visitor.panels
    assert other.sees[page.picture] == visitor.sees[page.picture]
    assert escape(link) in other.sees[page.picture]


@pytest.mark.parametrize(
    ("link", "words"),
    [
        ("?photo=mine", "; there are china, flower"),
        ("?checkpoint=/etc/passwd", "a checkpoint that is not on offer: /etc/passwd"),
        ("?model=debiformer_huge", "did you mean debiformer"),
        ("?point=nan,0", "have to be numbers"),
        ("?point=1", "have to be numbers"),
        ("?stage=third", "have to be numbers"),
        ("?stage=9", "no stage 9"),
    ],
)
def test_link_to_what_does_not_exist_shows_a_sentence_above_the_first_photograph(page, link, words):
    visitor = Visitor(page, "lost", link)
    assert words in visitor.message
    assert visitor.panels == Visitor(page).panels


def test_parts_of_an_output_are_said_to_add_up(visitor):
    errors = re.findall(r"All parts add up to the layer&#x27;s output but for (\S+) of it", visitor.panels)
    assert len(errors) == 2
    assert all(float(error) < 1e-6 for error in errors)


def test_report_is_the_visitors_own(page, visitor):
    other = Visitor(page, "two").do("pick_sample", "flower")
    visitor.do("click", at(3, 3))
    reports = [Path(one.sees[page.download]).read_text(encoding="utf-8") for one in (visitor, other)]
    assert "china through debiformer_nano" in reports[0]
    assert "flower through debiformer_nano" in reports[1]
    page.leave(visitor.request)
    assert not Path(visitor.sees[page.download]).exists()


def test_visitors_do_not_mix(page):
    """Interleaved with another visitor, one sees what it sees alone."""
    steps = [("pick_sample", "flower"), ("pick_stage", stage(2)), ("refine", 0, 1, COMMON_SCALE, SMOOTH)]
    alone = Visitor(page, "alone")
    for step in steps:
        alone.do(*step)
    one, two = Visitor(page, "one"), Visitor(page, "two")
    for step in steps:
        one.do(*step)
        two.do("click", at(len(step) * 40, 7)).do("choose", "biformer_tiny", NO_CHECKPOINT)
    assert one.panels == alone.panels
    assert two.panels != alone.panels
    assert two.desk.photo.name == "china"


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_uploads_get_a_sentence_and_the_page_goes_on(page, visitor, tmp_path, name):
    desk = visitor.desk
    write, words = REFUSED[name]
    visitor.do("open_file", str(write(tmp_path / name)))
    assert words in visitor.message
    assert 'role="alert"' in visitor.message
    assert "Traceback" not in visitor.message
    assert visitor.desk is desk
    visitor.do("pick_sample", "flower")
    assert visitor.message == ""


def test_upload_is_deleted_once_it_is_read(page, visitor):
    folder = page.storage.folder / "hash"
    folder.mkdir()
    for name in ("seen.png", "refused.txt"):
        path = folder / name
        path.write_text("no image") if name == "refused.txt" else Image.new("RGB", (64, 64)).save(path)
        visitor.do("open_file", str(path))
        assert ("is no image" in visitor.message) == (name == "refused.txt")
        assert not path.exists()
        assert visitor.sees[page.upload] is None


@pytest.mark.parametrize("name", ACCEPTED)
def test_unusual_uploads_are_shown(visitor, tmp_path, name):
    visitor.do("open_file", str(ACCEPTED[name](tmp_path / name)))
    assert visitor.message == ""
    assert visitor.desk.photo.name == name


@pytest.mark.parametrize(
    ("event", "values", "words"),
    [
        ("type_point", ["64,0"], "64,0 lies outside of the 64x64 picture"),
        ("type_point", ["here"], "expected a point X,Y"),
        ("click", [at(float("nan"), 1)], "a click needs the two coordinates"),
        ("click", [at(10**400, 1)], "a click needs the two coordinates"),
        ("click", [at("1", "2")], "a click needs the two coordinates"),
        ("click", [gr.EventData(None, {"index": [1]})], "a click needs the two coordinates"),
        ("click", [gr.EventData(None, {"index": [1, 2, 3]})], "a click needs the two coordinates"),
        ("click", [gr.EventData(None, {"index": "12"})], "a click needs the two coordinates"),
        ("click", [gr.EventData(None, {})], "a click needs the two coordinates"),
        ("click", [gr.EventData(None, None)], "a click needs the two coordinates"),
        ("pick_stage", [stage(7)], "no stage 7"),
        ("pick_stage", [stage("3")], "a click needs a stage"),
        ("choose", ["resnet18", NO_CHECKPOINT], "resnet18 has no routing"),
        ("choose", ["debiformer_nano", "/etc/passwd"], "is not a checkpoint"),
        ("refine", [9, MEAN, OWN_SCALE, EXACT], "no block 9"),
        ("refine", [0, 99, OWN_SCALE, EXACT], "no head 99"),
    ],
)
def test_what_does_not_exist_gets_a_sentence_and_nothing_changes(page, visitor, event, values, words):
    desk = visitor.desk
    visitor.do(event, *values)
    assert words in visitor.message
    assert visitor.desk is desk
    assert visitor.sees[page.model] == "debiformer_nano"


def test_checkpoint_of_another_model_gets_a_sentence(visitor, trained):
    visitor.do("choose", "biformer_tiny", trained)
    assert "is of debiformer_nano, not of biformer_tiny" in visitor.message
    assert visitor.sees[visitor.page.model] == "debiformer_nano"


def test_visitor_whose_state_was_dropped_starts_anew(visitor):
    visitor.desk = None
    visitor.do("type_point", "5,6")
    assert visitor.message == ""
    assert visitor.sees[visitor.page.point] == "5,6"


def test_evidence_appears_and_goes_with_its_photo(page, visitor):
    pytest.importorskip("pytorch_grad_cam", reason="grad-cam is an extra")
    pytest.importorskip("captum", reason="captum is an extra")
    visitor.do("show_evidence")
    assert visitor.sees[page.evidence].count("Without the strongest 20 % of the picture: ") == 3
    assert visitor.sees[page.evidence].count("<figure>") == 6
    visitor.do("click", at(3, 3))
    assert visitor.sees[page.evidence].count("<figure>") == 6
    visitor.do("pick_sample", "flower")
    assert visitor.sees[page.evidence] == ""


def test_large_photos_are_kept_small(tmp_path):
    photo = session.photo_from_file(write_huge(tmp_path / "panorama.png", 8000, 400))
    assert max(photo.image.size) == session.PHOTO_SIDE


def test_click_runs_no_second_forward_pass(monkeypatch):
    photo = session.samples()["china"]
    first = session.answer(photo, replace(NANO, stage=1))
    monkeypatch.setattr(type(first.subject), "capture", None)
    session.answer(photo, replace(NANO, point=(0.1, 0.2)))
    session.answer(photo, replace(NANO, stage=4, head=1))


def test_checkpoint_that_was_written_anew_is_loaded_anew(trained):
    choice = replace(NANO, checkpoint=trained)
    before = session.subject_of(choice)
    assert session.subject_of(choice) is before
    content = torch.load(trained)
    torch.save({**content, "classes": ["owl", "pig"]}, trained)
    assert session.subject_of(choice).classes == ["owl", "pig"]


def test_pass_that_takes_too_long_is_given_up():
    model = timm.create_model("debiformer_nano").eval()
    slow = model.stages[1].register_forward_pre_hook(lambda module, args: time.sleep(0.2))
    image = torch.zeros(1, 3, 64, 64)
    with pytest.raises(UsageError, match=r"given up after 0\.1 seconds"), time_limit(model, 0.1):
        capture(model, image)
    slow.remove()
    with time_limit(model, 60):
        capture(model, image)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_checkpoints_on_offer_are_those_of_runs(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "best.pth").touch()
        (tmp_path / name / "checkpoint.pth").touch()
    assert sorted(find_checkpoints(str(tmp_path))) == [str(tmp_path / name / "best.pth") for name in ("a", "b")]
    assert find_checkpoints(str(tmp_path / "none")) == []


def test_page_starts_with_the_newest_trained_classifier(trained, tmp_path):
    for age, name in enumerate(("damaged", "trained", "older")):
        (tmp_path / name).mkdir()
        best = tmp_path / name / "best.pth"
        shutil.copy(trained, best) if name != "damaged" else best.write_bytes(b"no checkpoint")
        os.utime(best, (1e9 - age, 1e9 - age))
    arguments = parser().parse_args(["--checkpoints", str(tmp_path)])
    subject, first, offered = first_subject(arguments)
    assert (subject.trained, first) == (True, str(tmp_path / "trained" / "best.pth"))
    assert len(offered) == 3
    arguments.model = "debiformer_nano"
    subject, first, offered = first_subject(arguments)
    assert (subject.trained, first, len(offered)) == (False, "", 3)
    arguments.checkpoint = str(tmp_path / "older" / "best.pth")
    subject, first, offered = first_subject(arguments)
    assert (subject.trained, first, offered[0], len(offered)) == (True, arguments.checkpoint, arguments.checkpoint, 3)


def test_without_gradio_there_is_one_line():
    script = "import sys, runpy; sys.modules['gradio'] = None; runpy.run_module('visualize.app', run_name='__main__')"
    printed = command("-c", script)
    assert printed.returncode == 2
    assert printed.stderr == "visualize.app: error: the page needs gradio: pip install -r requirements-demo.txt\n"


def test_check_address_says_in_a_sentence_what_is_wrong_with_an_address():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for address, sentence in (
            (("127.0.0.1", port), f"port {port} is taken; choose another --port"),
            (("192.0.2.1", port), "cannot serve on --host 192.0.2.1: it is no address of this machine"),
            (("no.invalid", port), "this machine knows no --host 'no.invalid'"),
        ):
            assert complaint(check_address, *address) == sentence


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--checkpoint", "none.pth"], "does not exist"),
        (["--model", "x"], "unknown --model"),
        (["--p"], "unrecognized"),
        (["--port", "70000"], "expected a number from 1 to 65535, not '70000'"),
        (["--auth", "secret"], "expected USER:PASSWORD"),
    ],
)
def test_mistakes_at_the_start_are_sentences(argv, words, capsys):
    with pytest.raises(SystemExit) as end:
        exit_on_error("python -m visualize.app", lambda: main(argv))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_what_a_browser_calls_its_session_is_no_path(page, tmp_path):
    """The report stays in the page's folder, and leaving removes nothing else."""
    (tmp_path / "kept.txt").write_text("mine")
    visitor = Visitor(page, str(tmp_path))
    assert Path(visitor.sees[page.download]).parents[2] == page.storage.folder
    page.leave(visitor.request)
    assert not Path(visitor.sees[page.download]).exists()
    assert (tmp_path / "kept.txt").read_text() == "mine"
    assert not (tmp_path / "report.html").exists()
