"""A figure saved as the product saves it, with the place of every text in it."""

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from fpo.pipeline.report.style import save
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox


class Drawing:
    """Saves a figure as the product does, and notes where each text is drawn in either file."""

    def __init__(self, figure: Figure, folder: Path, name: str) -> None:
        # By canvas, since the two files have their own resolutions.
        self.boxes: dict[Any, dict[Text, Bbox]] = {}
        draw = Text.draw

        def record(text: Text, renderer: Any) -> None:
            if text.get_visible() and text.get_text().strip():
                self.boxes.setdefault(figure.bbox.frozen().bounds, {})[text] = text.get_window_extent(renderer)
            draw(text, renderer)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Text, "draw", record)
            self.svg = save(figure, folder, name)
        assert self.svg == folder / f"{name}.svg" and len(self.boxes) == 2

    def overlaps(self) -> list[tuple[str, str]]:
        """Pairs of texts that touch; a text that leaves the figure is paired with it."""
        found = []
        for (left, bottom, width, height), texts in self.boxes.items():
            assert len(texts) > 5
            boxes = [(text.get_text(), box) for text, box in texts.items()]
            found += [(a, b) for n, (a, box) in enumerate(boxes) for b, other in boxes[:n] if box.overlaps(other)]
            for text, box in boxes:
                if box.x0 < left or box.y0 < bottom or box.x1 > left + width or box.y1 > bottom + height:
                    found.append(("figure", text))
        return found


def texts(svg: Path) -> str:
    return "\n".join("".join(element.itertext()) for element in ET.parse(svg).getroot().iter() if "text" in element.tag)
