"""Heals a swapped model, as `kda-hf heal` does; on several GPUs `accelerate launch scripts/heal.py ...`."""

import sys

from kda_hf.cli import main


if __name__ == "__main__":
    main(["heal", *sys.argv[1:]])
