"""ORO with a reward of our own, rewards/still.py. python docs/examples/new_reward.py [train.steps=20 ...]"""

import sys
from pathlib import Path

import posttrain as pt
import posttrain.rewards


def main(*overrides: str) -> Path:
    """Needs the run pocket-psft (`posttrain train recipes/pocket/psft.yaml`), from whose adapter ORO starts."""
    posttrain.rewards.__path__.append(str(Path(__file__).parent / "rewards"))  # a file there is a reward by its name
    rewards = "method.rewards=[{name: object}, {name: still, weight: 0.5}]"
    return pt.train(pt.load_recipe("recipes/pocket/oro.yaml", "run=still", rewards, *overrides))


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
