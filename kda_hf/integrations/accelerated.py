"""What `accelerate` leaves of a model: a class that is derived from its own, and how to undo it."""

import types
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .. import decoding
from ..module_program import ModuleProgram


@dataclass
class Acceleration:
    """What `accelerate` did to a model: modules that have another class now, with their name and the class before."""

    classes: list[tuple[str, nn.Module, type]] = field(default_factory=list)
    idle: dict[str, str] = field(default_factory=dict)  # modules that are not called, and their classes
    forwards: list[tuple[nn.Module, Any]] = field(default_factory=list)  # of modules that accelerate's hooks wrap

    def change(self, name: str, module: nn.Module, new_class: type) -> None:
        self.classes.append((name, module, type(module)))
        module.__class__ = new_class
        if "_old_forward" in vars(module):
            self.forwards.append((module, module._old_forward))
            module._old_forward = types.MethodType(new_class.forward, module)  # type: ignore[attr-defined]

    def undo(self) -> None:
        for _, module, old_class in self.classes:
            module.__class__ = old_class
        for module, forward in self.forwards:
            module._old_forward = forward


class AcceleratedModel:
    """A model after [`accelerate`], which gives its class this base. Also a context, which ends with `undo()`."""

    _acceleration: Acceleration
    _is_stateful = False  # to transformers: its states can go back
    decode_program_class = ModuleProgram

    @property
    def replaced(self) -> dict[str, str]:
        """Names of the modules that `accelerate` replaced, and the class that each is of without it."""
        changed = {name: old_class.__name__ for name, _, old_class in self._acceleration.classes if name}
        return changed | self._acceleration.idle

    def undo(self) -> None:
        """Makes the model what it was before [`accelerate`], except for caches in use: those stay [`KDACache`]s."""
        acceleration = self._acceleration
        del self._acceleration
        decoding.forget(self)
        acceleration.undo()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if isinstance(self, AcceleratedModel):  # else undone within
            self.undo()


_classes: dict[tuple[type, ...], type] = {}


def derived(own_class: type, *bases: type) -> type:
    """`own_class` with `bases` before it, under its own name, which checkpoints are saved with."""
    key = (own_class, *bases)
    if key in _classes:
        return _classes[key]
    names = {"__module__": own_class.__module__, "__qualname__": own_class.__qualname__, "__doc__": own_class.__doc__}
    made = _classes[key] = type(own_class.__name__, (*bases, own_class), names)
    return made
