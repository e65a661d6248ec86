"""Which page of Weights & Biases is a run's: the project, the entity and the id in its manifest.

Project and entity come from the settings of the first start with W&B, and stay with the run like its
id. An instance that lacks these settings, or has others, goes on with the same page.
"""

import os
import re
import secrets
import shlex
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from wds_train.checkpoint.run_manifest import ADDRESS, Page, RunManifest
from wds_train.errors import RunError, WdsTrainError
from wds_train.tracking.wandb_board import Board, one_line

DEFAULT_PROJECT = "wds-train"
SETTINGS = {"project": "WANDB_PROJECT", "entity": "WANDB_ENTITY"}

# W&B's client gives no status codes, only texts.
DELETED = re.compile("previously created and deleted")
UNANSWERED = re.compile(r"timed out|deadline exceeded|giving up|connection|no such host|(HTTP|error) 5\d\d")
KEY_REFUSED = re.compile(r"(HTTP|error) 401|not logged in|unauthenticated|invalid api key", re.I)

Change = Callable[[RunManifest], RunManifest]


class PageError(RunError):
    """The run's page could not be opened; the message says why in a sentence."""


class RunPage:
    """The page of the run at `run_url`.

    `amend` writes a changed manifest and returns what is then there. `say` tells the person.
    """

    def __init__(
        self,
        manifest: RunManifest,
        run_url: str,
        amend: Callable[[Change], RunManifest],
        say: Callable[[str], None],
    ) -> None:
        self.manifest, self._run_url, self._amend, self._say = manifest, run_url, amend, say
        self._written = manifest.page

    def settle(self, project: str | None = None, entity: str | None = None) -> None:
        """Settle where the page is: where the run has it, else where the settings say.

        Args:
            project: Move the page there. It is the run's once W&B has opened it.
            entity: The same.
        """
        own, asked = self.manifest.page, {"project": project, "entity": entity}
        chosen = {name: asked[name] or self._own_or_given(name, getattr(own, name)) for name in SETTINGS}
        page = Page(chosen["project"] or DEFAULT_PROJECT, chosen["entity"], own.url)
        moved = any(asked.values()) and page != own
        if moved:
            self.manifest = replace(self.manifest, page=replace(page, url=""))
        else:
            self._remember(page)

    def _own_or_given(self, name: str, own: str) -> str:
        """The run's own project or entity, else that of the settings. Says which setting is not used."""
        given = _given(SETTINGS[name])
        if own and given and given != own:
            self._say(
                f"W&B: this run's {name} is {own}, so {SETTINGS[name]}={given} is not used; to move the page, type "
                f"wds-train wandb {shlex.quote(self._run_url)} --{name} {shlex.quote(given)}"
            )
        return own or given

    def open(self, mode: str, config: dict[str, Any], **settings: Any) -> Board:
        """Open the page, under a new id where a person deleted it.

        Args:
            mode: "online" or "offline".
            config: What the page shows besides the recipe and the dataset.
            settings: More fields of `wandb.Settings`.

        Raises:
            PageError: W&B does not answer, or refuses.
            WdsTrainError: The new id could not be written into the manifest.
        """
        try:
            board = self._open(mode, config, settings)
        except Exception as error:
            if not DELETED.search(str(error)):
                raise self._explained(error) from error
            self._renew()
            try:
                board = self._open(mode, config, settings)
            except Exception as second:
                raise self._explained(second) from second
        self._found(board.page if board.page.url else self.manifest.page)
        return board

    def _open(self, mode: str, config: dict[str, Any], settings: dict[str, Any]) -> Board:
        try:
            return Board.open(self.manifest, mode, config, **settings)
        except Exception:
            Board.forget()
            raise

    def _renew(self) -> None:
        """Give the run a new id. It is written before a page has it, so that a kill leaves no second page."""
        old, new = self.manifest.wandb_id, secrets.token_hex(4)

        def renewed(found: RunManifest) -> RunManifest:
            if found.wandb_id != old:  # another process has met the same
                return found
            return replace(found, wandb_id=new, page=replace(found.page, url=""))

        amended = self._amend(renewed)
        self._written = amended.page
        self.manifest = replace(self.manifest, wandb_id=amended.wandb_id)
        self._say(
            f"W&B: the run's page {old} was deleted there; its history goes to a new page, {self.manifest.wandb_id}"
        )

    def _found(self, page: Page) -> None:
        """Remember the page that W&B has opened."""
        before = self._written.url
        if before and page.url and page.url != before:
            self._say(f"W&B: the run's page is now {page.url}; before, it was {before}")
        if ADDRESS.fullmatch(page.url):
            self._remember(page)

    def _remember(self, page: Page) -> None:
        """Write `page` into the manifest. Where that fails, the page is the right one all the same."""
        self.manifest = replace(self.manifest, page=page)
        if page == self._written:
            return
        wandb_id = self.manifest.wandb_id
        try:
            self._amend(lambda found: replace(found, page=page) if found.wandb_id == wandb_id else found)
            self._written = page
        except WdsTrainError as error:
            self._say(
                f"W&B: the run could not note that its project is {page.project} ({one_line(error)}); "
                "the next start takes it from the settings"
            )

    def _explained(self, error: Exception) -> PageError:
        """The sentence for what W&B raised. Settings that W&B refuses before there is a page are forgotten."""
        import wandb

        text, page = one_line(error), self.manifest.page
        if not isinstance(error, wandb.Error):
            return PageError(f"W&B failed ({text})")
        if UNANSWERED.search(text):
            return PageError(f"W&B does not answer ({text})")
        if page == self._written and not page.url:
            self._remember(Page())
            self.manifest = replace(self.manifest, page=page)  # for an offline run
        if isinstance(error, wandb.errors.AuthenticationError) or KEY_REFUSED.search(text):
            return PageError(f"W&B refuses the API key ({text}); set WANDB_API_KEY to a right one, or `wandb login`")
        where = f"project {page.project}" + (f" of {page.entity}" if page.entity else "")
        return PageError(
            f"W&B refuses {where} ({text}); see that it is there and that the API key has rights to it, or "
            f"name another: wds-train wandb {shlex.quote(self._run_url)} --project NAME --entity NAME"
        )


def _given(variable: str) -> str:
    """The value of a setting, "" where it has none."""
    value = os.environ.get(variable, "").strip()
    if not value.isprintable():
        raise PageError(f"{variable} is {value!r:.60}, which cannot be a name in W&B")
    return value
