"""Batches whose loss or gradient is not finite: named, noted, left out up to a declared number, then a clear stop."""

from __future__ import annotations

import logging

from components.training.step import Outcome
from infra import storage
from models.recipe import Stage

FOLDER = "bad-batches"


class BadBatches:
    """The bad batches of a stage, each a file `bad-batches/step-<step>.json` with the keys of its clips."""

    def __init__(self, url: str, stage: Stage, count: int) -> None:
        self.url, self.stage, self.count = url, stage, count

    def skip(self, step: int, keys: list[str], outcome: Outcome, rank: int) -> None:
        """Note a batch that taught nothing. Raises FloatingPointError if the stage has no skips left."""
        self.count += 1
        url = storage.join(self.url, FOLDER, f"step-{step:07d}.json")
        if rank == 0:
            fault = {"stage": self.stage.name, "step": step, "loss": str(outcome.loss), "norm": str(outcome.norm)}
            storage.write_json(url, fault | {"keys": keys})
        what = f"stage {self.stage.name!r}, step {step}: loss {outcome.loss}, gradient {outcome.norm}"
        shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
        if self.count > self.stage.skip_batches:
            raise FloatingPointError(
                f"{what} is not finite, for the {self.count}. time where {self.stage.skip_batches} are allowed; clips "
                f"of the batch: {shown}; all are in {url}. Lower the learning rate, or look at these clips and raise "
                "skip_batches"
            )
        logging.getLogger(__name__).warning("%s is not finite: batch left out, its clips are in %s", what, url)
