"""What several test files begin with."""

import pytest


@pytest.fixture(scope="session")
def local(tmp_path_factory):
    """Shards of points in a local folder, to be served by bad_server.py; nobody writes there."""
    from bad_server import write_shards

    return write_shards(tmp_path_factory.mktemp("local"))
