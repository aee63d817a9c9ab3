"""`python -m tests.contract.regenerate`, from the repository's root: golden files and tables."""

from __future__ import annotations

from tests.contract.golden import GOLDEN, expected_files
from tests.contract.tables import GUIDES, regenerated


def main() -> None:
    """Write every golden file and every table of the guides, remove other files, say what changed.

    What was recorded of earlier versions is left alone.
    """
    GOLDEN.mkdir(exist_ok=True)
    expected = expected_files()
    for path in sorted(GOLDEN.iterdir()):
        if path.name not in expected:
            path.unlink()
            print(f"removed {path.name}")
    for name, content in expected.items():
        path = GOLDEN / name
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)
            print(f"wrote {name}")
    for guide in GUIDES:
        text = guide.read_text()
        if (now := regenerated(text)) != text:
            guide.write_text(now)
            print(f"wrote the tables of {guide.name}")


if __name__ == "__main__":
    main()
