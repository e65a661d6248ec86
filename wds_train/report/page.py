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

# Marks of Markdown and HTML: a class name or a key may hold any of them.
_MARKS = re.compile(r"([\\`*_{}\[\]<>#|~$&!])")
# A cell that is a figure, such as "≥ 1,024", "$1.40" or "98.61 %": the page aligns it right.
_NUMBER = re.compile(r"[-+$≥]*\s?[\d.,]+( \S{1,3})?|–")


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Code:
    """A command to copy, below its caption."""

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
    """Charts that stand next to each other."""

    kind: ClassVar[str] = "charts"
    charts: Sequence[Chart]


@dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes:
        name: The name of its file.
        data: The bytes of a JPEG.
        lines: The lines of its caption.
    """

    name: str
    data: bytes
    lines: Sequence[str]

    @property
    def url(self) -> str:
        """The picture as an address: the page needs no other file."""
        return f"data:image/jpeg;base64,{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True)
class Pictures:
    """Pictures in a grid, below their caption."""

    kind: ClassVar[str] = "pictures"
    caption: str
    pictures: Sequence[Picture]


Block = Text | Code | Table | Charts | Pictures
Fact = tuple[str, str, str]  # name, value and remark


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """The id of its heading, which a link can name."""
        return self.title.lower().replace(" ", "-")


@dataclass(frozen=True)
class Document:
    """A report, or a comparison of runs.

    Attributes:
        title: The page's title.
        subtitle: The line below it.
        facts: The figures at the top.
        sections: The parts of the page, in order.
        notes: Sentences on what is missing.
        link: The name and the address of a page on the web; None for no link.
    """

    title: str
    subtitle: str
    facts: Sequence[Fact]
    sections: Sequence[Section]
    notes: Sequence[str] = field(default_factory=list)
    link: tuple[str, str] | None = None


def write(document: Document, folder: Path, name: str) -> Path:
    """Write the files of a report: `name`.html, `name`.md and the pictures.

    Args:
        document: The report.
        folder: Where they go; it is made if needed.
        name: The name of the page.

    Returns:
        The page, which is written last.

    Raises:
        UsageError: Nothing can be written there.
    """
    files = _picture_files(document)
    # The page is the last file: where it is, the pictures are, too.
    for kind in ("md", "html"):
        files[f"{name}.{kind}"] = _render(document, f"report.{kind}").encode()

    # Each file is whole or not there: a kill leaves the one that was there before.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, data in files.items():
            part = folder / f"{file}.part"
            part.write_bytes(data)
            part.replace(folder / file)
    except OSError as error:
        raise unwritable(error.filename or folder, error, "give another --out DIR") from error
    return folder / f"{name}.html"


def _picture_files(document: Document) -> dict[str, bytes]:
    """Return the bytes of all pictures and charts by the names of their files."""
    files: dict[str, bytes] = {}
    for section in document.sections:
        for block in section.blocks:
            # Other blocks are text in the page itself.
            if isinstance(block, Charts):
                for chart in block.charts:
                    files[f"{chart.name}.png"] = chart.png
            elif isinstance(block, Pictures):
                for picture in block.pictures:
                    files[picture.name] = picture.data
    return files


def _render(document: Document, template: str) -> str:
    # StrictUndefined: a slip in a template is an error, not an empty place.
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
