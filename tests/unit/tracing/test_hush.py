"""Exports of ours log nothing; those of others, in other threads, log as ever."""

from __future__ import annotations

import logging
import threading

import pytest

from weightbus.tracing.hush import hushed

LOGGER = logging.getLogger("opentelemetry.exporter.test")


def test_what_an_export_logs_is_kept_and_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with hushed() as said:
        LOGGER.info("begins")
        LOGGER.warning("retrying")
        LOGGER.error("failed: %d", 503)
    assert (said.last, caplog.messages) == ("failed: 503", [])
    LOGGER.warning("of a trainer")
    assert caplog.messages == ["of a trainer"]


def test_exports_in_other_threads_log_as_ever(caplog: pytest.LogCaptureFixture) -> None:
    with hushed() as said:
        other = threading.Thread(target=LOGGER.error, args=("of a trainer",))
        other.start()
        other.join()
    assert (said.last, caplog.messages) == ("", ["of a trainer"])


def test_other_loggers_log_while_an_export_runs(caplog: pytest.LogCaptureFixture) -> None:
    with hushed():
        logging.getLogger("trainer").warning("loss is NaN")
    assert caplog.messages == ["loss is NaN"]
