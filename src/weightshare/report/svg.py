"""A matplotlib figure as an SVG that belongs to the page it stands in."""

import io
import re
import warnings
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

from weightshare.report.style import INK, house_style

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

_TIP = "tip:"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "{http://www.w3.org/1999/xlink}href"


def tooltip(artist: "Artist", text: str) -> None:
    """Show ``text`` when the pointer rests on ``artist``."""
    artist.set_gid(_TIP + text)


def svg(figure: "Figure") -> str:
    """Return ``figure`` as an SVG element: theme colours, tooltips, the same bytes each time."""
    buffer = io.BytesIO()
    # The style again, because matplotlib makes tick labels only now. A glyph its own font lacks is
    # no loss: the reader's browser draws the text.
    with house_style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK[1:].partition("}")[0])
    # Control characters, as in the tokens of a language model, have no place in XML.
    root = ET.fromstring(re.sub(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]", b"?", buffer.getvalue()))
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    _tips_to_titles(root)
    _inherit(root)
    return ET.tostring(root, encoding="unicode") + "\n"


def scoped(text: str, prefix: str, label: str = "") -> str:
    """Return an SVG ready to stand in a page with others: prefixed identifiers, a spoken label."""
    root = ET.fromstring(text)
    root.set("role", "img")
    root.set("aria-label", label)
    for element in root.iter():
        if "id" in element.attrib:
            element.set("id", prefix + element.attrib["id"])
        for name, value in element.attrib.items():
            if name in {_XLINK, "href"} and value.startswith("#"):
                element.set(name, "#" + prefix + value[1:])
            elif "url(#" in value:
                element.set(name, value.replace("url(#", f"url(#{prefix}"))
    return ET.tostring(root, encoding="unicode")


def _tips_to_titles(root: ET.Element) -> None:
    """Turn tooltip identifiers into <title> elements, and drop those that nothing refers to."""
    used = {
        name
        for element in root.iter()
        for key, value in element.attrib.items()
        if key != "id"
        for name in re.findall(r"(?:^|url\()#([^)]+)", value)
    }
    for element in root.iter():
        name = element.get("id", "")
        if name.startswith(_TIP):
            title = ET.Element(f"{{{_SVG}}}title")
            title.text = name.removeprefix(_TIP)
            element.insert(0, title)
        if name and name not in used:
            del element.attrib["id"]


def _inherit(root: ET.Element) -> None:
    """Let the page set font and ink; keep matplotlib's rule for all elements inside the figure."""
    for defs in root.findall(f"{{{_SVG}}}defs"):
        for style in defs.findall(f"{{{_SVG}}}style"):
            defs.remove(style)
        if not len(defs):
            root.remove(defs)
    root.set("style", f"stroke-linejoin: round; stroke-linecap: butt; font-family: {_FONT}")
    for element in root.iter():
        for name, value in element.attrib.items():
            element.set(name, re.sub(rf"({INK}|#000000)\b", "currentColor", value))
    for text in root.iter(f"{{{_SVG}}}text"):
        rule = re.sub(r"font-family: [^;]*;? ?", "", text.get("style", ""))
        text.set("style", rule if "fill:" in rule else f"fill: currentColor; {rule}")
