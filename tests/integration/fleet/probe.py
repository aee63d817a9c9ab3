"""Asks an engine what it holds, again and again: every answer must be one version, whole."""

from __future__ import annotations

import anyio

from tests.integration.fleet.weights import fingerprints_of
from weightbus.consumers.engines.torch.client import TorchEngineClient
from weightbus.consumers.errors import ConsumerError

__all__ = ("Probe",)

ANSWER_S = 10.0
PAUSE_S = 0.02


class Probe:
    """One engine's answers, as its users see them: while it is paused there are none."""

    def __init__(self, client: TorchEngineClient, model: str) -> None:
        self._client, self._model = client, model
        self._mixed: list[str] = []
        self.versions: list[int] = []
        """What was served, in order; what was served before this model is left out."""

    async def run(self, first_version: int) -> None:
        while True:
            try:
                held = await self._client.fingerprint(ANSWER_S)
            except ConsumerError:  # it is paused, or its ranks are being started
                pass
            else:
                if held.version >= first_version:
                    self._note(held.version, held.fingerprints)
            await anyio.sleep(PAUSE_S)

    def check(self) -> None:
        """No answer was a mix, and none was older than one before."""
        assert self._mixed == []
        assert self.versions == sorted(self.versions)

    def _note(self, version: int, found: tuple[str, ...]) -> None:
        if version not in self.versions[-1:]:
            self.versions.append(version)
        if found != fingerprints_of(self._model, version, len(found)):
            self._mixed.append(f"it said that it served {version}, and held something else")
