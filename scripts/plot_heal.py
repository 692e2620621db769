"""Draws the losses of a healing run, finished or not, from the CSV files in its directory. Needs matplotlib."""

import argparse
import sys
from pathlib import Path

from kda_hf.healing.log import plot_log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="--out of the run, where log.csv is")
    parser.add_argument("picture", type=Path, help="an .svg, or another format that matplotlib writes")
    args = parser.parse_args()
    try:
        plot_log(args.run, args.picture)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"plot_heal: {error}")


if __name__ == "__main__":
    main()
