"""One HTML page that stands alone: no network, no script, no file beside it.

Templates escape every text that is put into them, for captions are whatever a user's data holds; and the page's own
security policy forbids the browser to load anything that is not written into it.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mimir_shared.wording import format_size

_TEMPLATES = Path(__file__).parent


def render_page(template: Path, values: Mapping[str, object]) -> str:
    """Fill a template, which may build on `base.html.j2`, `pictures.html.j2` and `charts.html.j2` of this folder."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, _TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": format_size, "duration": format_duration, "number": format_number}
    return environment.get_template(template.name).render(values)


def chart_colours() -> list[str]:
    """The colours of lines in the light, as #rrggbb: for pictures that are to look like the page."""
    style = (_TEMPLATES / "style.css").read_text(encoding="utf-8")
    found: dict[str, str] = {}
    for number, colour in re.findall(r"--c(\d): (#[0-9a-f]{6})", style):
        found.setdefault(number, colour)
    return [found[number] for number in sorted(found)]


def format_duration(seconds: float) -> str:
    """7.853 → "7.9 s", 83 → "1 min 23 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def format_number(value: float) -> str:
    """Thousands in groups; of a fraction three figures."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3g}"
