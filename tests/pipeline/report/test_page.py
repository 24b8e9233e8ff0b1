import re
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fpo.pipeline.report.page import Page, PageFigure, Table, write_page
from hypothesis import given
from hypothesis import strategies as st
from pairs import few_examples

# A clip path and a marker go by names that all drawings of a page give alike.
SVG = """<?xml version="1.0"?>
<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">
<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="40pt" viewBox="0 0 40 20">
 <defs><style type="text/css">*{stroke-linejoin: round}</style><clipPath id="p1"><rect width="4" height="2"/></clipPath>
 <path id="m1" d="M 0 0"/></defs>
 <g clip-path="url(#p1)" id="axes_1"><use xlink:href="#m1" style="fill: url(#p1)"/><text>KL &lt; 1 &amp; α</text></g>
</svg>"""
TABLE = Table("Methods", ["method", "accuracy %", "H"], [["DPO", "59.9 ± 0.3", "1.66"], ["FPO", "64.1", "1.68"]])
FACTS = {"hardware": "2 cores", "command": "fpo table --seeds 3"}


class Reader(HTMLParser):
    """Tags with attributes, and the text that a browser would show."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.cells: list[str] = []
        self.styles = ""
        self._open = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        if tag in ("th", "td"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "style":
            self.styles += data
        else:
            self.texts.append(data)
        if self._open in ("th", "td"):
            self.cells[-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def page(tmp_path: Path) -> Page:
    figures = [PageFigure("Figure 3", SVG, "KL rises"), PageFigure("Figure 4", SVG, "FPO needs least")]
    return Page("Reproduction", "Toy world.", None, [TABLE, TABLE], figures, FACTS)


def written(page: Page, folder: Path) -> Reader:
    write_page(folder / "new" / "table.html", page)
    return Reader(folder / "new" / "table.html")


def test_everything_given_is_on_the_page(page, tmp_path):
    reader = written(page, tmp_path)
    assert reader.cells == 2 * [*TABLE.header, *TABLE.rows[0], *TABLE.rows[1]]
    shown = "".join(reader.texts)
    for text in (page.title, page.note, TABLE.caption, "KL < 1 & α", "Figure 3", "Figure 4"):
        assert text in shown
    for name, value in FACTS.items():
        assert name in shown and value in shown
    assert shown.index(page.note) < shown.index(TABLE.caption)
    assert [drawing["aria-label"] for drawing in reader.named("svg")] == ["KL rises", "FPO needs least"]


def test_the_leading_figure_stands_above_the_tables_and_has_its_own_parts(page, tmp_path):
    reader = written(replace(page, lead=PageFigure("Right answers", SVG, "FPO leads")), tmp_path)
    shown = "".join(reader.texts)
    assert shown.index(page.note) < shown.index("Right answers") < shown.index(TABLE.caption) < shown.index("Figure 3")
    assert [drawing["aria-label"] for drawing in reader.named("svg")] == ["FPO leads", "KL rises", "FPO needs least"]
    assert set(Counter(tag["id"] for _, tag in reader.tags if "id" in tag).values()) == {1}


def test_the_page_needs_nothing_beside_it(page, tmp_path):
    reader = written(page, tmp_path)
    assert not reader.named("script") and not reader.named("link") and not reader.named("img")
    links = [value for _, tag in reader.tags for name, value in tag.items() if name.endswith(("href", "src")) and value]
    links += re.findall(
        r"url\(([^)]*)\)", reader.styles + " ".join(str(value) for _, tag in reader.tags for value in tag.values())
    )
    assert len(links) == 6
    ids = {tag["id"] for _, tag in reader.tags if "id" in tag}
    assert {link.removeprefix("#") for link in links} <= ids
    assert "://" not in (tmp_path / "new" / "table.html").read_text() and "@import" not in reader.styles


def test_ids_are_unique_and_each_drawing_refers_to_its_own_parts(page, tmp_path):
    reader = written(page, tmp_path)
    ids = Counter(tag["id"] for _, tag in reader.tags if "id" in tag)
    assert set(ids.values()) == {1}
    uses = [use["href"] for use in reader.named("use")]
    assert uses == ["#figure-1-m1", "#figure-2-m1"] and all(use[1:] in ids for use in uses)


def test_a_drawing_keeps_all_its_parts(page, tmp_path):
    reader = written(page, tmp_path)
    expected = Counter(element.tag.partition("}")[2] for element in ET.fromstring(SVG).iter())
    found = Counter(tag for tag, _ in reader.tags)
    # HTML's tags are read in lower case here; browsers restore SVG's own.
    assert all(found[tag.lower()] == 2 * count + (tag == "style") for tag, count in expected.items())


def test_tables_and_figures_tell_a_screen_reader_what_they_are(page, tmp_path):
    reader = written(page, tmp_path)
    assert reader.named("html") == [{"lang": "en"}]
    assert any(meta.get("name") == "viewport" for meta in reader.named("meta"))
    scopes = Counter(cell["scope"] for cell in reader.named("th"))
    assert scopes == {"col": 2 * 3, "row": 2 * 2}
    assert len(reader.named("caption")) == 2 and len(reader.named("figcaption")) == 2
    assert all(drawing["role"] == "img" for drawing in reader.named("svg"))


def test_empty_parts_leave_no_heading(tmp_path):
    reader = written(Page("Title", ""), tmp_path)
    assert not reader.named("section") and not reader.named("p") and len(reader.named("h1")) == 1


hostile = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=20) | st.sampled_from(
    ["<script>alert(1)</script>", '" onload="x', "</td>", "&amp;", "{{ page }}", "</svg>", "'>"]
)


@few_examples
@given(hostile, hostile, hostile)
def test_any_text_comes_back_as_it_was_given(tmp_path_factory, first, second, third):
    table = Table(first, ["method", second], [[third, first]])
    page = Page(f"T{first}", third, None, [table], [PageFigure(second, SVG, first)], {"f" + second: third})
    reader = written(page, tmp_path_factory.mktemp("page"))
    assert reader.cells == ["method", second, third, first]
    assert not reader.named("script")
    assert reader.named("svg")[0]["aria-label"] == first
    shown = "".join(reader.texts)
    assert all(text in shown for text in (f"T{first}", second, third))
    assert not any(name.startswith("on") for _, tag in reader.tags for name in tag)
