"""What several test files begin with."""

import os

import pytest


@pytest.fixture(scope="session")
def local(tmp_path_factory):
    """Shards of points in a local folder, to be served by bad_server.py; nobody writes there."""
    from bad_server import write_shards

    return write_shards(tmp_path_factory.mktemp("local"))


@pytest.fixture(scope="session")
def cluster_of_all():
    """Yield the Slurm cluster of all tests; skip where none can run, or fail if NEED_SLURM is set."""
    from slurm.cluster import cluster, why_not

    if (reason := why_not()) is not None:
        assert not os.environ.get("NEED_SLURM"), reason
        pytest.skip(reason)
    with cluster() as running:
        yield running


@pytest.fixture(scope="session")
def publishable(tmp_path_factory):
    """Make runs that can be published, see publishable.py."""
    from publishable import make_runs

    return make_runs(tmp_path_factory.mktemp("publishable"))


@pytest.fixture
def slurm(cluster_of_all):
    """Yield a Slurm cluster of two nodes without jobs."""
    yield cluster_of_all
    cluster_of_all.clear()
