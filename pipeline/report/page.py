"""The page of the comparison: tables, figures, and the facts that one needs to judge them.

In: tables, figures and facts, as text ready to read; a plan, for the facts. Out: one self-contained HTML file, with its
styles and figures inside and no scripts, for screens of any width, dark or light, and for paper.
"""

import importlib.metadata
import importlib.resources
import json
import os
import platform
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ...cache.files import write_atomically
from ..world.world import world_folder
from .plan import Plan

TOY = (
    "A toy: a made-up language and a Gemma-3 of under a million parameters, trained in minutes. It shows what the "
    "methods do to it, under equal conditions; it says little about language models."
)


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: what it shows.
        header: one name for each column; the first column names the rows.
        rows: one cell for each column, as shown.
        prose: whether its cells are sentences, which the page wraps.
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
    """A header and rows of cells as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


@dataclass(frozen=True)
class PageFigure:
    """A figure.

    Attributes:
        caption: what it shows.
        svg: the text of an SVG file with a `viewBox`.
        alt: the description for readers who cannot see it.
    """

    caption: str
    svg: str
    alt: str


@dataclass(frozen=True)
class Page:
    """All that a page shows, from top to bottom.

    Attributes:
        title: its heading.
        note: what a reader must know first, such as that the model is a toy; empty for none.
        lead: the figure above the tables; None for none.
        tables: the tables.
        figures: the figures.
        facts: hardware, versions, command and time, by name.
    """

    title: str
    note: str
    lead: PageFigure | None = None
    tables: list[Table] = field(default_factory=list)
    figures: list[PageFigure] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)


def write_page(path: Path, page: Page) -> None:
    """Writes the page as one HTML file, whole or not at all."""
    figures = [(figure, _inline(figure, f"figure-{number}-")) for number, figure in enumerate(page.figures, 1)]
    leading = [(page.lead, _inline(page.lead, "figure-0-"))] if page.lead else []
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = importlib.resources.files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8")
    html = environment.from_string(template).render(page=page, leading=leading, figures=figures)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (html + "\n").encode())


def _inline(figure: PageFigure, prefix: str) -> Markup:
    """The SVG as a part of the page; the prefix keeps its ids and styles apart from those of other figures."""
    root = ET.fromstring(figure.svg)
    box = root.attrib["viewBox"].split()
    for element in root.iter():
        # In HTML, SVG tags and attributes have no namespace.
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


def note_of(plan: Plan) -> str:
    """The note above the tables of a plan: what its results can show."""
    name = Path(plan.name).stem
    limits = f"{len(plan.config.seeds)} seed{'s' if len(plan.config.seeds) > 1 else ''}, held-out pairs"
    return f"{TOY} ({limits}.)" if is_toy(plan) else f"Profile {name}: {limits}."


def short_note(plan: Plan) -> str:
    """The same in a few words, for the foot of a figure."""
    return "embedded toy world, under 1 M parameters" if is_toy(plan) else f"profile {Path(plan.name).stem}"


def is_toy(plan: Plan) -> bool:
    """Whether a plan's model is that of the embedded world."""
    return Path(plan.model).is_relative_to(world_folder())


def facts_of(plan: Plan, command: str) -> dict[str, str]:
    """Command, hardware, versions and settings, by name; for the embedded world also its baselines and SAEs."""
    import torch

    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("fpo", "torch", "transformers", "sae-lens", "datasets")
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    facts = {
        "Command": command,
        "Hardware": f"{processor_name()}, {os.cpu_count()} cores, {gpu}; {plan.config.jobs} runs at a time",
        "Versions": f"Python {platform.python_version()}, {versions}",
        "Settings": f"profile {Path(plan.name).name}; seeds {', '.join(map(str, plan.config.seeds))}",
    }
    if is_toy(plan):
        world = json.loads((world_folder() / "world.json").read_text())
        quality = ", ".join(
            f"{site} {sae['l0']:.0f} / {sae['explained_variance']:.2f}" for site, sae in world["saes"].items()
        )
        facts["Right by length alone, by one word alone"] = ", ".join(
            f"{100 * v:.1f} %" for v in world["baselines"].values()
        )
        facts["SAEs, L0 / explained variance"] = quality
        facts["Making the world took"] = f"{world['seconds']:.0f} s"
    return facts


def processor_name() -> str:
    """The processor's name from /proc/cpuinfo, else from `platform`."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        names = [
            line.split(":", 1)[1].strip() for line in path.read_text().splitlines() if line.startswith("model name")
        ]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
