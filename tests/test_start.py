"""What a run may start from: an adapter, merged adapters, whole weights, another run; and what its `base` is then."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.falling import write_dataset
from helpers.tiny import TINY_TRANSFORMER, wan_folder
from safetensors.torch import load_file
from torch import Tensor

from posttrain import cli
from posttrain.commands import loading
from posttrain.commands.experiment import open_run, resolved
from posttrain.core import files
from posttrain.core.errors import UserError
from posttrain.evaluation.evaluate import weights_fingerprint
from posttrain.models import lora
from posttrain.models.base import AdapterConfig, Merged, ModelConfig
from posttrain.models.wan.loading import initialise, load
from posttrain.models.wan.model import Wan
from posttrain.training.checkpoints import start_fingerprint

ADAPTER = {"rank": 2, "alpha": 4}
RECIPE: dict[str, Any] = {
    "run": "second",
    "model": {"path": "wan", "adapter": ADAPTER},
    "data": {"clips": "drops"},
    "method": {"name": "psft"},
    "train": {"steps": 1, "batch": 1, "lr": 1e-9},  # so small that what is saved is what training started from
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a few clips, a recipe, and two finished runs: of an adapter, and of all weights."""
    path = tmp_path_factory.mktemp("home")
    wan_folder(path / "wan")
    write_dataset(path / "drops", ["train"], clips=2, frames=5)
    (path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    for name, adapter in (("first", AdapterConfig(**ADAPTER)), ("whole", None)):
        wan = load(ModelConfig(path=str(path / "wan"), adapter=adapter))
        start = start_fingerprint(wan.module)
        torch.manual_seed(9)
        with torch.no_grad():
            for key, parameter in wan.module.named_parameters():
                if ".lora_B." in key or key == "proj_out.bias":
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        wan.save(path / "runs" / name / "adapter")
        model = {"path": "wan", "adapter": adapter and ADAPTER}
        files.write_text(path / "runs" / name / "recipe.yaml", yaml.safe_dump(RECIPE | {"run": name, "model": model}))
        files.write_json(
            path / "runs" / name / "trained.json",
            {"model": start, "sha256": files.sums(path / "runs" / name / "adapter")},
        )
    return path


def command(home: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and the last line on standard error of `posttrain ARGUMENTS`, called in this process."""
    with contextlib.chdir(home), contextlib.redirect_stdout(io.StringIO()):
        with contextlib.redirect_stderr(io.StringIO()) as err:
            code = cli.main(arguments)
    return code, (err.getvalue().splitlines() or [""])[-1]


def trained(home: Path, run: str, *overrides: str) -> None:
    code, said = command(home, "train", "recipe.yaml", f"run={run}", *overrides)
    assert code == 0, said


@torch.no_grad()
def velocity(wan: Wan) -> Tensor:
    z = torch.randn(1, 8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return wan.velocity(z, torch.full((1, 3), 0.7), wan.encode_text(["a duck falls."]))


def rows(home: Path, run: str) -> tuple[Wan, Wan]:
    """The models of the rows `base` and `psft`, as evaluation has them."""
    with contextlib.chdir(home):
        plan, folder = open_run(run)
        with loading.base_model(plan) as base, loading.tuned_model(plan, folder) as tuned:
            return base, tuned


def known(home: Path, **model: Any) -> Wan:
    with contextlib.chdir(home):
        return load(ModelConfig(path="wan", **model))


FIRST = f"runs/first/adapter/{lora.FILE}"


@pytest.mark.slow
def test_a_run_continues_the_adapter_of_another(home: Path) -> None:
    trained(home, "second", "model.start=first")
    before, after = (load_file(home / "runs" / run / "adapter" / lora.FILE) for run in ("first", "second"))
    assert before.keys() == after.keys()
    assert max((before[key] - after[key]).abs().max() for key in before) < 1e-7
    base, tuned = rows(home, "second")
    plain = known(home)
    assert (velocity(base) - velocity(tuned)).abs().max() < 1e-5  # the base is what training started from
    assert (velocity(base) - velocity(plain)).abs().max() > 1e-2
    kept, without = (weights_fingerprint(model.transformer, base=True) for model in (base, plain))
    assert kept != without  # so is its row's key


@pytest.mark.slow
def test_the_base_of_coarse_weights_has_the_whole_adapter_that_training_continued(home: Path) -> None:
    """Merged into bf16 weights it would be rounded; here it is on them, and the row is measured anew with another."""
    trained(home, "coarse", "model.start=first", "model.dtype=bf16")
    base, _ = rows(home, "coarse")
    first = load_file(home / FIRST)
    layers = {name: layer for name, layer in base.transformer.named_modules() if hasattr(layer, "lora_B")}
    for name, layer in layers.items():
        scaled = layer.lora_B[lora.NAME].weight * layer.scaling[lora.NAME]
        assert torch.equal(scaled, first[f"transformer.{name}.lora_B.weight"])
    plain = known(home, dtype="bf16")
    assert len(layers) == 20
    kept, without = (weights_fingerprint(model.transformer, base=True) for model in (base, plain))
    assert kept != without


@pytest.mark.slow
def test_a_run_on_merged_adapters_trains_its_own(home: Path) -> None:
    trained(home, "third", "model.merge=[{path: first, scale: 0.5}]")
    base, tuned = rows(home, "third")
    merged = known(home, merge=(Merged(path=FIRST, scale=0.5),))
    assert torch.equal(velocity(base), velocity(merged))
    assert (velocity(tuned) - velocity(merged)).abs().max() < 1e-6
    assert (velocity(merged) - velocity(known(home))).abs().max() > 1e-2
    own = load_file(home / "runs" / "third" / "adapter" / lora.FILE)
    assert max(w.abs().max() for name, w in own.items() if ".lora_B." in name) < 1e-7  # the file is the change alone

    code, said = command(home, "train", "recipe.yaml", "run=fourth", "model.start=third")
    assert code == 1
    assert said.startswith("model.start: third was trained on merged adapters; put [{'path': ")
    trained(home, "fourth", "model.start=third", "model.merge=[{path: first, scale: 0.5}]")
    code, said = command(home, "export", "third", "export=[comfyui]", "--check")
    assert code == 0, said
    code, said = command(home, "export", "third", "export=[merged]")  # so small a change vanishes in the base's float16
    assert code == 1
    assert said.splitlines()[-1].endswith("[mismatch]")


@pytest.mark.slow
def test_whole_weights_are_a_start_with_and_without_an_adapter(home: Path) -> None:
    whole = known(home, start="runs/whole/adapter/transformer")
    assert (velocity(whole) - velocity(known(home))).abs().max() > 1e-2
    trained(home, "over", "model.start=whole")
    trained(home, "more", "model.start=whole", "model.adapter=null")
    for run in ("over", "more"):
        base, tuned = rows(home, run)
        assert torch.equal(velocity(base), velocity(whole))
        assert (velocity(tuned) - velocity(whole)).abs().max() < 1e-6
    code, said = command(home, "train", "recipe.yaml", "run=upon", "model.start=over")
    assert code == 1
    assert said.startswith("model.start: over was trained on runs/whole/adapter/transformer; ")
    assert "`posttrain export runs/over export=[merged]`" in said
    assert command(home, "export", "over", "export=[merged]", "--check")[0] == 0
    trained(home, "upon", "model.start=runs/over/merged/transformer")
    assert (velocity(rows(home, "upon")[0]) - velocity(rows(home, "over")[1])).abs().max() < 1e-5


@pytest.mark.parametrize("source", ["first", "runs/first", "runs/first/adapter", FIRST])
def test_a_source_may_be_named_in_several_ways(home: Path, source: str) -> None:
    with contextlib.chdir(home):
        config = resolved(ModelConfig(path="wan", start=source, adapter=AdapterConfig(**ADAPTER)))
        assert config.start == FIRST
        assert resolved(config) == config


@pytest.mark.slow
def test_another_start_in_the_same_folder_is_refused(home: Path) -> None:
    trained(home, "same", "model.start=first")
    code, said = command(home, "train", "recipe.yaml", "run=same")
    assert code == 1
    assert "differs from recipe.yaml in model.start (first, now None)" in said
    weights = home / FIRST
    content, trained_json = weights.read_bytes(), home / "runs" / "first" / "trained.json"
    noted = files.read_object(trained_json)
    known(home, adapter=AdapterConfig(**ADAPTER), seed=5).save(weights.parent)
    code, said = command(home, "train", "same")
    assert code == 1
    assert said.startswith("runs/first/adapter/")
    assert said.endswith("[damaged]")
    files.write_json(trained_json, noted | {"sha256": files.sums(weights.parent)})
    code, said = command(home, "train", "same")
    weights.write_bytes(content)
    files.write_json(trained_json, noted)
    assert code == 1
    assert "was made with another model" in said


def test_what_is_no_start_is_one_line(home: Path) -> None:
    initialise(TINY_TRANSFORMER | {"num_layers": 3}, 0).save_pretrained(home / "deep")
    (home / "runs" / "unfinished").mkdir()
    (home / "runs" / "unfinished" / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"run": "unfinished"}))
    for overrides, expected in (
        (["model.start=none"], "model.start: none is not a run, "),
        (
            ["model.start=unfinished"],
            "runs/unfinished/adapter: is missing or incomplete; run `posttrain train` to its end first",
        ),
        (["model.start=deep"], "model.start: deep was trained from another model; name that one in model.path"),
        (
            ["model.merge=[{path: whole}]"],
            "model.merge.0.path: runs/whole/adapter/transformer is a whole transformer; ",
        ),
        (
            ["model.start=first", "model.init=random", "model.adapter=null"],
            "recipe.yaml:5: model: init: random cannot be used with",
        ),
        (
            ["model.merge=[{path: first, scal: 2}]"],
            "model.merge=[{path: first, scal: 2}]: model.merge.0.scal: unknown key, ",
        ),
        (
            ["model.family=vae", "method={name: vae}", "model.start=first"],
            "recipe.yaml:5: model: start is for video models",
        ),
        (
            ["model.family=vae", "method={name: vae}", "model.adapter=null", "eval={clips: drops, splits: [train]}"],
            "eval={clips: drops, splits: [train]}: eval: is only for video models; leave it out of a recipe for vae",
        ),
    ):
        code, said = command(home, "train", "recipe.yaml", "run=wrong", *overrides)
        assert code == 1
        assert said.startswith(expected), said
    with contextlib.chdir(home), pytest.raises(UserError, match="did you mean 'scale'"):
        open_run("recipe.yaml", ["run=wrong2", "model.merge=[{path: first, scal: 2}]"])
