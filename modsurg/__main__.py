"""`python -m modsurg` is the command line."""

from modsurg.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
