"""Generates text with a KDA model: `python scripts/generate.py --model PATH --prompt "..."`, as `kda-hf generate` does."""

import sys

from kda_hf.cli import main


if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
