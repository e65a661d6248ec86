"""Finding a run, to look at: nothing is claimed, and no thread is started."""

from wds_train.checkpoint.lease import read_run
from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.errors import NotFound
from wds_train.storage.base import Store
from wds_train.storage.open import open_store


def find_run(url: str) -> tuple[RunManifest, Store]:
    """Return the run at `url`.

    Raises:
        NotFound: There is none.
    """
    store = open_store(url)
    try:
        return read_run(store)[0], store
    except NotFound as error:
        raise NotFound(
            f"there is no run at {store.url} (no manifest.json); check the address"
        ) from error
