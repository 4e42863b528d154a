"""Official checkpoints: what their tensors are called in ours, and an import that leaves out nothing in silence.

An architecture says it in one attribute, `checkpoint = Checkpoint(...)`; `import_into` does the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.statefiles import read_state

if TYPE_CHECKING:
    from models.contract import SpeechLLM

Renames = tuple[tuple[str, str | tuple[str, ...]], ...]

# what training wraps a module in stands in the names of what it saves
WRAPPERS = re.compile(r"^module\.|\b(?:_checkpoint_wrapped_module|_fsdp_wrapped_module|_orig_mod)\.")
# peft writes these parts or leaves them out, depending on its version and on how a file was saved
PEFT_PARTS = re.compile(r"\.base_layer(?=\.)|(?<=\.lora_[AB])\.default(?=\.)")
STATISTICS = ("running_mean", "running_var")  # of a batch normalisation: no parameters, but learnt all the same
CONSTANTS = (  # older versions of transformers stored what is computed from the sizes
    r".*\.rotary_emb\.inv_freq",
    r".*\.position_ids",
)
SHOWN = 10  # names of a list in a message


@dataclass(frozen=True)
class Checkpoint:
    """How an official file is read into an architecture.

    file: which file that is, for messages.
    renames: (regex, replacement) in order; the first whose regex fits the beginning of an official name counts, and
        what stands behind it is kept. Several replacements: the tensor is cut into as many equal parts along its first
        dimension (a fused q, k, v). One that ends with `#` and a number gives that row of a tensor of ours, which all
        rows together make.
    nested: keys that lead to the tensors in a pickled file; a file that holds tensors right away is taken as it is.
    transform: (our name, tensor) → tensor, after renaming and cutting, such as a transpose.
    ignored: regexes of whole official names that are left out on purpose; write the reason beside each.
    expects: groups of ours that the file must fill, named as in a freeze plan; or a function from the model to names.

    Names are compared without `module.` and other wrappers, and without peft's `.base_layer` and `.default`.
    """

    file: str
    renames: Renames
    nested: tuple[str, ...] = ()
    transform: Callable[[str, Tensor], Tensor] | None = None
    ignored: tuple[str, ...] = CONSTANTS
    expects: tuple[str, ...] | Callable[[SpeechLLM], Collection[str]] = ("connector",)


@dataclass(frozen=True)
class Report:
    """What became of the tensors of a file. Names in `loaded` and `missing` are ours, the others official."""

    loaded: tuple[str, ...]
    parameters: int
    ignored: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected or self.wrong)

    def problems(self) -> str:
        """What does not fit, a line each kind with the first ten names; empty if all does."""
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": self.wrong}
        return "\n".join(f"  {len(names)} {kind}: {_first(names)}" for kind, names in kinds.items() if names)


# ---- from their names to ours ----------------------------------------------------------------------------------------


def our_names(checkpoint: Checkpoint, official: str) -> tuple[str, ...] | None:
    """What an official tensor is called in ours, without peft's parts; () = not known, None = left out on purpose."""
    key = WRAPPERS.sub("", official)
    if any(re.fullmatch(pattern, key) for pattern in checkpoint.ignored):
        return None
    for pattern, replacement in checkpoint.renames:
        if match := re.match(pattern, key):
            texts = (replacement,) if isinstance(replacement, str) else replacement
            return tuple(plain(match.expand(text) + key[match.end() :]) for text in texts)
    return ()


def plain(name: str) -> str:
    """A name without the parts that peft may or may not write."""
    return PEFT_PARTS.sub("", name)


def map_state(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by our names (see `plain`), and the official names that no rename knows.

    Raises ValueError if two official tensors would be one of ours, or one cannot be cut into equal parts.
    """
    ours: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    unexpected: list[str] = []
    for official, tensor in state.items():
        names = our_names(checkpoint, official)
        if names == ():
            unexpected.append(official)
        for name, part in zip(names or (), _cut(official, tensor, len(names or ())), strict=True):
            if name in ours:
                raise ValueError(
                    f"{checkpoint.file}: {origin[name]!r} and {official!r} are both {name!r} of ours; "
                    "the renames must tell them apart, or one belongs to what is ignored"
                )
            ours[name] = checkpoint.transform(name, part) if checkpoint.transform else part
            origin[name] = official
    return _stacked(ours, checkpoint.file), unexpected


def _stacked(parts: dict[str, Tensor], file: str) -> dict[str, Tensor]:
    """Rows `name#0`, `name#1`, … as one tensor `name`. ValueError if one is not there, or they differ in shape."""
    rows: dict[str, dict[int, Tensor]] = {}
    for name, tensor in parts.items():
        if match := re.fullmatch(r"(.+)#(\d+)", name):
            rows.setdefault(match[1], {})[int(match[2])] = tensor
    whole = {name: tensor for name, tensor in parts.items() if "#" not in name}
    for name, found in rows.items():
        if sorted(found) != list(range(len(found))) or len({tensor.shape for tensor in found.values()}) > 1:
            raise ValueError(
                f"{file}: the rows {sorted(found)} do not make up {name!r} of ours: some lack, or differ in shape"
            )
        whole[name] = torch.stack([found[row] for row in range(len(found))])
    return whole


def _cut(official: str, tensor: Tensor, parts: int) -> tuple[Tensor, ...]:
    if parts < 2:
        return (tensor,) * parts
    if tensor.ndim == 0 or tensor.shape[0] % parts:
        raise ValueError(f"{official!r} of shape {tuple(tensor.shape)} cannot be cut into {parts} equal parts")
    return tensor.chunk(parts)


# ---- into a model ----------------------------------------------------------------------------------------------------


def import_into(model: SpeechLLM, checkpoint: Checkpoint, path: Path, strict: bool = True) -> Report:
    """Read an official file into a model; one on the meta device is only compared, which reads no weights.

    Raises ValueError, before anything is changed, if a tensor is missing, unexpected or of another shape; with
    `strict` off what fits is loaded. Errors of `read_state` and `map_state` come through.
    """
    meta = next(model.parameters()).is_meta
    state = read_state(path, checkpoint.nested, "meta" if meta else "cpu")
    mapped, unexpected = map_state(checkpoint, state)
    ours = {plain(name): (name, value) for name, value in model.state_dict().items()}
    fitting = {name: tensor for name, tensor in mapped.items() if name in ours and ours[name][1].shape == tensor.shape}
    loaded = [ours[name][0] for name in fitting]
    wrong = [name for name in mapped if name in ours and name not in fitting]
    report = Report(
        loaded=tuple(loaded),
        parameters=sum(tensor.numel() for tensor in fitting.values()),
        ignored=tuple(name for name in state if our_names(checkpoint, name) is None),
        missing=tuple(_missing(model, checkpoint, {*loaded, *(ours[name][0] for name in wrong)})),
        unexpected=(*unexpected, *(f"{name} (ours has none of that name)" for name in mapped if name not in ours)),
        wrong=tuple(
            f"{ours[name][0]} {tuple(mapped[name].shape)} for ours of {tuple(ours[name][1].shape)}" for name in wrong
        ),
    )
    if strict and not report.fits:
        raise ValueError(f"{path} does not fit {model.title} ({checkpoint.file}):\n{report.problems()}")
    if not meta:
        with torch.no_grad():
            for name, tensor in fitting.items():
                ours[name][1].copy_(tensor)
    return report


def expected(model: SpeechLLM, checkpoint: Checkpoint) -> set[str]:
    """Names of ours that the file must bring: the parameters that `expects` says, and batch statistics beside them."""
    if callable(checkpoint.expects):
        return set(checkpoint.expects(model))
    named = set(model.trained_by(checkpoint.expects))
    modules = {name.rpartition(".")[0] for name in named}
    places = (name.rpartition(".") for name in model.state_dict())
    return named | {f"{module}.{name}" for module, _, name in places if name in STATISTICS and module in modules}


def _missing(model: SpeechLLM, checkpoint: Checkpoint, found: set[str]) -> list[str]:
    wanted = expected(model, checkpoint)
    lora = set(model.parameter_groups()["lora"])
    if found & lora:  # a part of an adapter is never meant
        wanted |= lora
    return [name for name in model.state_dict() if name in wanted - found]


def _first(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


# ---- names that several official files share -------------------------------------------------------------------------
# `official` is the regex of what stands before them, `ours` the text of what stands before ours.


def peft_lora(official: str = "") -> Renames:
    """LoRA as peft saves it around a transformers model."""
    return ((rf"{official}base_model\.model\.(?=.*\.lora_[AB]\.)", "llm."),)


def llama(official: str = "") -> Renames:
    """A LLaMA-type backbone (Vicuna, Qwen 2, Mistral, …) in transformers' names, wrapped by peft or not."""
    return ((rf"{official}(?:base_model\.model\.)?(?=(?:model\.(?:layers|norm|embed_tokens)|lm_head)\.)", "llm."),)


LORA = peft_lora()
LLAMA = llama()


def openai_whisper(official: str, ours: str) -> Renames:
    """Whisper's encoder in the names of openai/whisper → those of transformers."""
    attention = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
    parts = {rf"attn\.{theirs}\.": f"self_attn.{name}." for theirs, name in attention.items()}
    parts |= {r"attn_ln\.": "self_attn_layer_norm.", r"mlp_ln\.": "final_layer_norm."}
    parts |= {r"mlp\.0\.": "fc1.", r"mlp\.2\.": "fc2."}
    return (
        *((rf"{official}blocks\.(\d+)\.{theirs}", rf"{ours}layers.\1.{name}") for theirs, name in parts.items()),
        (rf"{official}positional_embedding$", f"{ours}embed_positions.weight"),
        (rf"{official}ln_post\.", f"{ours}layer_norm."),
        (rf"{official}(conv[12])\.", rf"{ours}\1."),
    )


def lavis_qformer(official: str, ours: str) -> Renames:
    """The Q-Former of LAVIS (BERT with queries, no text branch) → transformers' Blip2QFormerModel."""
    return (
        (rf"{official}bert\.embeddings\.LayerNorm\.", f"{ours}layernorm."),
        (
            rf"{official}bert\.encoder\.layer\.(\d+)\.(attention|crossattention)\.self\.",
            rf"{ours}encoder.layer.\1.\2.attention.",
        ),
        (rf"{official}bert\.encoder\.", f"{ours}encoder."),
    )
