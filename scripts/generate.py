"""Generates text, as `kda-hf generate` does: `python scripts/generate.py --model PATH --prompt "..."`."""

import sys

from kda_hf.cli import main


if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
