"""A report as one HTML file that needs no network: how any of them is rendered, guarded and written.

Every value that comes from a file is escaped, in the HTML and in the JSON that the page's script draws from. A content
security policy allows the one style and the one script of the page, each by its hash, and nothing else: whatever a
label may hold, it cannot run and nothing is fetched.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from scarcade import __version__
from scarcade.engine.errors import StorageError
from scarcade.jobs.console import seconds
from scarcade.jobs.report_words import percent, short


def write_page(path: Path, template: str, *, styles: Sequence[str], scripts: Sequence[str], **values: Any) -> Path:
    """Render `template` with `values` to `path`; templates, `styles` and `scripts` are files beside this one.

    The page has one style and one script: those given, in their order. A template is rendered as it is written, so a
    page of many parts needs the memory of one of them.

    Raises:
        StorageError: it cannot be written.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        # A name may hold half a character (a file name that is not UTF-8); it must not cost the report.
        with open(temporary, "w", encoding="utf-8", errors="replace") as file:
            file.writelines(_rendered(template, styles, scripts, values))
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _rendered(template: str, styles: Sequence[str], scripts: Sequence[str], values: dict[str, Any]) -> Any:
    folder = Path(__file__).parent
    style = "\n".join((folder / name).read_text(encoding="utf-8") for name in styles)
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in scripts)
    # Line breaks between tags would be a third of what the browser has to keep of the page.
    text = re.sub(r"(?<=[>}])\s*\n\s*(?=[<{])", "", (folder / template).read_text(encoding="utf-8"))
    environment = jinja2.Environment(autoescape=True)
    environment.filters |= {
        "short": short,
        "percent": lambda value: "" if value is None else percent(value),
        "seconds": lambda value: "" if value is None else seconds(value),
        "thousands": lambda value: "" if value is None else f"{value:,}",
    }
    return environment.from_string(text).stream(
        policy=policy(style, script),
        style=Markup(style),
        script=Markup(script),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        **values,
    )


def policy(style: str, script: str) -> str:
    """The content security policy of a page with this style and this script."""

    def hashed(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return (
        f"default-src 'none'; style-src 'sha256-{hashed(style)}'; script-src 'sha256-{hashed(script)}'; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def island(value: Any) -> Markup:
    """`value` as JSON that can stand in a <script> element: nothing in it ends the element or opens a comment."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
