"""Swaps attention of a pretrained model for KDA, as `kda-hf swap` does:
`python scripts/swap_layers.py --base PATH --layers 3:1 --out DIR`."""

import sys

from kda_hf.cli import main


if __name__ == "__main__":
    main(["swap", *sys.argv[1:]])
