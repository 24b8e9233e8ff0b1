"""The page of the reproduction table: one HTML file that needs nothing beside it.

In: tables, figures and facts, all as text that is ready to read. Out: a page with its styles and figures inside and no
scripts, for screens of any width, dark or light, and for paper.
"""

import importlib.resources
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ...cache.files import write_atomically

# What can run code, and styles that bring in what is not the drawing's own.
_FOREIGN_TAGS = {"script", "foreignObject"}
_OUTSIDE = re.compile(r"@import|url\(\s*['\"]?(?!#)")


@dataclass(frozen=True)
class PageTable:
    """A table.

    Attributes:
        caption: what it shows.
        header: one name a column; the first column names the rows.
        rows: one cell a column, as shown.
        prose: whether its cells are sentences, which wrap.

    Raises:
        ValueError: if there is no row, or one has not one cell a column.
    """

    caption: str
    header: list[str]
    rows: list[list[str]]
    prose: bool = False

    def __post_init__(self) -> None:
        columns = len(self.header)
        wrong = next((row for row in self.rows if len(row) != columns), None)
        if not self.rows or not columns or wrong is not None:
            found = f"the row {wrong}" if wrong is not None else f"{len(self.rows)} rows"
            raise ValueError(f"table {self.caption!r}: expected rows of {columns} cells, found {found}; fill them")


@dataclass(frozen=True)
class PageFigure:
    """A figure.

    Attributes:
        caption: what it shows.
        svg: text of an SVG file, with a `viewBox`.
        alt: what a reader who cannot see it is told.
    """

    caption: str
    svg: str
    alt: str


@dataclass(frozen=True)
class Page:
    """All of the page.

    Attributes:
        title: its heading.
        note: what a reader must know first, such as that the model is a toy; empty for none.
        tables: in their order.
        figures: likewise.
        facts: name to value: hardware, versions, command, date, wall time.
    """

    title: str
    note: str
    tables: list[PageTable] = field(default_factory=list)
    figures: list[PageFigure] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)


def write_page(path: Path, page: Page) -> None:
    """Writes the page as one HTML file, whole or not at all.

    Raises:
        ValueError: if a figure is no SVG, or refers to what is not in it.
    """
    figures = [(figure, _inline(figure, f"figure-{number}-")) for number, figure in enumerate(page.figures, 1)]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = importlib.resources.files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8")
    html = environment.from_string(template).render(page=page, figures=figures)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (html + "\n").encode())


def _inline(figure: PageFigure, prefix: str) -> Markup:
    """The SVG as a part of the page; the prefix keeps its names and styles from those of the other drawings."""
    where = f"figure {figure.caption!r}"
    try:
        root = ET.fromstring(figure.svg)
    except ET.ParseError as error:
        raise ValueError(f"{where}: expected an SVG, found no XML ({error}); draw it again") from None
    box = root.get("viewBox", "").split()
    if root.tag != "{http://www.w3.org/2000/svg}svg" or len(box) != 4:
        raise ValueError(f"{where}: expected an SVG with a viewBox, found {root.tag}; draw it again")
    for element in root.iter():
        # HTML knows SVG's tags by their bare names.
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        _refuse_foreign(where, element)
        for name, value in element.attrib.items():
            if name == "id":
                element.set(name, prefix + value)
            elif name == "href" and value.startswith("#"):
                element.set(name, f"#{prefix}{value[1:]}")
            else:
                element.set(name, value.replace("url(#", f"url(#{prefix}"))
        if element.tag == "style":
            element.text = f"#{prefix}drawing {{ {element.text} }}"
    root.attrib = {"id": f"{prefix}drawing", "viewBox": " ".join(box), "role": "img", "aria-label": figure.alt}
    root.set("style", f"--width: {float(box[2]):g}")
    return Markup(ET.tostring(root, encoding="unicode"))


def _refuse_foreign(where: str, element: ET.Element) -> None:
    handlers = [name for name in element.attrib if name.startswith("on")]
    outside = [value for value in (*element.attrib.values(), element.text or "") if _OUTSIDE.search(value)]
    link = element.get("href", "#")
    if element.tag in _FOREIGN_TAGS or handlers or outside or not link.startswith(("#", "data:image/")):
        found = f"<{element.tag}> {' '.join([*handlers, *outside, link])}"
        raise ValueError(f"{where}: expected a drawing that needs nothing else, found {found}; draw it without")
