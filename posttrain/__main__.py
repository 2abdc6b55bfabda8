"""`posttrain` and `python -m posttrain`. It imports almost nothing, so that it can be stopped from the first moment."""

import sys

from posttrain.core.signals import launch


def main() -> int:
    return launch("posttrain.cli")


if __name__ == "__main__":
    sys.exit(main())
