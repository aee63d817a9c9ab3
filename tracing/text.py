"""What people read in a terminal: times, sizes and rates in three digits, and others' text.

Does no I/O. kB, MB and GB are decimal.
"""

from __future__ import annotations

__all__ = (
    "BYTES_PER_GB",
    "NS_PER_S",
    "counted",
    "format_bytes",
    "format_rate",
    "format_seconds",
    "gigabytes_per_second",
    "printable",
)

BYTES_PER_GB = 1_000_000_000
NS_PER_S = 1_000_000_000


def format_seconds(seconds: float) -> str:
    """`0.41 ms`, `12.3 ms`, `1.23 s`, `10,292 s`, `-12.3 ms`."""
    milliseconds = seconds * 1000
    if abs(milliseconds) < 999.5:
        return f"{_three_digits(milliseconds)} ms"
    return f"{_three_digits(seconds)} s"


def counted(count: int, thing: str) -> str:
    """`1 engine`, `2 engines`, `140,000 tensors`."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def format_bytes(size_bytes: int) -> str:
    """`512 B`, `1.50 kB`, `61.1 GB`."""
    for factor, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size_bytes >= 0.9995 * factor:
            return f"{_three_digits(size_bytes / factor)} {unit}"
    return f"{size_bytes} B"


def gigabytes_per_second(size_bytes: int, seconds: float) -> float | None:
    """A rate in 10^9 bytes per second; None when nothing moved or no time was measured."""
    return size_bytes / BYTES_PER_GB / seconds if size_bytes and seconds > 0 else None


def format_rate(gb_per_s: float | None) -> str:
    """`0.52`, `178`: a rate in GB/s, without its unit; empty for None."""
    if gb_per_s is None:
        return ""
    return _three_digits(gb_per_s) if gb_per_s >= 0.005 else "<0.01"


def printable(text: str) -> str:
    """`text` on one line and without control characters: it may come from anyone on the bus."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _three_digits(value: float) -> str:
    size = abs(value)
    return f"{value:,.{0 if size >= 99.95 else 1 if size >= 9.995 else 2}f}"
