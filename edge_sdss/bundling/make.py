"""bundle: a folder that appears whole, checked at each stage, or not at all."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdss import __version__, bundles, config, default_model
from edge_sdss.bundles import MANIFEST, AdapterEntry, Check, Graph, Manifest, adapters, checks, probe
from edge_sdss.bundles.manifest import TOKENIZER
from edge_sdss.bundles.recipes import Recipe
from edge_sdss.bundling import probing, static
from edge_sdss.bundling.agreement import Stages, of_engine, texts
from edge_sdss.errors import BackendUnavailable, ExportError, InputError, message
from edge_sdss.exporting import fast, genai_config, htp, onnx, parity, portable, scoring, tensorrt
from edge_sdss.exporting.fast_decoder import Options
from edge_sdss.lm import loading
from edge_sdss.lm.chat import Chat
from edge_sdss.types import Example, Progress, no_progress

if TYPE_CHECKING:
    from edge_sdss.boards import Board

ENGINE = "engine"
"""The folder in a bundle for TensorRT that is copied to the device; no file of the bundle itself."""

_FLOAT = "float32 graph"
_PACKAGES = ("onnxruntime", "onnx-ir", "onnx", "optimum-onnx", "transformers", "torch", "peft", "numpy")


def bundle(
    settings: config.Model,
    recipe: Recipe,
    out: Path,
    *,
    adapters: Mapping[str, Path] | None = None,
    active: str | None = None,
    merged: bool = False,
    overwrite: bool = False,
    trust: bool = False,
    beyond_limits: bool = False,
    board: Board | None = None,
    kept: Sequence[Example] = (),
    progress: Progress = no_progress,
) -> Manifest:
    """Exports the model of the settings by a recipe into the folder `out` and returns the bundle's manifest.

    `adapters` are PEFT folders by name, converted and checked with the engine against PEFT; `active` is the one
    that serves, by default the only one. With `merged`, and by a recipe of that route, the single adapter goes into
    the weights. Parity is taken at each stage: torch, float32 graph, graph, engine; what could not be compared is in
    the manifest's notes. A PEFT folder without a probe gets one. `trust` takes adapters that do not say of which base
    they are, and `beyond_limits` notes where the recipe's own limits are not kept; `board` is asked whether it can
    build a TensorRT engine; `kept` dialogues calibrate what is quantised by ranges. `out` is there once all of it is
    done; something is there only with `overwrite`, and if it is a bundle.

    Raises BackendUnavailable for a library that lacks; ExportError and ParityError for what cannot be exported or
    does not answer as it should; InputError for a model, an adapter or an `out` that cannot be used.
    """
    given, merge = dict(adapters or {}), merged or recipe.route == "merged"
    _check_asked(recipe, given, active, merge)
    check_installed(recipe)
    folder = loading.find(settings.name, progress)
    with _staged(out, overwrite) as staged:
        job = _Job(folder, recipe, staged, merge, given, trust, beyond_limits, kept, progress)
        manifest = job.run(_name(settings), active or (next(iter(given)) if len(given) == 1 else None))
        if recipe.providers[0].name == "tensorrt":
            eoe: scoring.Variant = "token" if config.Selection().eoe == "token" else "centered"
            scores = eoe if manifest.graph.hidden_states else None
            tensorrt.write(staged, staged / ENGINE, recipe.shapes, board=board, scores=scores)
        bundles.verify(staged)
    return manifest


def check_installed(recipe: Recipe) -> None:
    """Raises BackendUnavailable where a library is absent that an export by this recipe takes."""
    for name in ("onnx_ir", "onnxruntime", "tokenizers"):
        if importlib.util.find_spec(name) is None:
            do = "run `pip install 'edge_sdss[export]'`"
            raise BackendUnavailable(message(f"export for {recipe.name}", f"{name} is not installed", do))
    if recipe.route == "static":
        htp.check_installed()
    elif recipe.route != "fast":
        onnx.check_installed()


@dataclass
class _Job:
    """One export into `staged`. `merge`: into the weights."""

    folder: Path
    recipe: Recipe
    staged: Path
    merge: bool
    adapters: Mapping[str, Path]
    trust: bool
    beyond_limits: bool
    kept: Sequence[Example]
    progress: Progress

    def run(self, base: str, active: str | None) -> Manifest:
        fingerprint = loading.fingerprint(self.folder)
        for source in self.adapters.values():
            adapters.check_base(source, fingerprint, self.trust)
        _copy_tokenizer(self.folder, self.staged)
        chat = _chat(self.folder)
        self.stages = Stages(texts(chat), self.progress)
        merged = next(iter(self.adapters.values())) if self.merge else None
        self.stages.torch(self.folder, {} if self.merge else self.adapters, fingerprint, merged)
        graph = self._static(chat) if self.recipe.route == "static" else self._graph(merged)
        _note_departures(self.recipe, graph, self.stages.notes)
        manifest = Manifest(
            base=base,
            base_fingerprint=fingerprint,
            tokenizer_sha256=bundles.entry(self.staged, TOKENIZER).sha256,
            recipe=self.recipe.name,
            graph=graph,
            files=tuple(bundles.entry(self.staged, path) for path in _files(self.staged)),
            stop_ids=tuple(sorted(chat.stop_ids)),
            made_with=_versions(),
            settings=self._settings(),
        )
        bundles.write(self.staged, manifest)
        made = () if self.merge else tuple(self._adapter(name, manifest) for name in self.adapters)
        manifest = manifest.model_copy(update={"adapters": made, "active": None if self.merge else active})
        bundles.write(self.staged, manifest)
        served = self._emulated() if graph.static else self._served()
        size = sum(one.size_bytes for one in manifest.files)
        self.stages.judge(self.recipe, size if base == default_model.NAME else None, self.beyond_limits)
        notes = tuple(self.stages.notes)
        manifest = manifest.model_copy(update={"checks": (*self.stages.checks, *served), "notes": notes})
        bundles.write(self.staged, manifest)
        return manifest

    def _graph(self, merged: Path | None) -> Graph:
        """Writes the graph, after the float32 graph was compared with torch, and compares it with that one."""
        source, aside = self.folder, self.staged / ".aside"
        if merged is not None:
            from edge_sdss.exporting.merge import merged as merge

            source = merge(self.folder, merged, aside / "merged", progress=self.progress)
        graph = self._fast(source, aside) if self.recipe.route == "fast" else self._portable(source)
        stage, quantised = f"{graph.precision} graph", graph.precision in ("int4", "int8")
        self.stages.graph(stage, _FLOAT if quantised else "torch", self.staged, graph, keep=True)
        shutil.rmtree(aside, ignore_errors=True)
        return graph

    def _fast(self, source: Path, aside: Path) -> Graph:
        precision, lora = self.recipe.precision, not self.merge
        if precision in ("int4", "int8"):
            options = Options("float32", adapters=False, last_logits_only=False)
            whole = fast.build_with(options, source, aside / "float", self.progress)
            self.stages.graph(_FLOAT, "torch", aside / "float", whole, keep=True)
            shutil.rmtree(aside / "float")
        graph = fast.build(
            source,
            self.staged,
            precision=precision,
            adapters=lora,
            hidden_states=lora,  # E(T) is the base model's
            block_size=self.recipe.block_size or 32,
            half=self.recipe.kv_dtype == "float16",
            progress=self.progress,
        )
        genai_config.write(source, self.staged, graph)
        return graph

    def _portable(self, source: Path) -> Graph:
        def compared(folder: Path, graph: Graph) -> None:
            self.stages.graph(_FLOAT, "torch", folder, graph, keep=True)

        return portable(
            source,
            self.staged,
            precision=self.recipe.precision,
            adapters=not self.merge,
            hidden_states=not self.merge,
            block_size=self.recipe.block_size or 32,
            zero_points="float",
            before_quantising=compared,
            progress=self.progress,
        )

    def _adapter(self, name: str, manifest: Manifest) -> AdapterEntry:
        source = self.adapters[name]
        entry = adapters.convert(source, manifest, self.staged, name, trust=self.trust)
        if not probing.probed(source, manifest.base_fingerprint):
            return entry
        path = self.staged / f"probes/{name}.npz"
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(source / probe.PROBE, path)
        return entry.model_copy(update={"probe": bundles.entry(self.staged, f"probes/{name}.npz")})

    def _served(self) -> tuple[Check, ...]:
        """What the engine computes: the graph's own answers, and each adapter's effect."""
        from edge_sdss.runtime import Engine

        graph = bundles.load(self.staged).graph
        engine = Engine.open(self.staged)
        limits = parity.Limits(kl=parity.LIMITS[graph.precision].kl or 1e-6)
        stage = f"engine on {engine.provider}"
        self.stages.compare(stage, f"{graph.precision} graph", of_engine(engine.logits), limits)
        wanted = self.recipe.providers[0].name
        if engine.provider != wanted:
            self.stages.notes.append(f"checked on {engine.provider}, not on {wanted}: {engine.provider_reason}")
        del engine
        return probing.served(self.staged, progress=self.progress)

    def _static(self, chat: Chat) -> Graph:
        """Writes graphs of fixed shapes, of which the float32 ones were compared with torch."""
        self.maker = static.Maker(self.folder, self.staged, self.recipe, self.progress)
        self.stages.compare(_FLOAT, "torch", self.maker.float_model().logits, parity.LIMITS["float32"])
        return self.maker.write(static.calibration(chat, self.kept), self.adapters)

    def _emulated(self) -> tuple[Check, ...]:
        """What the compiled graphs compute in the emulation of the device, and each adapter's effect there."""
        manifest = bundles.load(self.staged)
        options = dict(self.recipe.providers[0].options)
        first = self.maker.first()
        opened = static.StaticBundle(self.staged, manifest, lambda file: htp.session(file, options), first)
        limits = parity.LIMITS[manifest.graph.precision]
        stage = f"{manifest.graph.precision} graph on {static.EMULATED}"
        self.stages.compare(stage, "torch", lambda ids: opened.logits(ids.tolist(), None), limits)
        self.stages.notes.append(f"checked on {static.EMULATED}, no device has run it")
        names = {name for site in manifest.graph.sites for name in (site.lora_a, site.lora_b)}
        found = checks.activation(self.staged, opened.logits, inputs=names)
        self.maker.clean()
        return found

    def _settings(self) -> dict[str, Any]:
        first = self.recipe.providers[0]
        found: dict[str, Any] = {"route": self.recipe.route, "provider": first.name, "provider_options": first.options}
        if self.merge:
            found["merged"] = list(self.adapters)
        return found


def _check_asked(recipe: Recipe, given: Mapping[str, Path], active: str | None, merge: bool) -> None:
    asked = f"export for {recipe.name}"
    for name in given:
        adapters.check_name(name)
    if merge and len(given) != 1:
        found = f"{len(given)} adapters are given, and one is merged into the weights"
        raise InputError(message(asked, found, "name one with --adapter NAME=DIR"))
    if active is not None and active not in given:
        raise InputError(message(asked, f"adapter {active} is to serve and is not among those given", "give it too"))


@contextmanager
def _staged(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a folder beside `out` that takes its place at the end; what a killed export left of one is removed."""
    out = out.expanduser().absolute()
    asked, old = f"export into {out}", out.with_name(f".{out.name}.old.partial")
    _put_back(old, out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not overwrite:
            raise InputError(message(asked, "something is there", "choose another --out or pass --overwrite"))
        if not (out / MANIFEST).is_file():
            raise InputError(message(asked, "it holds something else than a bundle", "choose another --out"))
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            os.rename(out, old)
        os.rename(partial, out)
    except OSError as error:
        found = error.strerror or "failed"
        raise ExportError(message(asked, found, "free space or choose another --out")) from error
    finally:
        _put_back(old, out)
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)


def _put_back(old: Path, out: Path) -> None:
    """Where an export ended between its two renames, what was there before it is there again."""
    if old.exists() and not out.exists():
        os.rename(old, out)


def _files(folder: Path) -> list[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))


def _copy_tokenizer(source: Path, out: Path) -> None:
    if not (source / TOKENIZER).is_file():
        do = "save the model's fast tokenizer into it with transformers"
        raise InputError(message(f"export {source}", f"there is no {TOKENIZER} in it", do))
    onnx.copy_companions(source, out)


def _chat(folder: Path) -> Chat:
    """The model's format of conversations, read as the device reads it, with the stop tokens that torch has."""
    from edge_sdss.runtime.chat import Tokenizer, read_json

    said = read_json(folder / "generation_config.json") or read_json(folder / "config.json")
    stops = said.get("eos_token_id")
    return Chat(Tokenizer(folder), stops if isinstance(stops, list) else [stops])


def _note_departures(recipe: Recipe, graph: Graph, notes: list[str]) -> None:
    """What the recipe asks for and the graph is not."""
    if recipe.status != "run here on x86":
        notes.append(f"{recipe.name} is {recipe.status}: {recipe.status_note}")
    for key in ("kv_dtype", "lora_dtype"):
        wanted, found = getattr(recipe, key), getattr(graph, key)
        if wanted != found and (graph.sites or key == "kv_dtype"):
            notes.append(f"the recipe asks for {key} {wanted}, the graph has {found}")
    if recipe.shapes.static and graph.static is None:
        notes.append("the recipe asks for static shapes, which are not written yet: this graph's are free")


def _name(settings: config.Model) -> str:
    if settings.name is None:
        return default_model.NAME
    path = Path(settings.name).expanduser()
    return path.resolve().name if path.is_dir() else settings.name


def _versions() -> dict[str, str]:
    found = {"edge_sdss": __version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
