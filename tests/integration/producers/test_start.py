"""Publishing in the background: when the trainer may go on, and what it hears of a failure."""

from __future__ import annotations

import logging
import threading

import pytest
import torch

from tests.integration.producers.reader import digest_of_model
from tests.nats_server import NatsServer
from tests.unit.producers.fake_devices import FakeDevices
from weightbus.producers.blocking import BlockingPublisher
from weightbus.producers.errors import PublisherClosed, SealFailed, VersionNotNew
from weightbus.producers.publisher import PublisherOptions

OPTIONS = PublisherOptions(linger_s=0.0, close_wait_s=0.1)


def weights(version: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((1000,), float(version))}


def test_start_returns_before_the_version_is_announced(nats_server: NatsServer, model: str) -> None:
    devices, announce = FakeDevices(), threading.Event()
    options = PublisherOptions(slots="device", linger_s=0.0, close_wait_s=0.1)
    with BlockingPublisher(
        nats_server.settings, model, options=options, devices=devices
    ) as publisher:
        digest = devices.fakes[0].open_digest

        def held_back(layout: object) -> object:
            announce.wait(30)
            return digest(layout)  # type: ignore[arg-type]

        devices.fakes[0].open_digest = held_back  # type: ignore[assignment, method-assign]
        tensors = weights(1)
        publication = publisher.start(tensors, 1)
        tensors["w"].zero_()
        assert not publication.is_done
        with pytest.raises(TimeoutError):
            publication.result(0.01)
        announce.set()
        ready = publication.result(30)
        assert ready.weights_digest == digest_of_model(weights(1).values())
        assert publication.is_done
    devices.cuda.assert_clean()


def test_versions_follow_each_other_when_they_are_published_in_the_background(
    nats_server: NatsServer, model: str
) -> None:
    with BlockingPublisher(nats_server.settings, model, options=OPTIONS) as publisher:
        publications = [publisher.start(weights(version), version) for version in range(1, 5)]
        for version, publication in enumerate(publications, 1):
            ready = publication.result(30)
            assert ready.version == publication.version == version
            assert ready.weights_digest == digest_of_model(weights(version).values())
        assert publisher.publish(weights(9), 9).version == 9
        last = publisher.start(weights(10), 10)
    assert last.result(0).version == 10, "what is under way is announced before the end"


def test_start_raises_when_nothing_was_copied(nats_server: NatsServer, model: str) -> None:
    with BlockingPublisher(nats_server.settings, model, options=OPTIONS) as publisher:
        publisher.publish(weights(3), 3)
        with pytest.raises(VersionNotNew):
            publisher.start(weights(2), 2)
        publisher.start(weights(4), 4).result(30)
    with pytest.raises(PublisherClosed):
        publisher.start(weights(5), 5)


def test_failure_is_logged_when_it_comes_after_the_copy(
    nats_server: NatsServer, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    options = PublisherOptions(linger_s=0.0, close_wait_s=0.1, seal_timeout_s=0.5)
    with (
        caplog.at_level(logging.ERROR, "weightbus.producers.blocking"),
        BlockingPublisher(
            nats_server.settings, model, rank=0, world_size=2, options=options
        ) as publisher,
    ):
        publication = publisher.start(weights(1), 1)
        with pytest.raises(SealFailed):
            publication.result(30)
    assert [record.getMessage()[:29] for record in caplog.records] == [
        "version 1 was not published: "
    ]
