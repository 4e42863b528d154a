"""What works inside a backbone: hooks that change the input of its modules by what a batch was heard to hold.

The modules that do the work live in the connector, so that freezing, saving and sharding see them as its own. The
state of a batch goes through the decoder as a keyword argument of that forward pass: a layer that is computed again in
the backward pass (activation checkpointing) reads what it read at first, whatever the model ran since.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from torch._dynamo import config as compiler
from transformers import PreTrainedModel

State = TypeVar("State")
KEYWORD = "injected"


def layers_of(llm: PreTrainedModel) -> list[nn.Module]:
    """The transformer layers of a backbone, whatever it calls them; [] if it has none."""
    stacks = (module for module in llm.get_decoder().modules() if isinstance(module, nn.ModuleList) and len(module))
    return list(next(stacks, []))


def without_lora(module: nn.Module) -> nn.Module:
    """The layer that peft wrapped, or the module itself."""
    base = getattr(module, "base_layer", module)
    assert isinstance(base, nn.Module)
    return base


class Injection(Generic[State]):
    """Hooks in a backbone. `state` is that of the batch that runs next; None: the backbone is as it was.

    Make it after LoRA is in place: peft's layers take the place of those they wrap.
    """

    def __init__(self, llm: PreTrainedModel) -> None:
        compiler.skip_nnmodule_hook_guards = False  # else a layer with hooks runs what was compiled for one without
        self.state: State | None = None
        self._current: State | None = None
        llm.get_decoder().register_forward_pre_hook(self._hand_out, with_kwargs=True)

    def _hand_out(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs if self.state is None else kwargs | {KEYWORD: self.state}

    def add(self, given: nn.Module, changed: nn.Module, change: Callable[[Tensor, State], Tensor]) -> None:
        """From now on `changed` takes `change(input, state)` in the place of its first input.

        `given` is a module that the decoder hands its keyword arguments to: a layer, or a layer's attention. `changed`
        is the same, or stands in it.
        """

        def keep(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            self._current = kwargs.get(KEYWORD)
            return args, {name: value for name, value in kwargs.items() if name != KEYWORD}

        def apply(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return args if self._current is None else (change(args[0], self._current), *args[1:])

        given.register_forward_pre_hook(keep, with_kwargs=True)
        changed.register_forward_pre_hook(apply)


def seen(per_token: Tensor, hidden: Tensor) -> Tensor:
    """What belongs to the tokens that a layer sees now, of `(rows, length, …)` for all tokens of a batch.

    `hidden` `(rows now, length now, width)` is the batch itself, or in generation one token behind each prompt, for
    which counts what counts for the prompt's last; beams repeat rows. Raises ValueError for any other length.
    """
    rows, length = hidden.shape[:2]
    if length != per_token.shape[1]:
        if length != 1:
            raise ValueError(f"a layer sees {length} tokens of {per_token.shape[1]}; all or one were expected")
        per_token = per_token[:, -1:]
    return of_rows(per_token, rows)


def of_rows(per_row: Tensor, rows: int) -> Tensor:
    """`(rows of the batch, …)` for the rows that a layer sees: beams repeat each."""
    times = rows // per_row.shape[0]
    return per_row if times == 1 else per_row.repeat_interleave(times, dim=0)
