"""A run's page in Weights & Biases: the project, the entity and the id in its manifest.

Project and entity come from the settings of the first start with W&B, and stay with the run like
its id. An instance that lacks these settings, or has others, goes on with the same page.
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
UNANSWERED = re.compile(
    r"timed out|deadline exceeded|giving up|connection|no such host|(HTTP|error) 5\d\d"
)
KEY_REFUSED = re.compile(r"(HTTP|error) 401|not logged in|unauthenticated|invalid api key", re.I)

Change = Callable[[RunManifest], RunManifest]


class PageError(RunError):
    """The run's page could not be opened. The message says why in a sentence."""


class RunPage:
    """The page of a run.

    Args:
        manifest: The run's.
        run_url: The run's address.
        amend: Writes a changed manifest, and returns the one that is then there.
        say: Prints a line.
    """

    def __init__(
        self,
        manifest: RunManifest,
        run_url: str,
        amend: Callable[[Change], RunManifest],
        say: Callable[[str], None],
    ) -> None:
        self.manifest = manifest
        self._run_url = run_url
        self._amend = amend
        self._say = say
        self._written = manifest.page

    def settle(self, project: str | None = None, entity: str | None = None) -> None:
        """Settle where the page is: where the run has it, else where the settings say.

        Args:
            project: Move the page there. It is the run's once W&B has opened it.
            entity: The same.
        """
        own = self.manifest.page
        chosen_project = project or self._own_or_given("project", own.project) or DEFAULT_PROJECT
        chosen_entity = entity or self._own_or_given("entity", own.entity)
        page = Page(chosen_project, chosen_entity, own.url)
        is_moved = (project or entity) and page != own
        if is_moved:
            self.manifest = replace(self.manifest, page=replace(page, url=""))
        else:
            self._remember(page)

    def _own_or_given(self, name: str, own: str) -> str:
        """Return the run's own project or entity, else that of the settings.

        Say which is not used.
        """
        given = _given(SETTINGS[name])
        if own and given and given != own:
            self._say(
                f"W&B: this run's {name} is {own}, so {SETTINGS[name]}={given} is not used; to "
                "move the page, type "
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
                raise self._explain(error) from error
            self._renew()
            try:
                board = self._open(mode, config, settings)
            except Exception as second:
                raise self._explain(second) from second
        self._found(board.page if board.page.url else self.manifest.page)
        return board

    def _open(self, mode: str, config: dict[str, Any], settings: dict[str, Any]) -> Board:
        try:
            return Board.open(self.manifest, mode, config, **settings)
        except Exception:
            Board.forget()
            raise

    def _renew(self) -> None:
        """Give the run a new id.

        It is written before a page has it, so that a kill leaves no second page.
        """
        old = self.manifest.wandb_id
        new = secrets.token_hex(4)

        def renewed(found: RunManifest) -> RunManifest:
            if found.wandb_id != old:  # another process has done it already
                return found
            return replace(found, wandb_id=new, page=replace(found.page, url=""))

        amended = self._amend(renewed)
        self._written = amended.page
        self.manifest = replace(self.manifest, wandb_id=amended.wandb_id)
        self._say(
            f"W&B: the run's page {old} was deleted there; its history goes to a new page, "
            f"{self.manifest.wandb_id}"
        )

    def _found(self, page: Page) -> None:
        """Remember the page that W&B has opened."""
        before = self._written.url
        if before and page.url and page.url != before:
            self._say(f"W&B: the run's page is now {page.url}; before, it was {before}")
        if ADDRESS.fullmatch(page.url):
            self._remember(page)

    def _remember(self, page: Page) -> None:
        """Write `page` into the manifest. If that fails, the page is still the right one."""
        self.manifest = replace(self.manifest, page=page)
        if page == self._written:
            return
        wandb_id = self.manifest.wandb_id

        def with_page(found: RunManifest) -> RunManifest:
            if found.wandb_id != wandb_id:  # another process has given the run a new page
                return found
            return replace(found, page=page)

        try:
            self._amend(with_page)
            self._written = page
        except WdsTrainError as error:
            self._say(
                f"W&B: the run could not note that its project is {page.project} "
                f"({one_line(error)}); "
                "the next start takes it from the settings"
            )

    def _explain(self, error: Exception) -> PageError:
        """Return our error for W&B's, and forget settings that W&B refuses without a page."""
        import wandb

        text = one_line(error)
        page = self.manifest.page
        if not isinstance(error, wandb.Error):
            return PageError(f"W&B failed ({text})")
        if UNANSWERED.search(text):
            return PageError(f"W&B does not answer ({text})")
        if page == self._written and not page.url:
            self._remember(Page())
            self.manifest = replace(self.manifest, page=page)  # for an offline run
        if isinstance(error, wandb.errors.AuthenticationError) or KEY_REFUSED.search(text):
            return PageError(
                f"W&B refuses the API key ({text}); set WANDB_API_KEY to a right one, or `wandb "
                "login`"
            )
        where = f"project {page.project}"
        if page.entity:
            where += f" of {page.entity}"
        return PageError(
            f"W&B refuses {where} ({text}); see that it is there and that the API key has rights "
            "to it, or "
            f"name another: wds-train wandb {shlex.quote(self._run_url)} --project NAME --entity "
            "NAME"
        )


def _given(variable: str) -> str:
    """Return the value of a setting; "" if it is not set."""
    value = os.environ.get(variable, "").strip()
    if not value.isprintable():
        raise PageError(f"{variable} is {value!r:.60}, which cannot be a name in W&B")
    return value
