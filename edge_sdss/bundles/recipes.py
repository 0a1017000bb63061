"""Recipes: how a model is exported for a target and what the target must have. One TOML each; its name is its key.

They lie in export/ beside the package, and in a wheel inside of it. Knows nothing of how an export is done.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edge_sdss.bundles.manifest import KvCache, Precision
from edge_sdss.files import read_named

Route = Literal["fast", "portable", "merged", "static"]
Provider = Literal["cpu", "cuda", "tensorrt", "coreml", "qnn"]
Status = Literal["run here on x86", "not yet run on a device"]

_PACKAGE = Path(__file__).parent.parent


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Extent(_Record):
    """What a dimension may be; `opt` is what a compiler should make fast."""

    min: int = Field(ge=0)
    opt: int
    max: int

    @model_validator(mode="after")
    def _in_order(self) -> Extent:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"min ≤ opt ≤ max does not hold for {self.min}, {self.opt}, {self.max}")
        return self


class Shapes(_Record):
    """The graph's free dimensions. `rank` is that of adapters, absent where they are merged.

    `static`: the target takes fixed shapes alone, a prefill graph with `sequence.max` tokens and a decode graph
    with one, both with `past.max`.
    """

    batch: Extent
    sequence: Extent
    past: Extent
    rank: Extent | None = None
    static: bool = False


class Execution(_Record):
    """An execution provider with its options, as ONNX Runtime takes them."""

    name: Provider
    options: dict[str, str] = {}


class Machine(_Record):
    """What must be there: packages as pip names them, with what pip cannot say in `needs`."""

    packages: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


class Limits(_Record):
    """What an export must keep, measured against float32. Sizes are those of the default model; None: not stated."""

    bundle_bytes: int | None = Field(None, gt=0)
    logit_difference: float | None = Field(None, gt=0, description="max |Δlogit|")
    nll_increase: float | None = Field(None, gt=0, description="relative, on held-out text")
    kl_nats: float | None = Field(None, gt=0, description="mean KL(float32 ‖ this) by token")


class Recipe(_Record):
    """One target. `providers` are tried in their order; `session` are entries of ONNX Runtime's session options.

    `status` is of this recipe from export to answer; `status_note` says what was seen of it, and what was not.
    """

    name: str
    about: str
    status: Status
    status_note: str
    route: Route
    precision: Precision
    block_size: int | None = Field(None, gt=0, description="weights that share a scale; absent: all of an output")
    head_precision: Literal["float16", "int8"] | None = Field(None, description="as `precision` where absent")
    float_layers: int = Field(0, ge=0, description="the first layers of static graphs, which are not quantised")
    part_bytes: int | None = Field(None, gt=0, description="of one static graph's weights: beyond, it is split")
    kv_cache: KvCache
    kv_dtype: Literal["float32", "float16"] = "float32"
    lora_dtype: Literal["float32", "float16"] = "float32"
    shapes: Shapes
    providers: tuple[Execution, ...] = Field(min_length=1)
    session: dict[str, str] = {}
    host: Machine
    device: Machine
    check: tuple[str, ...] = Field(min_length=1, description="how to see on the device that it works, in order")
    limits: Limits

    @model_validator(mode="after")
    def _agrees(self) -> Recipe:
        integers, static = self.precision in ("int4", "int8"), self.route == "static"
        if self.block_size is None and integers and not static:
            raise ValueError(f"{self.precision} needs a block_size")
        if self.block_size is not None and not integers:
            raise ValueError(f"{self.precision} has no block_size")
        cache = {"fast": "shared", "static": "static"}.get(self.route, "growing")
        if self.kv_cache != cache or (self.route == "static") != self.shapes.static:
            raise ValueError(f"the route {self.route} makes no graph with a {self.kv_cache} KV cache")
        if self.route == "fast" and self.kv_dtype != self.lora_dtype:
            raise ValueError("the fast graph has one float type for its KV cache and its adapters")
        if (self.route == "merged") != (self.shapes.rank is None):
            raise ValueError("shapes.rank is for adapters as inputs, which the merged route alone does not have")
        names = [provider.name for provider in self.providers]
        if len(set(names)) < len(names):
            raise ValueError("a provider is named twice")
        if self.shapes.static and self.shapes.past.opt != self.shapes.past.max:
            raise ValueError("with static shapes, past.opt is past.max")
        if (self.head_precision is not None or self.float_layers) and self.route != "static":
            raise ValueError("head_precision and float_layers are for the route static")
        return self


def folder() -> Path:
    """Where the recipes are: inside of an installed package, or beside it in a checkout."""
    inside = _PACKAGE / "_recipes"
    return inside if inside.is_dir() else _PACKAGE.parent / "export"


def names() -> tuple[str, ...]:
    """Every recipe there is, by file."""
    return tuple(sorted(file.stem for file in folder().glob("*.toml")))


def load(name: str) -> Recipe:
    """Returns a recipe by name, or one of the user's own by the path of its TOML file.

    Raises InputError for an unknown name and for a file that is no recipe, with the key that is wrong.
    """
    return read_named(name, folder(), Recipe, "recipe", "docs/recipes.md")
