"""Write docs/methods.gif: unseen clips as the truth, the base and each method have them, side by side.

    make psft oro gdpo
    python docs/make_picture.py

The first four unseen clips and the first sample of each, not chosen ones.
"""

from pathlib import Path

from posttrain.core.codec import read_video
from posttrain.reporting.gallery import animation

RUNS = Path(__file__).parent.parent / "runs"
SAMPLES = {
    "base": "pocket-psft/samples/base",
    "PSFT": "pocket-psft/samples/psft",
    "PSFT + ORO": "pocket-oro/samples/oro",
    "PhyGDPO": "pocket-gdpo/samples/gdpo",
    "truth": "pocket-psft/samples/truth",
}
CLIPS = 4

if __name__ == "__main__":
    folders = [RUNS / folder / "test_unseen" for folder in SAMPLES.values()]
    clips = [[read_video(folder / f"{clip:05d}-s0.mp4") for folder in folders] for clip in range(CLIPS)]
    animation(Path(__file__).with_name("methods.gif"), clips, 16.0, list(SAMPLES))
