"""The page of the reproduction table: one HTML file that needs nothing beside it.

In: tables, figures and facts, all as text that is ready to read. Out: a page with its styles and figures inside and no
scripts, for screens of any width, dark or light, and for paper.
"""

import importlib.resources
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ...cache.files import write_atomically


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: what it shows.
        header: one name a column; the first column names the rows.
        rows: one cell a column, as shown.
        prose: whether its cells are sentences, which wrap on the page.
    """

    caption: str
    header: list[str]
    rows: list[list[str]]
    prose: bool = False

    @property
    def markdown(self) -> str:
        """The table in Markdown, its caption above."""
        return f"**{self.caption}**\n\n{markdown(self.header, self.rows)}\n"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


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
        figures: in their order.
        facts: name to value: hardware, versions, command, date, wall time.
    """

    title: str
    note: str
    tables: list[Table] = field(default_factory=list)
    figures: list[PageFigure] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)


def write_page(path: Path, page: Page) -> None:
    """Writes the page as one HTML file, whole or not at all."""
    figures = [(figure, _inline(figure, f"figure-{number}-")) for number, figure in enumerate(page.figures, 1)]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = importlib.resources.files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8")
    html = environment.from_string(template).render(page=page, figures=figures)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (html + "\n").encode())


def _inline(figure: PageFigure, prefix: str) -> Markup:
    """The SVG as a part of the page; the prefix keeps its names and styles from those of the other drawings."""
    root = ET.fromstring(figure.svg)
    box = root.attrib["viewBox"].split()
    for element in root.iter():
        # HTML knows SVG's tags by their bare names.
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
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
