"""`python -m weightbus`: the `weightbus` command."""

from __future__ import annotations

from weightbus.cli.main import main

main()
