"""What every test gets: a cache folder of its own, never the user's."""

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """The folder that attngen caches in, here and in the processes that tests start."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNGEN_CACHE", str(folder))
        yield folder


@pytest.fixture
def process_environment():
    """Of a process that a test starts: this one's, without what a shell may have set."""
    dropped = ("JAX_", "XLA_", "ATTNGEN_", "COLUMNS")
    kept = {n: v for n, v in os.environ.items() if not n.startswith(dropped)}
    return kept | {"ATTNGEN_CACHE": os.environ["ATTNGEN_CACHE"]}
