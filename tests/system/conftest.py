"""One compilation cache for all commands of a session: many of them run the same programs."""

import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory, worker_id):
    """The folder, empty at the start of the session, that the workers of pytest-xdist share."""
    mine = tmp_path_factory.getbasetemp()
    return (mine if worker_id == "master" else mine.parent) / "compilation_cache"
