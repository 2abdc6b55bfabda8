"""The entry point of `sim` and `python -m sim`. It imports almost nothing, so a signal can stop it from the start."""

import sys

from posttrain.core.signals import launch


def main() -> int:
    return launch("sim.cli")


if __name__ == "__main__":
    sys.exit(main())
