"""Tensors of a model folder by name, each from the file that counts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ampo.errors import UserError
from nemo_ampo.files import is_file
from nemo_ampo.model_folder.facts import read_object
from nemo_ampo.text import one_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_LFS = b"version https://git-lfs"


class SafetensorsFolder:
    """Tensors of a folder's ``*.safetensors`` files, loaded when asked for.

    An index decides which file each tensor is read from, whatever else lies beside; without one ``model.safetensors`` is
    the model; without that, all files together are.
    """

    def __init__(self, folder: Path) -> None:
        """Open the files that count and read their headers.

        Raises:
            UserError: there are none, one is absent or torn, the index names what is not there, or two files without
                an index hold the same tensor; or an adapter lies beside.
        """
        self._handles: dict[str, Any] = {}
        self._files: dict[str, Path] = {}
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"{folder}: has an adapter (adapter_config.json) beside its weights; merge it into them first")
        if (folder / INDEX_NAME).is_file():
            self._read_indexed(folder)
        elif (folder / SINGLE_NAME).is_file():
            self._read_all([folder / SINGLE_NAME])
        else:
            self._read_all(sorted(file for file in folder.glob("*.safetensors") if file.is_file()))
        if not self._handles:
            other = sorted(p.name for p in folder.glob("*.bin"))
            hint = f" (found {other[0]}; save it again as safetensors)" if other else ""
            raise UserError(f"{folder}: no *.safetensors weights{hint}")

    def _read_indexed(self, folder: Path) -> None:
        index = folder / INDEX_NAME
        places = read_object(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise UserError(f"{index}: has no weight_map (tensor name -> file name)")
        for name, file in places.items():
            if not isinstance(file, str) or Path(file).name != file or "\\" in file:
                raise UserError(f"{index}: {name!r}: {file!r} is no file name")
        absent = sorted({one_line(file, 80) for file in places.values() if not is_file(folder / file)})
        if absent:
            raise UserError(f"{index}: names absent weight files: {', '.join(absent)}")
        opened = {file: _open(folder / file) for file in sorted(set(places.values()))}
        held = {file: set(handle.keys()) for file, handle in opened.items()}
        for name, file in places.items():
            if name not in held[file]:
                raise UserError(f"{index}: tensor {name} is not in {file}, which it names")
            self._handles[name], self._files[name] = opened[file], folder / file

    def _read_all(self, files: list[Path]) -> None:
        for file in files:
            handle = _open(file)
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle is not iterable
                if name in self._handles:
                    raise UserError(
                        f"{file}: tensor {name} is also in another file of the folder, and no index says which counts"
                    )
                self._handles[name], self._files[name] = handle, file

    def names(self) -> set[str]:
        """All tensor names."""
        return set(self._handles)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor, from its file's header."""
        return tuple(self._handles[name].get_slice(name).get_shape())

    def load(self, name: str) -> Tensor:
        """One tensor, as stored; its file stays in memory for no longer than the tensor does."""
        # A tensor is a view of its handle's mapping of the whole file, of which every page once read stays resident.
        return _open(self._files[name]).get_tensor(name)

    def dtype(self) -> torch.dtype:
        """The narrowest type that holds every tensor exactly.

        Raises:
            UserError: a tensor is of a type that is no plain floating-point number: its weights are quantised.
        """
        import torch

        plain = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        kinds: dict[torch.dtype, str] = {}
        for name, handle in self._handles.items():
            kind = handle.get_slice(name)[:0].dtype if self.shape(name) else self.load(name).dtype
            kinds.setdefault(kind, name)
        for kind, name in kinds.items():
            if kind not in plain:
                raise UserError(
                    f"tensor {name} is stored as {str(kind).removeprefix('torch.')}; only plain weights can be read"
                )
        widest, *others = kinds
        for kind in others:
            widest = torch.promote_types(widest, kind)
        return widest


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        with file.open("rb") as start:
            if start.read(len(_LFS)) == _LFS:
                raise UserError(f"{file}: a pointer of Git LFS in place of the file; fetch it with: git lfs pull")
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file}: not a readable safetensors file ({error})") from error
