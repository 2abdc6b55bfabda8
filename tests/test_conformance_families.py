"""Every family of video models through one list: five kinds of Wan, Open-Sora, and a toy in a folder of its own."""

import ast
import contextlib
import importlib
import inspect
import io
import math
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from helpers import toy_family
from helpers.falling import write_groups
from helpers.tiny import FAMILIES, wan_folder
from helpers.tiny_opensora import opensora_folder
from safetensors.torch import load_file
from torch import Tensor

import posttrain.models
from posttrain import cli
from posttrain.commands.dry import dry_step
from posttrain.commands.experiment import Recipe
from posttrain.core.errors import UserError
from posttrain.core.files import read_json, read_jsonl
from posttrain.core.recipe import Plugin, plugins, resolve
from posttrain.core.recipe import load as load_recipe
from posttrain.methods import psft
from posttrain.models import lora
from posttrain.models.base import PROTOCOL, Family, ModelConfig, family

ROOT = Path(__file__).parent.parent
CAPTIONS = ["a red ball falls.", "a duck."]


class Case(NamedTuple):
    """A kind of model: what makes its folder, and what its recipe says besides `path`."""

    make: Callable[[Path], Path]
    model: dict[str, Any]
    formats: tuple[str, ...] = ("diffusers", "comfyui", "merged")


CASES = {
    kind: Case(partial(wan_folder, family=kind), {"family": "wan", **({"expert": "high"} if "a14b" in kind else {})})
    for kind in FAMILIES
} | {
    "opensora": Case(opensora_folder, {"family": "opensora"}, ("diffusers", "merged")),
    "toy": Case(toy_family.make, {"family": "toy"}, ("diffusers", "merged")),
}
METHODS: dict[str, dict[str, Any]] = {
    "psft": {"method": {"name": "psft"}},
    "oro": {"method": {"name": "oro", "rewards": [{"name": "object"}], "sampler": {"steps": 2, "guidance": 2.0}}},
    "gdpo": {
        "method": {"name": "gdpo"},
        "data": {"clips": "drops", "groups": {"losers": 3, "counterfactuals": True}},
    },
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder: clips, a model of each kind, and in `families` the toy, as one would add it."""
    home = tmp_path_factory.mktemp("home")
    write_groups(home / "drops")
    (home / "families").mkdir()
    shutil.copy(toy_family.__file__, home / "families" / "toy.py")
    posttrain.models.__path__.append(str(home / "families"))
    importlib.invalidate_caches()
    try:
        with contextlib.chdir(home):
            for name, case in CASES.items():
                case.make(home / "models" / name)
            yield home
    finally:
        posttrain.models.__path__.remove(str(home / "families"))


def config(name: str, adapter: bool = True, **changes: Any) -> ModelConfig:
    given = CASES[name].model | ({"adapter": {"rank": 2, "alpha": 4}} if adapter else {})
    return ModelConfig(**{"path": f"models/{name}", **given, **changes})


def load(name: str, adapter: bool = True, **changes: Any) -> Any:
    chosen = config(name, adapter, **changes)
    return family(chosen.family).load(chosen)


def disturb(model: Any) -> Any:
    """Stand in for training: what is trained is another."""
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def velocity(model: Any) -> Tensor:
    random = torch.Generator().manual_seed(0)
    of_family = family(type(model).__module__.split(".")[2])  # posttrain.models.<family>
    frames, side = of_family.FRAMES, 2 * of_family.SIDE
    z_BCFHW = torch.randn(2, *model.latent_shape(frames, side, side), generator=random)
    first_BC1HW = 2 * torch.rand(2, 3, 1, side, side, generator=random) - 1
    t_BF = torch.full((2, z_BCFHW.shape[2]), 0.95)
    t_BF[:, : model.n_cond_frames] = 0
    return model.velocity(z_BCFHW, t_BF, model.encode_text(CAPTIONS), model.condition(first_BC1HW, frames))


def command(*arguments: str) -> tuple[int, str]:
    """Exit code and standard error of `posttrain ARGUMENTS`, in this process."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        code = cli.main(arguments)
    return code, err.getvalue()


def test_the_protocol_is_what_is_checked() -> None:
    """A recipe's `model.family` is held against PROTOCOL, which has each name of `Family`."""
    asked = {name for name in vars(Family) if not name.startswith("_")} | set(Family.__annotations__)
    assert asked == set(PROTOCOL)


@pytest.mark.parametrize("name", ["wan", "opensora", "toy"])
def test_a_familys_functions_take_what_they_are_given(home: Path, name: str) -> None:
    module = resolve("models", name)
    for asked, function in inspect.getmembers(Family, inspect.isfunction):
        if asked in PROTOCOL:
            _, *wanted = inspect.signature(function).parameters.values()
            given = inspect.signature(getattr(module, asked))
            assert [p.name for p in wanted] == [p.name for p in given.parameters.values()][: len(wanted)], asked


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("conditioning", ["image", "text"])
def test_shapes(home: Path, name: str, conditioning: str) -> None:
    """Also: text is zero after its end, and longer clips have longer latents."""
    model, frames, side = load(name, conditioning=conditioning), 9, 32
    video_BCFHW = torch.rand(2, 3, frames, side, side) * 2 - 1
    with torch.no_grad():
        z_BCFHW = model.encode(video_BCFHW)
        back_BCFHW = model.decode(z_BCFHW)
        text_BLD = model.encode_text(CAPTIONS)
    assert z_BCFHW.shape == (2, *model.latent_shape(frames, side, side))
    assert z_BCFHW.shape[2] == model.latent_frames(frames) > model.latent_frames(1) == 1
    assert back_BCFHW.shape == video_BCFHW.shape
    assert back_BCFHW.abs().max() <= 1
    assert text_BLD.shape[:2] == (2, model.text_tokens)
    assert text_BLD.dtype == torch.float32
    assert not text_BLD[:, -1].any()
    assert (text_BLD != 0).any(-1).sum(1).tolist() != [model.text_tokens] * 2
    v_BCFHW = velocity(model)
    assert v_BCFHW.dtype == torch.float32
    assert v_BCFHW.isfinite().all()
    assert model.n_cond_frames in ((0, 1) if conditioning == "image" else (0,))
    with pytest.raises(UserError) as raised:
        model.latent_shape(frames + 1, side + 1, side)
    assert raised.value.code == "mismatch"


@pytest.mark.parametrize("name", CASES)
def test_padding_is_no_text(home: Path, name: str) -> None:
    """A caption means the same beside a longer one."""
    model = load(name, adapter=False)
    beside, alone = model.encode_text([CAPTIONS[1], CAPTIONS[0]])[:1], model.encode_text(CAPTIONS[1:])
    torch.testing.assert_close(beside, alone)
    z_BCFHW, t_BF = torch.randn(2, *model.latent_shape(9, 32, 32)), torch.full((2, model.latent_frames(9)), 0.95)
    condition = model.condition(torch.zeros(2, 3, 1, 32, 32), 9)
    with torch.no_grad():
        v_BCFHW = model.velocity(z_BCFHW, t_BF, model.encode_text(CAPTIONS), condition)
        one = {key: value[1:] for key, value in condition.items()}
        v_1CFHW = model.velocity(z_BCFHW[1:], t_BF[1:], alone, one)
    torch.testing.assert_close(v_BCFHW[1:], v_1CFHW, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_decoder_has_the_same_gradient_however_it_remembers(home: Path, name: str) -> None:
    model = load(name)
    z_BCFHW = torch.randn(1, *model.latent_shape(9, 32, 32), generator=torch.Generator().manual_seed(3))
    gradients = []
    for recompute, offload in ((True, False), (False, False), (True, True)):
        z = z_BCFHW.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model.decode(z, recompute, offload).sum(), z)
        gradients.append(gradient)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_switched_off_the_adapter_is_the_base(home: Path, name: str) -> None:
    """Bit for bit, and before it is trained too; the scheduler is a fresh one each time."""
    base, model = load(name, adapter=False), load(name)
    assert {n.split(".lora_")[0] for n, p in model.module.named_parameters() if p.requires_grad} != set()
    assert torch.equal(velocity(model), velocity(base))
    disturb(model)
    assert (velocity(model) - velocity(base)).abs().max() > 1e-3
    with lora.disabled(model.transformer):
        assert torch.equal(velocity(model), velocity(base))
    assert model.scheduler() is not model.scheduler()
    assert model.cache_key() == base.cache_key()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("adapter", [True, False])
def test_what_is_saved_is_restored(home: Path, tmp_path: Path, name: str, adapter: bool) -> None:
    model = disturb(load(name, adapter))
    (path,) = model.save(tmp_path)
    again = load(name, adapter)
    before = velocity(again)
    again.restore(tmp_path)
    assert torch.equal(velocity(again), velocity(model))
    assert (before - velocity(model)).abs().max() > 1e-3
    first = path.read_bytes() if adapter else b""
    assert not adapter or model.save(tmp_path / "again")[0].read_bytes() == first


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("conditioning", ["image", "text"])
def test_the_dry_run_has_the_real_shapes(home: Path, name: str, conditioning: str) -> None:
    chosen = config(name, conditioning=conditioning)
    outline, model = partial(family(chosen.family).outline, chosen), load(name, conditioning=conditioning)
    clip = (9, 32, 32)
    shapes = outline(*clip)
    with torch.no_grad():
        condition = model.condition(torch.zeros(2, 3, 1, *clip[1:]), clip[0])
        text_BLD = model.encode_text(CAPTIONS)
    assert {key: tuple(value.shape[1:]) for key, value in condition.items()} == shapes.condition
    assert text_BLD.shape[1:] == (shapes.model.text_tokens, shapes.text_width)
    assert shapes.model.n_cond_frames == model.n_cond_frames
    assert all(p.is_meta for p in shapes.model.transformer.parameters())
    seen: list[int] = []
    block = next(module for key, module in model.transformer.named_modules() if key.endswith("blocks.0"))
    block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1:-1].numel()))
    z_BCFHW = torch.zeros(1, *model.latent_shape(*clip))
    t_BF = torch.full((1, z_BCFHW.shape[2]), 0.95)
    with torch.no_grad():
        model.velocity(z_BCFHW, t_BF, text_BLD[:1], {key: value[:1] for key, value in condition.items()})
    step = dry_step(outline, *clip, Plugin("psft", psft, psft.Config()))
    trained = sum(p.numel() for p in model.module.parameters() if p.requires_grad)
    assert (step.parameters, step.trained, step.tokens) == (
        sum(p.numel() for p in model.module.parameters()) - trained, trained, seen[0],
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains(home: Path, name: str, method: str) -> None:
    """Two steps from recipe to adapter, by the commands that a user gives; PSFT's files load as others load them."""
    run = f"{name}-{method}"
    values = {
        "run": run,
        "model": {"path": f"models/{name}", "adapter": {"rank": 2, "alpha": 4}, **CASES[name].model},
        "data": {"clips": "drops"},
        "train": {"steps": 2, "batch": 2, "lr": 0.01, "block_checkpointing": True},
        "export": list(CASES[name].formats),
        **METHODS[method],
    }
    Path(f"{run}.yaml").write_text(yaml.safe_dump(values))
    code, said = command("train", f"{run}.yaml")
    assert code == 0, said
    rows = read_jsonl(home / "runs" / run / "log.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    weights = load_file(home / "runs" / run / "adapter" / lora.FILE)
    moved = [bool(weight.any()) for key, weight in weights.items() if ".lora_B." in key]
    assert any(moved) if method == "oro" else all(moved)
    if method == "psft":
        targets = load_recipe(home / "runs" / run / "recipe.yaml", [], Recipe).model.adapter
        assert targets is not None
        assert targets.targets == family(CASES[name].model["family"]).TARGETS
        code, said = command("export", f"runs/{run}", "--check")
        assert code == 0, said


@pytest.mark.parametrize("name", ["wan2.2-ti2v", "opensora", "toy"])
def test_a_model_is_sampled_by_the_command(home: Path, name: str) -> None:
    arguments = ["--prompt", "a duck falls.", "--frames", "5", "--height", "32", "--width", "32", "--steps", "2"]
    code, said = command("sample", f"models/{name}", "--family", CASES[name].model["family"], *arguments)
    assert code == 0, said
    assert (home / "runs" / "samples" / name / f"a-duck-falls-s0-{name}.mp4").is_file()


def test_a_family_in_a_folder_of_its_own_is_offered(home: Path) -> None:
    """And what lies beside families and is none is not."""
    assert sorted(plugins("models")) == ["opensora", "toy", "wan"]
    code, said = command("sample", "models/toy", "--family", "lora", "--prompt", "x")
    assert code == 1
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["model.family=lora"], "model.family"),
        (["model.family=decode"], "model.family"),
        (["model.family=folders"], "model.family"),
        (["method={name: segmenter}"], "method"),
        (["method={name: vae}"], "method"),
        (["model.family=tracker", "model.adapter=null"], "method"),
        (["model.family=raft", "model.adapter=null", "method={name: depth_net}"], "method"),
        (["model.family=vae", "method={name: vae}"], "model"),  # it has an adapter
        (["model.family=vae", "model.adapter=null", "method={name: vae}", "eval={clips: drops}"], "eval"),
    ],
)
def test_what_does_not_go_together_is_one_line_when_the_recipe_is_read(
    home: Path, overrides: list[str], key: str
) -> None:
    values = {
        "run": "refused",
        "model": {"path": "pocket", "adapter": {"rank": 2}},
        "data": {"clips": "drops"},
        "method": {"name": "psft"},
        "train": {"steps": 1, "batch": 1, "lr": 1.0},
    }
    Path("refused.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=rf": {key}: ") as raised:
        load_recipe(Path("refused.yaml"), overrides, Recipe)
    assert "\n" not in str(raised.value)


def test_the_networks_go_with_their_methods(home: Path) -> None:
    for family_name, method in (("tracker", "segmenter"), ("raft", "flow_net"), ("depth", "depth_net"), ("vae", "vae")):
        overrides = [f"model.family={family_name}", f"method={{name: {method}}}", "model.adapter=null"]
        assert load_recipe(Path("refused.yaml"), overrides, Recipe).method.name == method


NAMES_WAN = {  # besides models/wan: how the embedded model was made, its measurement, and where it lies
    *("nets/vae.py", "pretraining/appearance.py", "pretraining/build.py"),
    *("pocket/__init__.py", "studies/preference_cost.py"),
}


@pytest.mark.slow
def test_nothing_but_the_family_names_it() -> None:
    """In code; docstrings and comments may have it as an example."""
    naming = set()
    for path in [*(ROOT / "posttrain").rglob("*.py"), *(ROOT / "sim").rglob("*.py")]:
        tree = ast.parse(path.read_text())
        words = [
            node.value.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ]
        code = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name)]
        code += [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
        code += [f"{n.module}.{a.name}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names]
        strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        code += [text for text in strings if text not in words]
        if any("wan" in word.lower().replace("wanted", "").replace("wandb", "") for word in code):
            naming.add(path.relative_to(ROOT / "posttrain").as_posix() if "posttrain" in path.parts else path.name)
    assert {name for name in naming if not name.startswith("models/wan/")} == NAMES_WAN


def test_the_embedded_model_is_of_its_family() -> None:
    from posttrain.pocket import FAMILY

    assert ModelConfig(path="pocket").family == FAMILY
    assert FAMILY in plugins("models")
    assert read_json(ROOT / "posttrain" / "pocket" / "wan" / "model_index.json")
