"""The library: every mesh is a closed body around its centre of mass, splits follow Kubric, ids mean one thing."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from scipy.spatial import ConvexHull, KDTree
from scipy.spatial.transform import Rotation

from posttrain.core.errors import UserError
from sim.assets import convex, library, surfaces
from sim.assets.meshes import centred, second_moments
from sim.assets.shapes import convex as convex_shape
from sim.assets.shapes import extrude, polygon, sphere_points

CATEGORIES = sorted({library.category(asset) for asset in library.object_ids()})
OPEN = ("mug", "plastic brick")  # pybullet_data's models of these are not watertight
SAMPLE = [f"{name}/00" for name in CATEGORIES if name != "toy"] + [f"toy/{i:03d}" for i in range(0, 1000, 83)]


def digest() -> str:
    """One number for what a handful of ids stand for."""
    arrays = [a for i in ("cross/03", "stone/03", "toy/123") for a in (*library.parts(i), *library.inertia(i))]
    arrays += [library.mesh("duck/00").vertices, library.hull("duck/00")]
    return hashlib.sha256(
        b"".join(a.tobytes() for a in arrays) + repr(surfaces.background("background/077")).encode()
    ).hexdigest()


def test_ids_are_sorted_unique_and_many():
    for ids, count in ((library.object_ids(), 1298), (surfaces.background_ids(), 512)):
        assert len(ids) == len(set(ids)) == count
        assert ids == sorted(ids)


def test_split_is_kubrics_rule():
    ids = list("abcdefghijklmnopqrst")
    train, test = library.split(ids[::-1])
    picked = np.random.default_rng(42).choice(ids, size=2, replace=False)
    assert test == sorted(picked)
    assert train == [i for i in ids if i not in test]


def test_train_test_and_validation_share_no_object_and_no_background():
    for package in (library, surfaces):
        ids = library.object_ids() if package is library else surfaces.background_ids()
        three = [*library.split(ids), package.validation_ids()]
        assert all(three)
        assert len(set().union(*three)) == sum(map(len, three))


def test_each_id_of_validation_looks_like_itself():
    made = [library.mesh(asset).vertices.tobytes() for asset in library.validation_ids()]
    made += [
        library.mesh(asset).vertices.tobytes() for asset in library.object_ids() if library.category(asset) == "prism"
    ]
    assert len(set(made)) == len(made)
    shown = [surfaces.background(id) for id in (*surfaces.background_ids(), *surfaces.validation_ids())]
    assert len({(it.floor, it.sky_horizon) for it in shown}) == len(shown)


def test_objects_and_backgrounds_split_independently():
    for ids in (library.object_ids(), surfaces.background_ids()):
        train, test = library.split(ids)
        assert len(test) == round(len(ids) / 10)
        assert sorted(train + test) == ids
    assert (
        len({i.partition("/")[0] for i in library.split(library.object_ids())[1]}) >= 15
    )  # many kinds in the test set


@pytest.mark.parametrize("asset", SAMPLE)
def test_mesh_is_normalised_and_faces_outwards(asset: str):
    mesh = library.mesh(asset)
    assert np.ptp(mesh.vertices, axis=0).max() == pytest.approx(1)
    assert np.abs(mesh.vertices).max() < 1
    assert 0 < mesh.volume <= 1.001
    assert np.linalg.norm(mesh.normals, axis=1) == pytest.approx(1)
    a, b, c = (mesh.vertices[mesh.faces[:, i]] for i in range(3))
    cross = np.cross(b - a, c - a)
    assert (np.einsum("fi,fki->fk", cross, mesh.normals[mesh.faces]) > 0).all()
    if library.category(asset) not in OPEN:
        assert np.abs(cross.sum(axis=0)).max() < 1e-6  # the oriented areas of a closed surface cancel
    if mesh.uv is not None:
        assert len(mesh.uv) == len(mesh.vertices)
    assert (mesh.uv is None) == (mesh.texture is None)


QUICK = [a for a in SAMPLE if library.category(a) in ("toy", "bottle", "cross", "cylinder", "egg", "skittle", "star")]


@pytest.mark.parametrize("asset", [*QUICK, "toy/072", "toy/350"])  # the last two have parts as thin as needles
def test_what_collides_reaches_as_far_as_what_is_drawn_and_no_farther(asset: str):
    hull, points = library.hull(asset), np.concatenate(library.parts(asset))
    assert KDTree(points).query(hull)[0].max() < 1e-9
    whole = ConvexHull(library.mesh(asset).vertices)
    assert (points @ whole.equations[:, :3].T + whole.equations[:, 3]).max() < 1e-9
    assert all(len(part) >= 4 for part in library.parts(asset))


def test_cone_hangs_from_its_centre_of_mass():
    """A frustum whose top radius is t times its bottom radius balances at h (1 + 2t + 3t^2) / (4 (1 + t + t^2))."""
    for number in range(library.VARIANTS):
        z = library.mesh(f"cone/{number:02d}").vertices
        height, radius = np.ptp(z[:, 2]), np.linalg.norm(z[:, :2], axis=1)
        t = radius[z[:, 2] > z[:, 2].max() - 1e-6].max() / radius.max()
        assert -z[:, 2].min() / height == pytest.approx((1 + 2 * t + 3 * t * t) / (4 * (1 + t + t * t)), abs=1e-6)


@pytest.mark.slow
def test_duck_balances_column_by_column():
    """Volume and centre of mass against a count of little columns, each as long as the duck is thick there."""
    mesh = library.mesh("duck/00")
    a, b, c = (mesh.vertices[mesh.faces[:, i]] for i in range(3))
    step = 0.02
    volume, moment = 0.0, np.zeros(3)
    for x in np.arange(-0.7, 0.7, step) + 1e-4:
        for y in np.arange(-0.7, 0.7, step) + 1e-4:
            u, v, w = (
                (p[:, 0] - x) * (q[:, 1] - y) - (p[:, 1] - y) * (q[:, 0] - x) for p, q in ((b, c), (c, a), (a, b))
            )
            hit = ((u > 0) & (v > 0) & (w > 0)) | ((u < 0) & (v < 0) & (w < 0))
            z = np.sort(((u * a[:, 2] + v * b[:, 2] + w * c[:, 2]) / (u + v + w))[hit])
            low, high = z[0::2], z[1::2]
            thick = (high - low).sum()
            volume += thick * step**2
            moment += np.array([x * thick, y * thick, (high**2 - low**2).sum() / 2]) * step**2
    assert volume == pytest.approx(mesh.volume, rel=0.01)
    assert np.abs(moment / volume).max() < 2e-3


def test_a_box_fills_its_bounding_box():
    mesh = library.mesh("box/05")
    assert mesh.volume == pytest.approx(np.prod(np.ptp(mesh.vertices, axis=0)), rel=1e-5)
    assert len(library.hull("box/05")) == 8


@pytest.mark.slow
def test_same_ids_same_bytes_in_another_process():
    code = "import test_sim_assets; print(test_sim_assets.digest())"
    path = os.pathsep.join([os.path.dirname(__file__), os.getcwd()])
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": path}
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest()


def test_unknown_ids_are_refused():
    with pytest.raises(UserError, match="toy/168") as error:  # its file holds nothing but NaN
        library.mesh("toy/168")
    assert error.value.code == "unknown_name"
    with pytest.raises(UserError, match="background/999") as error:
        surfaces.background("background/999")
    assert error.value.code == "unknown_name"


def test_backgrounds_differ_and_stay_in_range():
    made = [surfaces.background(i) for i in surfaces.background_ids()]
    assert len({(b.floor, b.wall, b.sky_horizon) for b in made}) == len(made)
    assert {b.floor.pattern for b in made} == set(surfaces.PATTERNS)
    assert 0.4 < np.mean([b.wall is not None for b in made]) < 0.6
    colors = [c for b in made for c in (b.floor.color, b.floor.second, b.sky_horizon, b.sky_zenith)]
    assert np.min(colors) >= 0
    assert np.max(colors) <= 1


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((1, 0, 0), "red"), ((0, 1, 0), "green"), ((0, 0.05, 1), "blue"), ((1, 0.9, 0), "yellow"),
        ((1, 0.2, 0), "orange"), ((0.1, 0.05, 0.02), "brown"), ((0.3, 0, 0.8), "purple"),
        ((1, 1, 1), "white"), ((0.2, 0.2, 0.2), "grey"), ((0.002, 0.001, 0.002), "black"),
    ],
)  # fmt: skip
def test_color_names(rgb: tuple[float, float, float], name: str):
    assert surfaces.color_name(rgb) == name


def test_srgb_curve_there_and_back():
    assert surfaces.encoded(np.array([0.0, 0.5, 1.0])) * 255 == pytest.approx([0, 187.516, 255], abs=1e-3)
    values = np.linspace(0, 1, 256)
    assert surfaces.encoded(surfaces.linear(values)) == pytest.approx(values, abs=1e-7)


@pytest.mark.slow
def test_choose_shows_toys_half_of_the_time():
    rng, ids = np.random.default_rng(0), library.object_ids()
    drawn = [library.choose(rng, ids) for _ in range(2000)]
    assert np.mean([i.startswith("toy/") for i in drawn]) == pytest.approx(0.5, abs=0.05)
    assert {i.partition("/")[0] for i in drawn} == set(CATEGORIES)


def box_mesh(x: float, y: float, z: float) -> tuple[np.ndarray, np.ndarray]:
    """A box of these sides around the origin."""
    corners = np.array([(i, j, k) for i in (-x / 2, x / 2) for j in (-y / 2, y / 2) for k in (-z / 2, z / 2)])
    return convex_shape(corners)


@pytest.mark.parametrize("sides", [(1.0, 1.0, 1.0), (1.0, 0.1, 0.05)])
def test_inertia_of_a_cube_and_of_a_long_bar(sides: tuple[float, float, float]):
    x, y, z = sides
    expected = np.diag([y * y + z * z, x * x + z * z, x * x + y * y]) / 12  # of one kilogram
    np.testing.assert_allclose(second_moments(*box_mesh(*sides)), expected, atol=1e-15)
    turn = Rotation.from_rotvec([0.3, -1.0, 0.7]).as_matrix()
    vertices, faces = box_mesh(*sides)
    np.testing.assert_allclose(second_moments(vertices @ turn.T, faces), turn @ expected @ turn.T, atol=1e-15)


def test_inertia_of_balls_cylinders_and_cones():
    """Closed forms of one kilogram. A regular polygon's mean square distance is less than its circle's r^2 / 2."""
    for ball in ("ball/00", "soccer ball/00"):
        np.testing.assert_array_equal(library.inertia(ball)[0], [0.1] * 3)  # 2/5 r^2
    points, faces = convex_shape(sphere_points(4000) * 0.5)
    np.testing.assert_allclose(second_moments(points, faces), np.eye(3) / 10, atol=1e-3)
    vertices = library.mesh("cylinder/00").vertices
    height, radius = np.ptp(vertices[:, 2]), np.linalg.norm(vertices[:, :2], axis=1).max()
    around = radius**2 * (2 + np.cos(2 * np.pi / 28)) / 6  # 28 corners
    across = around / 2 + height**2 / 12
    np.testing.assert_allclose(library.inertia("cylinder/00")[0], [across, across, around], rtol=1e-4)
    np.testing.assert_array_equal(library.inertia("cylinder/00")[1], np.eye(3))
    vertices, faces = extrude(polygon(1000), 1.5, top=1e-6)  # a cone of radius 1 and height 1.5
    scale = np.ptp(vertices, axis=0).max()
    across = 3 / 20 + 3 / 80 * 1.5**2
    expected = np.diag([across, across, 3 / 10]) / scale**2
    np.testing.assert_allclose(second_moments(centred(vertices, faces)[0], faces), expected, atol=1e-5)


def test_principal_axes_and_moments_give_the_tensor_back():
    for asset in ("duck/00", "cross/03", "toy/004"):
        moments, axes = library.inertia(asset)
        mesh = library.mesh(asset)
        np.testing.assert_allclose(
            axes @ np.diag(moments) @ axes.T, second_moments(mesh.vertices, mesh.faces), atol=1e-15
        )
        assert np.linalg.det(axes) == pytest.approx(1)


@pytest.mark.slow
def test_concave_meshes_fall_into_convex_parts():
    two_bars = np.concatenate([box_mesh(1, 0.2, 0.2)[0], box_mesh(1, 0.2, 0.2)[0] + [0, 2, 0]])
    faces = box_mesh(1, 0.2, 0.2)[1]
    apart = convex.parts(two_bars, np.concatenate([faces, faces + 8]), library.NEAR)
    assert sorted(len(part) for part in apart) == [8, 8]
    whole = library.parts("cross/03")  # two boxes crossed: one is cut off on both sides, or cut through
    volume = sum(ConvexHull(part).volume for part in whole)
    assert 2 < len(whole) <= 5
    assert volume == pytest.approx(library.mesh("cross/03").volume, rel=1e-5)
    assert sum(ConvexHull(part).volume for part in library.parts("bowl/03")) < 1.2 * library.mesh("bowl/03").volume


def test_what_the_pocket_films_collides_as_one_hull():
    for name in ("barrel", "box", "capsule", "cone", "cylinder", "egg", "prism", "pyramid", "stone"):
        for number in range(library.VARIANTS + library.VALIDATION):
            asset = f"{name}/{number:02d}"
            assert len(library.parts(asset)) == 1
