"""What every recipe must say, and what a wrong one is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import edge_sdss
from edge_sdss import jetpack
from edge_sdss.bundles import recipes
from edge_sdss.errors import InputError

ROOT = Path(edge_sdss.__file__).parent.parent
TEXT = (recipes.folder() / "onnxruntime-cpu.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_is_complete(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.name == name
    assert recipe.about
    assert recipe.status_note
    assert recipe.device.packages or recipe.device.needs
    assert recipe.host.packages == () or recipe.host.packages[0].startswith("edge_sdss[export]")
    assert all(len(step) > 20 for step in recipe.check)
    assert recipe.limits != recipes.Limits()
    assert all(re.fullmatch(r"[\w.]+", key) for key in recipe.session)


@pytest.mark.parametrize("name", recipes.names())
def test_nothing_claims_a_device(name: str) -> None:
    """Only the CPU of an x86 machine was at hand."""
    recipe = recipes.load(name)
    x86 = [provider.name for provider in recipe.providers] == ["cpu"]
    assert recipe.status == ("run here on x86" if x86 else "not yet run on a device")


@pytest.mark.parametrize("name", recipes.names())
def test_providers_end_where_a_fallback_is_possible(name: str) -> None:
    recipe = recipes.load(name)
    names = [provider.name for provider in recipe.providers]
    if recipe.session.get("session.disable_cpu_ep_fallback") == "1":
        assert "cpu" not in names
    assert "cpu" not in names[:-1]


def test_the_targets_of_the_design_are_there() -> None:
    targets = {"onnxruntime-cpu", "jetson-orin-jp6", "jetson-orin-jp7", "jetson-thor", "qnn-htp", "coreml", "tensorrt"}
    assert targets <= set(recipes.names())


@pytest.mark.parametrize(
    ("name", "l4t"), [("jetson-orin-jp6", "36.4"), ("jetson-orin-jp7", "39.2"), ("jetson-thor", "38.2")]
)
def test_jetson_recipes_agree_with_the_table_of_releases(name: str, l4t: str) -> None:
    recipe, release = recipes.load(name), jetpack.RELEASES[l4t]
    for fact in (release.cuda, release.tensorrt, f"Python {release.python}", l4t):
        assert fact in recipe.about
    assert recipe.device.needs


def test_every_recipe_is_in_the_docs() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert [name for name in recipes.names() if f"`{name}`" not in text] == []


def test_one_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(TEXT)
    assert recipes.load(str(tmp_path / "mine.toml")).name == "mine"
    with pytest.raises(InputError, match=r"no such recipe; choose coreml, .* or give a TOML file"):
        recipes.load("nothing")
    with pytest.raises(InputError, match="No such file"):
        recipes.load(str(tmp_path / "absent.toml"))


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('precision = "int4"', 'precision = "int3"', "precision: Input should be"),
        ("block_size = 32\n", "", "int4 needs a block_size"),
        ('precision = "int4"', 'precision = "float16"', "float16 has no block_size"),
        ('kv_cache = "shared"', 'kv_cache = "growing"', "makes no graph with a growing KV cache"),
        ('route = "fast"\n', "", "route: Field required"),
        ("batch = { min = 1,", "batch = { min = 9,", "shapes.batch: .* min ≤ opt ≤ max"),
        ("[limits]", "[limits]\nspeed = 1", "limits.speed: Extra inputs"),
        ('name = "cpu"', 'name = "npu"', r"providers.0.name: Input should be"),
        ('[[providers]]\nname = "cpu"', '[[providers]]\nname = "cpu"\n[[providers]]\nname = "cpu"', "named twice"),
        ("rank = {", "rang = {", "shapes.rang: Extra|shapes.rank"),
        ("[limits]", "[limits", "no valid TOML"),
        ('status = "run here on x86"', 'status = "run on a phone"', "status: Input should be"),
    ],
)
def test_a_wrong_recipe_names_its_key(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    assert old in TEXT
    (tmp_path / "wrong.toml").write_text(TEXT.replace(old, new, 1))
    with pytest.raises(InputError, match=complaint):
        recipes.load(str(tmp_path / "wrong.toml"))


def test_an_installed_package_reads_its_own_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "_PACKAGE", tmp_path / "edge_sdss")
    (tmp_path / "export").mkdir()
    assert recipes.folder() == tmp_path / "export"
    (tmp_path / "edge_sdss" / "_recipes").mkdir(parents=True)
    (tmp_path / "edge_sdss" / "_recipes" / "only.toml").write_text(TEXT)
    assert recipes.names() == ("only",)
    assert recipes.load("only").route == "fast"


def test_the_wheel_takes_the_recipes_in() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'export = "edge_sdss/_recipes"' in project.partition("[tool.hatch.build.targets.wheel.force-include]")[2]
