"""In which form the frames of a cache are stored: a name that a person writes, and what it means in bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from components.schema import Strict

FORMS = r"^(pool-[1-9][0-9]?-)?(bf16|(pca-[1-9][0-9]{0,3}-)?int8)$"
FORM_VERSION = 1  # raise it when compact.py may give other bytes for the same frames
ITEM_BYTES = {"features": 2, "codes": 1, "scale": 2}  # bfloat16, int8, float16


class Form(Strict):
    """What a cache keeps of the frames of a clip; what it gives back is `(frames, width)` bfloat16 in every form.

    `pool`: means over so many neighbouring frames (the remainder is kept), given back once for each of them. Such a
    cache is exact for a connector that takes means over a multiple of it first, and for no other (`refuse_pool`).
    `dims`: coordinates along so many principal components (`components.features.projection`).
    `dtype` int8: a code from -127 to 127 for each number, times one float16 scale for each clip and channel.
    """

    pool: int = Field(1, ge=1, lt=100)
    dims: int | None = Field(None, ge=1, lt=10_000)
    dtype: Literal["bfloat16", "int8"] = "bfloat16"

    @model_validator(mode="after")
    def _components_are_codes(self) -> Self:
        if self.dims is not None and self.dtype != "int8":
            raise ValueError(f"principal components are stored as int8: write pca-{self.dims}-int8")
        return self

    @classmethod
    def parse(cls, name: str) -> Form:
        """From `bf16`, `int8` or `pca-256-int8`, each also behind `pool-2-`; ValueError for another name."""
        if not re.match(FORMS, name):
            raise ValueError(f"unknown form of features {name!r}: bf16, int8, pca-256-int8, or pool-2- before one")
        numbers = {part: int(number) for part, number in re.findall(r"(pool|pca)-(\d+)", name)}
        dtype: Literal["bfloat16", "int8"] = "int8" if name.endswith("int8") else "bfloat16"
        return cls(pool=numbers.get("pool", 1), dims=numbers.get("pca"), dtype=dtype)

    def __str__(self) -> str:
        pool = f"pool-{self.pool}-" if self.pool > 1 else ""
        components = f"pca-{self.dims}-" if self.dims else ""
        return pool + components + ("int8" if self.dtype == "int8" else "bf16")

    def shapes(self, frames: int, width: int) -> dict[str, tuple[int, ...]]:
        """The tensors of a clip of `(frames, width)`, in the order in which safetensors lays them out."""
        stored = -(-frames // self.pool)
        if self.dtype == "bfloat16":
            return {"features": (stored, width)}
        return {"scale": (self.dims or width,), "codes": (stored, self.dims or width)}

    def clip_bytes(self, frames: int, width: int) -> int:
        """Bytes of these tensors."""
        return sum(ITEM_BYTES[name] * prod(shape) for name, shape in self.shapes(frames, width).items())

    def key(self, projection: str | None) -> dict[str, Any]:
        """What the form adds to a feature key; `projection` is the digest of the principal components.

        ValueError if it is missing, or there is one where none is used.
        """
        if (self.dims is None) != (projection is None):
            raise ValueError(f"form {self} {'needs' if self.dims else 'has no'} principal components")
        return {"name": str(self), "projection": projection, "form_version": FORM_VERSION}


BF16 = Form()


def form_of(key: Mapping[str, Any]) -> Form:
    """The form that a feature key names; caches of units, and keys that name none, are as they always were."""
    return Form.parse(key["form"]["name"]) if "form" in key else BF16


def refuse_pool(form: Form, means: int, connector: str) -> None:
    """ValueError if a cache of that form would change what the connector gets.

    `means`: over how many frames the connector takes the mean before anything else; 1 if it does not.
    """
    if means % form.pool:
        raise ValueError(
            f"features={form} keeps means over {form.pool} frames, but the connector ({connector}) takes means over "
            f"{means}: choose a form without pool, or one whose pool divides {means}"
        )
