"""The parts of a report, and its files.

The files are one HTML page that needs no other, the same as Markdown, and the pictures.
"""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import jinja2

from wds_train.errors import unwritable
from wds_train.report.charts import Chart

_MARKS = re.compile(r"([\\`*_{}\[\]<>#|~$&!])")
_NUMBER = re.compile(r"[-+$≥]*\s?[\d.,]+( \S{1,3})?|–")


@dataclass(frozen=True)
class Text:
    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Code:
    kind: ClassVar[str] = "code"
    caption: str
    text: str


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        caption: The table's title.
        head: The heads of the columns.
        rows: The cells; the first of each row is its heading.
        folded: Whether a click opens it.
        heat: Values from 0 to 1 that colour the cells after the first of each row.
    """

    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False
    heat: Sequence[Sequence[float]] = ()


@dataclass(frozen=True)
class Charts:
    kind: ClassVar[str] = "charts"
    charts: Sequence[Chart]


@dataclass(frozen=True)
class Picture:
    """A JPEG, with the lines of its caption."""

    name: str
    data: bytes
    lines: Sequence[str]

    @property
    def url(self) -> str:
        return f"data:image/jpeg;base64,{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True)
class Pictures:
    kind: ClassVar[str] = "pictures"
    caption: str
    pictures: Sequence[Picture]


Block = Text | Code | Table | Charts | Pictures


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")


@dataclass(frozen=True)
class Document:
    """A report.

    `facts` are name, value and remark of what stands at the top. `notes` say what is missing.
    `link` is a name and the address of a page on the web.
    """

    title: str
    subtitle: str
    facts: Sequence[tuple[str, str, str]]
    sections: Sequence[Section]
    notes: Sequence[str] = field(default_factory=list)
    link: tuple[str, str] | None = None


def write(document: Document, folder: Path, name: str) -> Path:
    """Write `name`.html, `name`.md and the pictures.

    Args:
        document: The report.
        folder: Where they go; it is made if needed.
        name: The name of the page.

    Returns:
        The page, which is written last.

    Raises:
        UsageError: Nothing can be written there.
    """
    files: dict[str, bytes] = {}
    for section in document.sections:
        for block in section.blocks:
            if isinstance(block, Charts):
                files |= {f"{chart.name}.png": chart.png for chart in block.charts}
            elif isinstance(block, Pictures):
                files |= {picture.name: picture.data for picture in block.pictures}
    for kind in ("md", "html"):
        files[f"{name}.{kind}"] = _render(document, f"report.{kind}").encode()

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, data in files.items():
            part = folder / f"{file}.part"  # a kill leaves the file that was there
            part.write_bytes(data)
            part.replace(folder / file)
    except OSError as error:
        raise unwritable(error.filename or folder, error, "give another --out DIR") from error
    return folder / f"{name}.html"


def _render(document: Document, template: str) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=template.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["marked"] = _marked
    environment.filters["is_number"] = lambda text: bool(_NUMBER.fullmatch(text))
    return environment.get_template(template).render(document=document)


def _marked(text: str) -> str:
    """Return `text` for Markdown, with all marks escaped that would format it or be HTML."""
    return _MARKS.sub(r"\\\1", " ".join(text.split()))
