"""The systems of the list, one file each; a file's name is the architecture's name."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.contract import SpeechLLM


def names() -> list[str]:
    """Names of all architectures, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def check(name: str) -> None:
    """ValueError with the nearest name if there is no such architecture; at once, for nothing of it is imported."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no architecture {name!r}; {hint}there are: {', '.join(names())}")


def load(name: str) -> type[SpeechLLM]:
    """The architecture's class, registered with transformers' Auto classes. ValueError as `check`."""
    check(name)
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from models.contract import SpeechLLM

    module = importlib.import_module(f"{__name__}.{name}")
    found = [
        v
        for v in vars(module).values()
        if isinstance(v, type) and issubclass(v, SpeechLLM) and v.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__file__} must define exactly one SpeechLLM, it defines {len(found)}")
    architecture = found[0]
    AutoConfig.register(architecture.config_class.model_type, architecture.config_class, exist_ok=True)
    for auto in (AutoModel, AutoModelForCausalLM):
        auto.register(architecture.config_class, architecture, exist_ok=True)
    return architecture
