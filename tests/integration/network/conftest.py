"""A network of namespaces; its tests are skipped, with the reason, where there can be none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.network.namespaces import Network, open_network, why_no_network

HOSTS = 3


@pytest.fixture
def needs_network() -> None:
    """For tests that make networks themselves."""
    if reason := why_no_network():
        pytest.skip(reason)


@pytest.fixture
def network(needs_network: None) -> Iterator[Network]:
    """Three hosts, and whatever runs outside of them."""
    with open_network(HOSTS) as network:
        yield network
