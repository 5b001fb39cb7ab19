"""``python -m etcd_infra`` and the console script."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
    from etcd_infra._inspect.cli import app

    app()


if __name__ == "__main__":
    main()
