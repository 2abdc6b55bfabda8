"""Score videos that continue a dataset's clips. python docs/examples/score_folder.py VIDEOS DATASET SPLIT"""

import sys

import posttrain as pt


def main(videos: str, dataset: str, split: str) -> None:
    """A video is called <clip>-s<seed>.mp4."""
    rows = pt.score(videos, "simulator", clips=dataset, split=split)  # also in scores.jsonl beside the videos
    for row in sorted(rows, key=lambda row: row["pc"]):  # the least physical first
        print(f"{row['file_name']}: physics {row['pc']:.2f}, caption {row['sa']:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
