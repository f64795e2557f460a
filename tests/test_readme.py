"""The README sends nobody to a place that is not there."""

import re

import pytest
from support import ROOT

ROWS = re.search(r"^\| looking for \| open \|\n\|---\|---\|\n((?:\|.*\n)+)", (ROOT / "README.md").read_text(), re.M)[1]


def anchors(path):
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("row", ROWS.splitlines())
def test_readme_names_files_names_and_headings_that_exist(row):
    found = re.findall(r"`([\w/]+\.py)`(?:: ((?:`\w+`(?:, )?)+))?", row)
    for path, names in found:
        content = (ROOT / path).read_text()
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^(?:class|def) {name}\b", content, re.M), (path, name)
    links = re.findall(r"\]\(([\w/.]+)(?:#([\w-]+))?\)", row)
    for path, anchor in links:
        assert not anchor or anchor in anchors(ROOT / path)
        assert (ROOT / path).is_file()
    assert found or links
