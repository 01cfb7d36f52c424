"""The models of a sweep by the short names that its tables show, loaded when they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vtc.evaluation.loading import Loaded, load

# a model of more bytes makes room for the next one
_STAYS = 2**30


def short_names(models: Sequence[str]) -> dict[str, str]:
    """What each model is called, and the folder or hub id it is loaded from.

    A model of the testbed is called as its family, another one as the last part of its folder or
    hub id; what would be called like an earlier one gets a number.
    """
    from vtc.testbed import FAMILIES, model_folder

    testbed = {model_folder(family).resolve(): family for family in FAMILIES}
    found: dict[str, str] = {}
    for model in dict.fromkeys(models):
        source = str(model_folder(model)) if model in FAMILIES else model
        if source in found.values():
            continue
        folder = Path(source).expanduser().resolve()
        name = base = testbed.get(folder, folder.name)
        number = 1
        while name in found:
            number += 1
            name = f"{base}-{number}"
        found[name] = source
    return found


class Models(Mapping[str, Loaded]):
    """Models by short name; small ones stay loaded, of large ones the last that was asked for.

    Args:
        sources: folders or hub ids by short name.
        device: as `load` takes it.
        dtype: as `load` takes it.
    """

    def __init__(self, sources: Mapping[str, str], device: str | None, dtype: str) -> None:
        self._sources, self._device, self._dtype = dict(sources), device, dtype
        self._loaded: dict[str, Loaded] = {}

    def __getitem__(self, name: str) -> Loaded:
        if name not in self._loaded:
            source = self._sources[name]
            for other in [other for other in self._loaded if self.size(other) > _STAYS]:
                del self._loaded[other]
            self._loaded[name] = load(source, self._device, dtype=self._dtype)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def size(self, name: str) -> int:
        """Bytes of a model's parameters."""
        parameters = self[name].model.parameters()
        return sum(p.numel() * p.element_size() for p in parameters)
