"""`python -m tests.contract.regenerate`, from the repository's root: writes the golden files."""

from __future__ import annotations

from tests.contract.golden import GOLDEN, expected_files


def main() -> None:
    """Write every expected file, remove the others, and say what changed."""
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


if __name__ == "__main__":
    main()
