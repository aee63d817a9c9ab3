"""Unit tests of the web page: its state and its server."""
