"""What a report is made of, and its files: one HTML page that needs no other, the same as Markdown, and the pictures."""

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
    """Rows of texts, the first of each its heading. `heat`, from 0 to 1, colours the other cells; one that is `folded` is
    opened by a click.
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
    """A JPEG and what it shows, a line each."""

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
    """Write `name`.html, `name`.md and the pictures into `folder`; the page, which comes last. `UsageError` where nothing
    can be written.
    """
    blocks = [block for section in document.sections for block in section.blocks]
    files = {f"{c.name}.png": c.png for block in blocks if isinstance(block, Charts) for c in block.charts}
    files |= {p.name: p.data for block in blocks if isinstance(block, Pictures) for p in block.pictures}
    files |= {f"{name}.{kind}": _render(document, f"report.{kind}").encode() for kind in ("md", "html")}
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
    """`text` for Markdown, in which it must neither format nor be HTML."""
    return _MARKS.sub(r"\\\1", " ".join(text.split()))
