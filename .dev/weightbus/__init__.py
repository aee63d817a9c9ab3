"""Weight bus: fresh weights into running inference engines, as events on a message bus."""

from __future__ import annotations

__all__ = ("__version__",)

__version__ = "0.1.0"
