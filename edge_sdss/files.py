"""What several modules need of files. Knows nothing of what is in them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from edge_sdss.config import parse
from edge_sdss.errors import InputError, message

Model = TypeVar("Model", bound=BaseModel)


def sha256(file: Path) -> str:
    """Returns the SHA-256 of a file's bytes, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def replace(path: Path, text: str) -> None:
    """Writes `text` as UTF-8; a reader sees the old file or the new one, also after a loss of power.

    Folders are made where they are missing. Raises InputError where the file cannot be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        found = error.strerror or "failed"
        raise InputError(message(f"write {path}", found, "free space or choose another --out")) from error
    finally:
        partial.unlink(missing_ok=True)


def read_record(path: Path, model: type[Model], name: str) -> Model:
    """Reads JSON that has a `schema_version` into its model; `name` says what it is, such as "a run's report.json".

    Raises InputError, which names the first key that is wrong. NaN and infinity are no JSON.
    """
    asked = f"read {path}"
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except OSError as error:
        raise InputError(message(asked, error.strerror or "unreadable", f"give {name}")) from error
    except (ValueError, RecursionError) as error:
        raise InputError(message(asked, f"no valid JSON, {error}", f"give {name}")) from error
    version = value.get("schema_version") if isinstance(value, dict) else None
    ours = model.model_fields["schema_version"].default
    if version != ours:
        found = f"schema_version {version!r}" if version is not None else "no schema_version"
        raise InputError(message(asked, f"{found}, not {ours!r}", f"give {name} that this version wrote"))
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(message(asked, f"{key}: {first['msg']}", f"give {name}, or write it anew")) from error


def read_named(name: str, folder: Path, model: type[Model], kind: str, docs: str) -> Model:
    """Reads the TOML file of that name in `folder`, or one of the user's own by its path, into its model.

    The model's `name` is the file's. `kind` is what it is called, `docs` where its keys are explained. Raises
    InputError for an unknown name and for a file that is none, with the key that is wrong.
    """
    names = sorted(file.stem for file in folder.glob("*.toml"))
    file = folder / f"{name}.toml" if name in names else Path(name).expanduser()
    asked = f"load {kind} {name}"
    if name not in names and file.suffix != ".toml":
        raise InputError(message(asked, f"no such {kind}", f"choose {', '.join(names)}, or give a TOML file"))
    try:
        return model.model_validate({**parse(file.read_text(encoding="utf-8")), "name": file.stem})
    except OSError as error:
        raise InputError(message(asked, error.strerror or "unreadable", "check the path")) from error
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{'.'.join(str(part) for part in first['loc']) or 'the file'}: {first['msg']}"
        raise InputError(message(asked, found, f"see {docs}")) from error
    except ValueError as error:
        raise InputError(message(asked, f"no valid TOML, {error}", "mend that line")) from error


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number of JSON")
