"""The documents become a site without a broken link, and it needs no network."""

import re
from pathlib import Path

import pytest
from support import ROOT, command


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """What `make site` builds."""
    folder = tmp_path_factory.mktemp("site")
    pages, cache = folder / "pages", folder / "cache"
    done = command("-m", "sphinx", "--quiet", "--fail-on-warning", "-c", "docs/site", "-d", cache, ROOT, pages)
    assert done.returncode == 0, done.stderr
    return pages


def test_every_document_is_a_page_and_in_the_sidebar(site):
    first = (site / "index.html").read_text()
    documents = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "tutorials").glob("*.md"), ROOT / "INSTALL.md"]
    for document in documents:
        page = document.relative_to(ROOT).with_suffix(".html").as_posix()
        assert (site / page).is_file()
        assert f'href="{page}"' in first, page


@pytest.mark.parametrize(
    ("page", "words", "not_there"),
    [
        ("reproduce", "recipe debiformer_small", "make_photos"),
        ("fine-tune", "tools.make_photos", "eval_set"),
        ("cluster", "slurm=mine", "DEBIFORMER_RELEASES"),
    ],
)
def test_tutorials_hold_the_sections_that_they_are_of(site, page, words, not_there):
    body = re.search("<article.*</article>", (site / "docs" / "tutorials" / f"{page}.html").read_text(), re.DOTALL)[0]
    text = re.sub("<[^>]+>", "", body)
    assert words in text
    assert not_there not in text


def test_nothing_is_fetched_to_show_a_page(site):
    sources = (
        r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']([^"']+)"""
        r"""|<link[^>]*rel="(?:stylesheet|preload|icon)"[^>]*href="([^"]+)"""
    )
    for page in Path(site).rglob("*.html"):
        for found in re.findall(sources, page.read_text()):
            assert not "".join(found).startswith(("http:", "https:", "//")), (page, found)
    for sheet in Path(site).rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", sheet.read_text()), sheet
