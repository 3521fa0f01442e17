"""A golden case on disk: `case.json`, arrays, weights, gradients."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file


class CaseError(Exception):
    """A folder that is no golden case; the message says why."""


class Case:
    """One folder: description, recorded arrays, and files of tensors."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        path = self.folder / "case.json"
        try:
            self.info: dict[str, Any] = json.loads(path.read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CaseError(f"{path}: unreadable ({error})") from error
        if not isinstance(self.info, dict) or "kind" not in self.info:
            raise CaseError(f"{path}: has no 'kind'")

    @property
    def kind(self) -> str:
        return self.info["kind"]

    @property
    def name(self) -> str:
        return self.folder.name

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """Everything in `io.npz`, {} without one."""
        path = self.folder / "io.npz"
        if not path.exists():
            return {}
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}

    def tensors(self, file: str) -> dict[str, np.ndarray]:
        """One safetensors file by key."""
        return load_file(self.folder / file)

    def has(self, file: str) -> bool:
        return (self.folder / file).exists()

    def role(self, name: str) -> str:
        """ "input", "noise", "teacher", "output", "grad", or "" where the case does not say."""
        return self.info.get("arrays", {}).get(name, {}).get("role", "")

    def named(self, role: str) -> list[str]:
        """Names of the arrays of one role, in order; those listed but absent from the file too."""
        listed = [name for name, row in self.info.get("arrays", {}).items() if row.get("role") == role]
        return listed

    def unlisted(self) -> list[str]:
        """Arrays of `io.npz` that `case.json` does not describe."""
        return [name for name in self.arrays if name not in self.info.get("arrays", {})]

    def gradient_files(self) -> list[str]:
        """Files that hold gradients, by name."""
        return sorted(path.name for path in self.folder.glob("grads*.safetensors"))


def find(arguments: list[str]) -> tuple[list[Path], list[str], list[str]]:
    """Case folders, notes and errors for the command line's arguments.

    An argument may be a case or a folder of cases; a plain file is skipped with
    a note; a folder without a case in it is an error.
    """
    folders: list[Path] = []
    notes, errors = [], []
    for argument in arguments:
        path = Path(argument)
        if path.is_file():
            notes.append(f"skipped {argument}: a plain file, not a case folder")
        elif not path.is_dir():
            errors.append(f"{argument}: no such folder")
        elif (path / "case.json").is_file():
            folders.append(path)
        else:
            inside = sorted(p.parent for p in path.glob("*/case.json"))
            if not inside:
                errors.append(f"{argument}: holds no case.json, nor does any folder in it")
            folders.extend(inside)
    return folders, notes, errors
