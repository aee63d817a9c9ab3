"""Transfers between processes through the transfer engine."""
