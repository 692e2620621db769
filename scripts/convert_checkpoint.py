"""Converts between FLA's checkpoints and ours, as `kda-hf convert` does:
`python scripts/convert_checkpoint.py SOURCE TARGET`."""

import sys

from kda_hf.cli import main


if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
