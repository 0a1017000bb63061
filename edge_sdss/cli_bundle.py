"""The verbs that bring a model to a device: export, deploy, bundles; what `rollback --bundle` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from edge_sdss import cli_explain, config, console, options
from edge_sdss.errors import EdgeSdssError, InputError, message
from edge_sdss.options import Home, Json, Model, Set, Settings
from edge_sdss.types import Example

if TYPE_CHECKING:
    from edge_sdss.bundles import Check, Manifest
    from edge_sdss.bundles.shelf import Shelf, Version

Provider = Annotated[
    str, typer.Option("--provider", help="What the checks run on: cpu, cuda, tensorrt, coreml, qnn or auto.")
]
Trust = Annotated[bool, typer.Option("--trust", help="Take adapters that do not say of which base they are.")]


def export(
    target: Annotated[
        str, typer.Option("--target", metavar="RECIPE", help="A recipe, a TOML file of your own, or `list`.")
    ] = "onnxruntime-cpu",
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="NAME=DIR", help="PEFT folders; default: the adapter of the active round."),
    ] = None,
    base_only: Annotated[bool, typer.Option("--base-only", help="No adapter.")] = False,
    out: Annotated[Path, typer.Option("--out", help="Folder for the bundle.")] = Path("bundle"),
    merged: Annotated[bool, typer.Option("--merged", help="Merge the one adapter into the weights.")] = False,
    board: Annotated[
        str | None, typer.Option("--board", help="With --target tensorrt: refuse what this board cannot build.")
    ] = None,
    trust: Trust = False,
    beyond_limits: Annotated[
        bool, typer.Option("--beyond-limits", help="Have a bundle that is beyond the recipe's limits; it is noted.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle that --out holds.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="No bundle: of an NPU's graph say which tensor goes wrong first, and why.")
    ] = False,
    allow_fallback: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-fallback", metavar="OP", help="With --explain: a node, or kind of node, may leave the NPU."
        ),
    ] = None,
    graph: Annotated[
        Literal["prefill", "decode"], typer.Option("--graph", help="Which one --explain and --phone are about.")
    ] = "prefill",
    phone: Annotated[
        Path | None, typer.Option("--phone", metavar="DIR", help="No bundle: a folder to check a real phone with.")
    ] = None,
    model: Model = None,
    home: Home = None,
    settings_file: Settings = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Make a bundle for a target: quantised graph, tokenizer, adapters, each stage checked against the one before.

    It appears when all of it is done. Examples: edge-sdss export --target onnxruntime-cpu --out bundle; edge-sdss
    export --target list; edge-sdss export --adapter work=my-peft-folder --out bundle; edge-sdss export --target qnn-htp
    --explain (writes bundle.explain.md and .json; exit 1 where an output goes wrong)
    """
    from edge_sdss import boards, bundling
    from edge_sdss.bundles import recipes

    if target == "list":
        _list_recipes(json_)
        return
    settings = options.settings(settings_file, set_, {"model": {"name": model}})
    recipe = recipes.load(target)
    given = {} if base_only else _given(adapter) or _of_home(options.home(home), settings)
    kept = _kept(options.home(home), settings) if recipe.route == "static" else ()
    if explain:
        cli_explain.run(settings, recipe, graph, given, kept, out, overwrite, allow_fallback or (), json_)
        return
    if phone is not None:
        cli_explain.phone(settings, recipe, graph, given, kept, phone, json_)
        return
    with console.progress() as progress:
        manifest = bundling.bundle(
            settings.model,
            recipe,
            out,
            adapters=given,
            merged=merged,
            overwrite=overwrite,
            trust=trust,
            beyond_limits=beyond_limits,
            board=boards.load(board) if board else None,
            kept=kept,
            progress=progress,
        )
    sizes = {one.path: one.size_bytes for one in manifest.entries}
    console.emit({"bundle": str(out), **_facts(manifest), "size_bytes": sum(sizes.values())}, json_)
    if not json_:
        _show_checks(manifest.checks)
        for note in manifest.notes:
            console.note(f"Note: {note}.")


def deploy(
    source: Annotated[
        Path | None, typer.Argument(help="A bundle, or a PEFT folder; default: the adapter of the active round.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Of the adapter in the bundle; default: its folder's.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Add the adapter; the one before goes on serving.")] = False,
    trust: Trust = False,
    unprobed: Annotated[
        bool, typer.Option("--unprobed", help="Take an adapter of which PEFT's answers are not known.")
    ] = False,
    provider: Provider = "auto",
    model: Model = None,
    home: Home = None,
    settings_file: Settings = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Make a bundle, or the deployed bundle with another adapter, the one that serves.

    Nothing changes unless every file is whole and each adapter does with the engine what it did with PEFT.
    Examples: edge-sdss deploy bundle; edge-sdss deploy; edge-sdss deploy my-peft-folder --name work
    """
    from edge_sdss import bundling
    from edge_sdss.bundles import MANIFEST
    from edge_sdss.bundles.shelf import Shelf

    settings = options.settings(settings_file, set_, {"model": {"name": model}})
    folder = options.home(home)
    found = source or next(iter(_of_home(folder, settings).values()), None)
    if found is None:
        do = "name a bundle or a PEFT folder, or `edge-sdss tune` first"
        raise InputError(message("deploy", "this home has no adapter that serves", do))
    shelf = Shelf(folder)

    with console.progress() as progress:

        def check(only: Sequence[str] | None) -> Callable[[Path], Sequence[Check]]:
            how: Any = {"provider": provider, "only": only, "unprobed": unprobed, "progress": progress}
            return lambda staged: bundling.served(staged, **how)

        if (found / MANIFEST).is_file():
            version = shelf.deploy(found, check=check(None))
        elif (found / "adapter_config.json").is_file():
            called = name or found.resolve().name
            _probe(shelf, found, settings, progress)
            version = shelf.deploy_adapter(found, called, activate=not keep, trust=trust, check=check([called]))
        else:
            asked, do = f"deploy {found}", "give the folder of a bundle, or a PEFT folder"
            raise InputError(message(asked, "there is neither a manifest.json nor an adapter_config.json in it", do))
    _show(shelf, version, json_)


def bundles(
    prune: Annotated[
        int | None, typer.Option("--prune", min=1, metavar="N", help="Remove old versions until N are left.")
    ] = None,
    activate: Annotated[str | None, typer.Option("--activate", metavar="VERSION", help="Let this one serve.")] = None,
    home: Home = None,
    json_: Json = False,
) -> None:
    """List the deployed versions: the one that serves, their adapters, what was measured of them.

    Examples: edge-sdss bundles; edge-sdss bundles --prune 2
    """
    from edge_sdss.bundles import load
    from edge_sdss.bundles.shelf import Shelf

    shelf = Shelf(options.home(home))
    if activate is not None:
        shelf.activate(activate)
    gone = shelf.prune(prune) if prune is not None else ()
    versions = shelf.list()
    active = shelf.active()
    checks = load(active).checks if active else ()
    if json_:
        document = {"versions": [one.model_dump() for one in versions], "pruned": gone}
        console.emit({**document, "checks": [one.model_dump() for one in checks]}, True)
        return
    for name in gone:
        console.note(f"Removed {name}.")
    rows = [
        [
            "serves" if one.is_active else "",
            one.version,
            one.deployed_at[:16].replace("T", " "),
            ", ".join(f"{name} (active)" if name == one.adapter else name for name in one.adapters),
            _mb(one.size_bytes),
            _mb(one.own_bytes),
        ]
        for one in versions
    ]
    if not rows:
        console.note("No bundle is deployed: edge-sdss export, then edge-sdss deploy.")
        return
    console.table("Bundles", ["", "version", "deployed", "adapters", "MB", "own MB"], rows, whole=["version"])
    _show_checks(checks)


def roll_back(home: Path, as_json: bool) -> None:
    """Lets the version before the active one serve, and prints it."""
    from edge_sdss.bundles.shelf import Shelf

    shelf = Shelf(home)
    _show(shelf, shelf.rollback(), as_json)


def _given(named: Sequence[str] | None) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in named or ():
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise InputError(message(f"read --adapter {text}", "no NAME=DIR", "e.g. --adapter work=my-peft-folder"))
        if name in found:
            raise InputError(message(f"read --adapter {text}", f"{name} is given twice", "choose another name"))
        found[name] = Path(folder).expanduser()
    return found


def _of_home(home: Path, settings: config.Config) -> dict[str, Path]:
    """The adapter of the home's active round by its folder's name; nothing where there is no home yet."""
    if not (home / "edge_sdss.db").is_file():
        return {}
    with options.session(home, settings) as session:
        active = session.active_adapter
    return {} if active is None else {active.name: active}


def _kept(home: Path, settings: config.Config) -> list[Example]:
    """The dialogues in the home's buffer, with the answers that the user wanted; none where there is no home yet."""
    from edge_sdss import rounds

    if not (home / "edge_sdss.db").is_file():
        return []
    with options.session(home, settings) as session:
        found = [rounds.example_of(one, train_on_all=True) for one in session.store.exemplars().values()]
    return [example for example in found if example is not None]


def _probe(shelf: Shelf, adapter: Path, settings: config.Config, progress: Any) -> None:
    """Asks PEFT what it computes, where it is installed and nobody did so; else the checks say what is lacking."""
    from edge_sdss import bundling
    from edge_sdss.bundles import load
    from edge_sdss.lm import LanguageModel

    active = shelf.active()
    if active is None or not bundling.has_torch():
        return
    fingerprint = load(active).base_fingerprint
    if bundling.probed(adapter, fingerprint):
        return
    try:
        lm = LanguageModel.load(settings.model.model_copy(update={"dtype": "float32"}), progress=progress)
    except EdgeSdssError as error:
        console.note(f"PEFT is not asked about {adapter.name}: {error}")
        return
    if lm.fingerprint == fingerprint:
        bundling.record(lm, adapter)


def _facts(manifest: Manifest) -> dict[str, Any]:
    graph = manifest.graph
    return {
        "base": manifest.base,
        "recipe": manifest.recipe,
        "precision": graph.precision,
        "kv_cache": graph.kv_cache,
        "adapters": [one.name for one in manifest.adapters],
        "active": manifest.active,
        "checks": [one.model_dump() for one in manifest.checks],
        "notes": list(manifest.notes),
    }


def _show(shelf: Shelf, version: Version, as_json: bool) -> None:
    from edge_sdss.bundles import load

    checks = load(shelf.folder / version.version).checks
    console.emit({**version.model_dump(), "checks": [one.model_dump() for one in checks]}, as_json)
    if not as_json:
        _show_checks([one for one in checks if one.stage.startswith("adapter")])


def _show_checks(checks: Sequence[Check]) -> None:
    rows = [
        [
            one.stage,
            one.against,
            one.metric,
            f"{one.value:.4g}",
            "" if one.limit is None else f"{one.limit:g}",
            one.n,
        ]
        for one in checks
    ]
    if rows:
        console.table("Checks", ["stage", "against", "metric", "value", "limit", "n"], rows)


def _list_recipes(as_json: bool) -> None:
    from edge_sdss.bundles import recipes

    found = [recipes.load(name) for name in recipes.names()]
    if as_json:
        keys: Mapping[str, Any] = {
            one.name: one.model_dump(include={"about", "status", "status_note"}) for one in found
        }
        console.emit(keys, True)
        return
    rows = [[one.name, one.status, one.about, one.status_note] for one in found]
    console.table("Targets", ["recipe", "status", "for", "what was seen"], rows, whole=["recipe"])


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f}"
