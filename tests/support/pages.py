"""What `wds-train report` and `wds-train compare` print and write, read again."""

from html.parser import HTMLParser
from pathlib import Path

import pytest
from answers import answer


class Page(HTMLParser):
    """What of a page the tests look at: `tables`, each a list of rows of texts, by caption; `facts` by name; all `tags`."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.tags = "", list[tuple[str, dict[str, str | None]]]()
        self.tables, self.facts, self._terms = (
            dict[str, list[list[str]]](),
            dict[str, tuple[str, ...]](),
            list[str](),
        )
        self._open: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self._open.append(tag)
        if dict(attrs).get("role") == "region":
            self._table = self.tables.setdefault(str(dict(attrs)["aria-label"]), [])
        if tag == "tr":
            self._table.append([])
        if tag in ("th", "td"):
            self._table[-1].append("")
        if tag == "dt":
            self._terms = []
        if tag in ("dt", "dd"):
            self._terms.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass
        if tag == "dd":
            self.facts[self._terms[0]] = tuple(self._terms[1:])

    def handle_data(self, data: str) -> None:
        if {"style", "svg"} & {*self._open}:
            return
        self.text += data
        if {"th", "td"} & {*self._open}:
            self._table[-1][-1] += data
        if {"dt", "dd"} & {*self._open}:
            self._terms[-1] += data


def page_of(
    capsys: pytest.CaptureFixture[str], run: Path, out: Path, *arguments: object
) -> tuple[Page, str]:
    """The report, and what was said on the way. The run is as it was before."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code, printed, said = answer(
        capsys, "report", run, "--out", out, "--workers", 0, "--device", "cpu", *arguments
    )
    assert (code, printed) == (0, str(out / "report.html")), said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    return Page(out / "report.html"), said
