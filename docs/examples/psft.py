"""PSFT: fine-tune, measure, sample, export. python docs/examples/psft.py [run=short train.steps=200]"""

import sys

import posttrain as pt
import sim


def main(*overrides: str) -> None:
    recipe = pt.load_recipe("recipes/pocket/psft.yaml", "run=my-psft", *overrides)
    folder = pt.train(recipe)  # films the clips first where they are missing
    for row in pt.evaluate(recipe):
        print(row["model"], row["split"], f"L2 {row['l2']['mean']:.3f}", f"IoU {row['iou']['mean']:.3f}")

    scene = sim.make_scene([sim.make_body("cone", height=0.7, color="green")])
    first_frame = sim.film(scene, sim.simulate(scene)).rgb[0]
    clips = pt.sample(folder, scene.caption, first_frame, seeds=[0, 1])
    print("samples:", *clips)
    print("export:", *pt.export(recipe, formats=["diffusers", "comfyui"]))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except pt.UserError as error:  # error.field is the key of the recipe that it is about
        sys.exit(f"{error} [{error.code}]")
