"""``python -m vlaflow``."""

from vlaflow.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
