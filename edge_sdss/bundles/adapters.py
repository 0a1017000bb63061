"""Adapters of a graph with LoRA inputs: a PEFT folder becomes an .onnx_adapter, and back. Needs no torch.

Knows nothing of how an adapter is given to a session, or of whether it works there; see `checks`.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_sdss.bundles import peft
from edge_sdss.bundles.manifest import AdapterEntry, Graph, Manifest, Site, entry
from edge_sdss.bundles.peft import Lora, Pair
from edge_sdss.errors import BackendUnavailable, ExportError, InputError, message
from edge_sdss.files import sha256
from edge_sdss.lm import CARD

if TYPE_CHECKING:
    from types import ModuleType

    from numpy.typing import NDArray

FOLDER, SUFFIX = "adapters", ".onnx_adapter"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def convert(folder: Path, manifest: Manifest, bundle: Path, name: str, *, trust: bool = False) -> AdapterEntry:
    """Writes the PEFT folder as `adapters/<name>.onnx_adapter` below `bundle` and returns its entry.

    The folder's card must name the manifest's base. One without a card, such as PEFT's own trainer writes, is taken
    with `trust` alone: an adapter of another model of the same shape fits in every dimension and answers nonsense.
    Raises InputError where the folder cannot be read or written, or is of another base; ExportError where the graph
    cannot compute it.
    """
    check_name(name)
    check_base(folder, manifest.base_fingerprint, trust)
    lora = peft.read(folder)
    path = f"{FOLDER}/{name}{SUFFIX}"
    write(bundle / path, pack(lora, manifest.graph), manifest.base_fingerprint)
    return AdapterEntry(
        name=name,
        file=entry(bundle, path),
        rank=max(pair.rank for pair in lora.modules.values()),
        scale=lora.scale,
        base_fingerprint=manifest.base_fingerprint,
        source_sha256=sha256(folder / peft.WEIGHTS),
    )


def restore(file: Path, manifest: Manifest, folder: Path) -> None:
    """Writes an .onnx_adapter as a PEFT folder with alpha = r, and with a card that names the base.

    float32 values are kept bit by bit. Raises InputError where the file cannot be read or the folder not be written,
    and where the file is of another base or graph.
    """
    from edge_sdss.files import replace

    peft.write(folder, unpack(read(file, manifest.base_fingerprint), manifest.graph), manifest.base)
    card = {"base": manifest.base, "base_fingerprint": manifest.base_fingerprint, "restored_from": sha256(file)}
    replace(folder / CARD, json.dumps(card, indent=1) + "\n")


def check_name(name: str) -> None:
    """Raises InputError where `name` cannot be an adapter's, which is a file's too."""
    if not _NAME.fullmatch(name):
        found = (
            "a name has letters, digits, dots, dashes and underscores, at most 64, and starts with one of the first two"
        )
        raise InputError(message(f"name an adapter {name!r}", found, "choose another name"))


def check_base(folder: Path, fingerprint: str, trust: bool = False) -> None:
    """Raises InputError unless the card in a PEFT folder names this base; `trust` takes a folder without a card."""
    asked = f"take adapter {folder}"
    if not (folder / peft.CONFIG).is_file():
        found = f"there is no {peft.CONFIG} in it" if folder.is_dir() else "there is no such folder"
        raise InputError(message(asked, found, "give a PEFT folder"))
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        base = card.get("base_fingerprint") if isinstance(card, dict) else None
    except FileNotFoundError:
        base = None
    except (OSError, ValueError) as error:
        raise InputError(message(asked, f"{CARD} cannot be read, {error}", "train it anew")) from error
    if base is None and not trust:
        found = f"no {CARD} in it says on which model it was trained"
        raise InputError(message(asked, found, "pass --trust if it is of this base, or train it here"))
    if base not in (None, fingerprint):
        found = f"it was trained on the model {str(base)[:12]}, this bundle has {fingerprint[:12]}"
        raise InputError(message(asked, found, "export the model it was trained on"))


def pack(lora: Lora, graph: Graph) -> dict[str, NDArray[np.floating]]:
    """Returns the graph's LoRA inputs by name, A [inputs, r] and B [r, outputs], of `graph.lora_dtype`.

    Modules that share an input stand side by side: A on axis 1, B block by block, its other entries 0.
    Raises ExportError where the graph has no site for a module, or one of other dimensions.
    """
    asked, dtype = "fit the adapter to the graph", np.dtype(graph.lora_dtype)
    homeless = sorted(lora.modules.keys() - {site.module for site in graph.sites})
    if homeless:
        found = f"{len(homeless)} of its modules have no site there, {homeless[0]} for one"
        raise ExportError(message(asked, found, "export the base with these modules among its targets"))
    arrays: dict[str, NDArray[np.floating]] = {}
    for sites in _groups(graph.sites):
        used = [(site, lora.modules[site.module]) for site in sites if site.module in lora.modules]
        if not used:
            continue
        for site, pair in used:
            if (pair.a.shape[0], pair.b.shape[1]) != (site.inputs, site.outputs):
                found = (
                    f"{site.module} is [{pair.a.shape[0]}, {pair.b.shape[1]}], there [{site.inputs}, {site.outputs}]"
                )
                raise ExportError(message(asked, found, "export the model it was trained on"))
        b = np.zeros((sum(pair.rank for _, pair in used), _width(sites)), np.float32)
        row = 0
        for site, pair in used:
            b[row : row + pair.rank, site.start : site.start + site.outputs] = pair.b
            row += pair.rank
        for name, array in ((sites[0].lora_a, np.concatenate([pair.a for _, pair in used], 1)), (sites[0].lora_b, b)):
            with np.errstate(over="ignore"):
                arrays[name] = np.ascontiguousarray(array, dtype)
            if not np.isfinite(arrays[name]).all():
                raise ExportError(message(asked, f"{name} overflows in {dtype}", "export the base with float32 LoRA"))
    return arrays


def unpack(arrays: Mapping[str, NDArray[np.floating]], graph: Graph) -> dict[str, Pair]:
    """Returns what `pack` was given, by module; the ranks of modules that share an input are found again.

    A row of B belongs to the module whose columns it fills. Rows of zeros change nothing: they are shared out
    equally where that fits all other rows, and go with the row before them where it does not.
    Raises InputError for names or dimensions that are not the graph's.
    """
    known = {name for site in graph.sites for name in (site.lora_a, site.lora_b)}
    strange = sorted(arrays.keys() - known)
    if strange:
        raise InputError(_other_graph(f"it has {strange[0]}, which the graph lacks"))
    found: dict[str, Pair] = {}
    for sites in _groups(graph.sites):
        a, b = arrays.get(sites[0].lora_a), arrays.get(sites[0].lora_b)
        if a is None and b is None:
            continue
        name = sites[0].lora_a
        if a is None or b is None:
            raise InputError(_other_graph(f"of {name} and its B only one is there"))
        if a.ndim != 2 or b.shape != (a.shape[1], _width(sites)) or a.shape[0] != sites[0].inputs:
            raise InputError(_other_graph(f"{name} is {list(a.shape)} and its B {list(b.shape)}"))
        owners = _owners(b, sites)
        for index, site in enumerate(sites):
            rows = [row for row, owner in enumerate(owners) if owner == index]
            if rows:
                columns = slice(site.start, site.start + site.outputs)
                pair = (a[:, rows], b[rows, columns])
                found[site.module] = Pair(*(np.ascontiguousarray(array, np.float32) for array in pair))
    return found


def write(file: Path, arrays: Mapping[str, NDArray[np.floating]], fingerprint: str) -> None:
    """Writes an .onnx_adapter, bound to the base by its version of the model (see `model_version`).

    Raises InputError where it cannot be written; BackendUnavailable without ONNX Runtime.
    """
    ort = _onnxruntime()
    made = ort.AdapterFormat()
    made.set_adapter_version(1)
    made.set_model_version(model_version(fingerprint))
    # An OrtValue borrows NumPy's memory: `arrays` must live until the file is written, which the caller's frame does.
    made.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        made.export_adapter(str(file))
        if not file.is_file() or not file.stat().st_size:
            raise OSError(None, "nothing was written")
    except (OSError, RuntimeError) as error:
        found = getattr(error, "strerror", None) or str(error)
        raise InputError(message(f"write {file}", found, "free space")) from error


def read(file: Path, fingerprint: str | None = None) -> dict[str, NDArray[np.floating]]:
    """Returns the arrays of an .onnx_adapter by name; with `fingerprint`, one of another base is refused.

    Raises InputError where the file is no adapter or of another base; BackendUnavailable without ONNX Runtime.
    """
    ort = _onnxruntime()
    asked = f"read adapter {file}"
    try:
        if not file.is_file():
            raise OSError(None, "there is no such file")
        found = ort.AdapterFormat.read_adapter(str(file))
        arrays = {name: value.numpy().copy() for name, value in found.get_parameters().items()}
    except Exception as error:  # the library's errors have no common class but this
        text = (str(getattr(error, "strerror", None) or error).splitlines() or [type(error).__name__])[0]
        raise InputError(message(asked, text, "give an .onnx_adapter")) from error
    if fingerprint is not None and found.get_model_version() != model_version(fingerprint):
        raise InputError(message(asked, "it was made for another base", f"make it anew for {fingerprint[:12]}"))
    return arrays


def model_version(fingerprint: str) -> int:
    """Returns the 31 bits of a base's fingerprint that an .onnx_adapter has room for."""
    return zlib.crc32(fingerprint.encode()) & 0x7FFFFFFF


def _groups(sites: Sequence[Site]) -> Iterator[list[Site]]:
    """Sites that share their inputs, by their first column."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.lora_a, []).append(site)
    for group in groups.values():
        yield sorted(group, key=lambda site: site.start)


def _width(sites: Sequence[Site]) -> int:
    return max(site.start + site.outputs for site in sites)


def _owners(b: NDArray[np.floating], sites: Sequence[Site]) -> list[int]:
    """For each row of B [r, outputs], which of the sites it belongs to."""
    filled = np.stack([(b[:, s.start : s.start + s.outputs] != 0).any(1) for s in sites], 1)
    if (filled.sum(1) > 1).any():
        raise InputError(_other_graph("a row of B fills columns of several modules, which PEFT cannot say"))
    rows, count = b.shape[0], len(sites)
    if rows % count == 0:
        equal = np.arange(rows) // (rows // count) if rows else np.arange(0)
        if not (filled & (equal[:, None] != np.arange(count))).any():
            return [int(owner) for owner in equal]
    owners: list[int] = []
    for row in filled:
        owners.append(int(row.argmax()) if row.any() else (owners[-1] if owners else int(filled.argmax() % count)))
    return owners


def _other_graph(found: str) -> str:
    return message("read the adapter by this graph", found, "give an adapter that was made for this bundle")


def _onnxruntime() -> ModuleType:
    try:
        import onnxruntime
    except ImportError as error:
        found = "onnxruntime is not installed"
        raise BackendUnavailable(message("convert an adapter", found, "pip install onnxruntime")) from error
    if not hasattr(onnxruntime, "AdapterFormat"):
        found = f"onnxruntime {onnxruntime.__version__} has no adapters"
        raise BackendUnavailable(message("convert an adapter", found, "install 1.20 or newer"))
    return onnxruntime  # type: ignore[no-any-return]
