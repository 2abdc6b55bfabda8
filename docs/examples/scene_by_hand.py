"""A scene by hand: a ball falls beside a box. python docs/examples/scene_by_hand.py"""

import sim

ball = sim.make_body("ball", at=(0.0, 0.0), height=0.8, size=0.3, color="red")
box = sim.make_body("box", at=(0.4, 0.1), color="blue", role="pile")
scene = sim.make_scene([ball, box], frames=33, fps=16.0)
trajectory = sim.simulate(scene)
clip = sim.film(scene, trajectory)
print(sim.write_video("fall.mp4", clip.rgb, scene.fps))
print(scene.caption, f"It lands after {min(c.time for c in trajectory.contacts if c.a == 0):.3f} s.")
