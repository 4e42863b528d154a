"""What a feature cache depends on, as one dictionary, its fingerprint and the folder it leads to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from components.digest import digest
from components.features.form import BF16, Form
from infra.storage import join
from models.encoders.base import AudioEncoder
from models.recipe import Stage

BFLOAT16_UNITS = ("avx512_bf16", "amx_bf16")  # of a CPU, as torch.cpu.get_capabilities names them
EXACT = ("transcriber", "encodec")  # encoders whose frames are text or codes, of which every byte counts
FEATURE_VERSION = 1  # raise it when extract.py may give other numbers for the same key


def feature_key(
    encoder: AudioEncoder, codebook_digest: str | None = None, form: Form = BF16, projection_digest: str | None = None
) -> dict[str, Any]:
    """Everything that decides the bytes of a cache besides the audio.

    The weights count by their digest: the reference they were loaded from and the seed they were drawn with are
    left out, so that the same weights under another name find the same cache. `codebook_digest` names the
    codebook of a cache of units (`components.features.units`), which no form changes; `projection_digest` the
    principal components that a form may need (`components.features.projection`). Plain bfloat16 adds nothing.
    ValueError for a form that the encoder's frames cannot take (`form_for`).
    """
    if codebook_digest is None and form != form_for(encoder, form):
        raise ValueError(f"frames of encoder {encoder.spec.kind} are kept as they are: form {form} would harm them")
    key = encoder.describe()
    key["encoder"] = {name: value for name, value in key["encoder"].items() if name not in ("weights", "seed")}
    key |= {
        "kind": "features" if codebook_digest is None else "units",
        "codebook": codebook_digest,
        "dtype": form.dtype if codebook_digest is None else "int32",
        "numerics": numerics(encoder),
        "feature_version": FEATURE_VERSION,
    }
    return key if codebook_digest is not None or form == BF16 else key | {"form": form.key(projection_digest)}


def form_for(encoder: AudioEncoder, form: Form) -> Form:
    """The form that a run asks for, or plain bfloat16 where it would harm: text or codes, or one frame a clip."""
    return BF16 if encoder.spec.kind in EXACT or encoder.spec.pool == 0 else form


def numerics(encoder: AudioEncoder) -> dict[str, str]:
    """Device class, torch and kernels: LTU-AS loses quality when features come from another GPU than in training."""
    device = encoder.device
    compute = encoder.spec.compute
    found = {"device": device.type, "torch": torch.__version__, "capability": "", "compute": compute}
    if device.type == "cpu":
        found["capability"] = torch.backends.cpu.get_cpu_capability()
        if compute == "bfloat16":
            has = torch.cpu.get_capabilities()
            found["capability"] = " ".join([found["capability"], *(unit for unit in BFLOAT16_UNITS if has.get(unit))])
    elif device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found["capability"] = f"sm_{major}{minor} {torch.cuda.get_device_name(device)}"
        if compute == "float32":
            found["compute"] = f"float32, matmul precision {torch.get_float32_matmul_precision()}"
    return found


def fingerprint(key: dict[str, Any]) -> str:
    """16 hex digits of the key; the order of its entries does not matter."""
    return digest(key)[:16]


def feature_root(lake: str, key: dict[str, Any], dataset: str, version: str) -> str:
    """URL of the cache of one data set version: `<lake>/features/<fingerprint>/<dataset>/<version>`."""
    return join(lake, "features", fingerprint(key), dataset, version)


def refuse_other_numerics(key: dict[str, Any], encoder: AudioEncoder) -> None:
    """Raise ValueError if this process would compute other bits than `key` says (a mixed cluster)."""
    here = numerics(encoder)
    if here != key["numerics"]:
        differ = ", ".join(
            f"{name}: {key['numerics'].get(name)!r} there, {here[name]!r} here"
            for name in here
            if key["numerics"].get(name) != here[name]
        )
        raise ValueError(
            f"this worker would compute other features than cache {fingerprint(key)} holds ({differ}): "
            "run the cache stage on machines of one kind, or start it from a machine like the workers"
        )


def refuse_if_trained(stages: Iterable[Stage], encoder_groups: Iterable[str] = ("encoder",)) -> None:
    """Raise ValueError if a stage trains the encoder: its features change with every step, a cache would be stale.

    `encoder_groups` are the parameter groups of `Stage.train` that hold the cached encoder or a part of it.
    """
    groups = set(encoder_groups)
    for stage in stages:
        trained = sorted(groups & set(stage.train))
        if trained:
            raise ValueError(
                f"stage {stage.name!r} trains {', '.join(trained)}, so it cannot use cached features: "
                f"run it from waveforms (without the cache), or take {', '.join(trained)} out of its "
                "`train` list"
            )
