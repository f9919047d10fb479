"""Finding the weights of a checkpoint. Pickles are never opened."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from inflection_fast.run.errors import UserError

__all__ = ["Source", "find"]

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model"),
    *("tekken.json", "vocab.spm", "source.spm", "tokenizer.tiktoken"),
)
HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.spm", "*.tiktoken")
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")


@dataclass(frozen=True)
class Source:
    """A checkpoint on this machine."""

    name: str  # as the user wrote it
    folder: Path
    weights: tuple[Path, ...]  # safetensors files, or one GGUF file
    described: bool  # whether a configuration says what model the weights are of

    @property
    def gguf(self) -> str | None:
        """Name of the GGUF file, if it is one."""
        return self.weights[0].name if self.weights[0].suffix == ".gguf" else None

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer is there."""
        return self.gguf is not None or any((self.folder / name).is_file() for name in TOKENIZERS)

    @property
    def bytes(self) -> int:
        """Size of the weights on the disk."""
        return sum(path.stat().st_size for path in self.weights)


def find(model: str) -> Source:
    """The checkpoint `model`: a folder, a .safetensors or .gguf file, or a name on the hub.

    UserError if it is no checkpoint, has pickles only, or lacks shards.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return _of_file(model, path)
    if path.is_dir():
        return _of_folder(model, path)
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise UserError(f"{model}: there is no such file or folder")
    return _of_folder(model, _fetched(model))


def _of_file(model: str, path: Path) -> Source:
    if path.suffix in PICKLES:
        raise UserError(f"{model}: {_pickled(path.name)}")
    if path.suffix not in (".safetensors", ".gguf"):
        raise UserError(f"{model}: expected a folder, a .safetensors or a .gguf file, or a name on the hub")
    described = path.suffix == ".gguf" or (path.parent / "config.json").is_file()
    return Source(model, path.parent, (path,), described)


def _of_folder(model: str, folder: Path) -> Source:
    weights = _shards(model, folder)
    described = (folder / "config.json").is_file()
    if weights:
        return Source(model, folder, weights, described)
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{model}: holds an adapter alone; merge it into its model, save that, and give its folder")
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"{model}: holds {len(files)} GGUF files; give the path of one: {folder / files[0].name}")
    if files:
        return Source(model, folder, (files[0],), True)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise UserError(f"{model}: {_pickled(pickles[0])}")
    what = "a configuration and no weights" if described else "neither a configuration nor weights"
    raise UserError(f"{model}: is no model, the folder has {what} (model.safetensors or a .gguf file)")


def _pickled(name: str) -> str:
    return (
        f"the weights are pickled ({name}), and reading a pickle can run code, so none is ever loaded; save them as "
        "safetensors where they come from: model.save_pretrained(folder)"
    )


def _shards(model: str, folder: Path) -> tuple[Path, ...]:
    """All safetensors files of the checkpoint, without those of adapters."""
    index = folder / INDEX
    found = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))
    if index.is_file():
        try:
            trained = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index}: is no index of shards ({' '.join(str(error).split())})") from error
        outside = [name for name in trained if not isinstance(name, str) or Path(name).name != name]
        if outside:
            raise UserError(f"{index}: expected names of files in its folder, got {outside[0]!r}")
        paths = [folder / name for name in trained]
    else:
        paths = found
        matches = [match for path in found if (match := _SHARD.fullmatch(path.name))]
        if matches:
            stem, _, count = matches[0].groups()
            paths = [folder / f"{stem}-{i:0{len(count)}d}-of-{count}.safetensors" for i in range(1, int(count) + 1)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing and (found or index.is_file()):
        named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise UserError(f"{model}: {len(missing)} of {len(paths)} shards are missing: {named}")
    return tuple(paths)


def _fetched(model: str) -> Path:
    """The folder in the cache of the hub; pickles are not fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from requests.exceptions import RequestException

    try:
        return Path(snapshot_download(model, allow_patterns=list(HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RequestException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{model}: there is no such folder, and the hub did not give it: {reason}") from error
