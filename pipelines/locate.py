"""Where the artefacts of a run are, and how a run is identified: digests decide, nothing is remembered in a process.

What needs torch is imported where it is used: the ingest stage does without, and starts several seconds sooner.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from components.audio.sources import read_sources
from components.audio.split import assign_splits
from components.digest import digest
from components.features.form import BF16, Form
from components.schema import AudioManifest, FeatureManifest, Recording, Reject
from components.shards.index import read_manifest, read_rows
from components.shards.ingest import ingest_config
from components.shards.publish import dataset_version
from infra import storage
from models.recipe import Stage
from pipelines.config import RunConfig
from pipelines.overrides import changed

if TYPE_CHECKING:
    from models.contract import SpeechLLM
    from models.encoders.base import AudioEncoder
    from models.preset import Preset

TRAINING_VERSION = 2  # raise when the training code changes what a stage learns
UNIT_ROLE = "units"


class NotThere(RuntimeError):
    """An artefact that an earlier stage should have made; the message names the command that makes it."""


@dataclass
class Workspace:
    """One run's settings, resolved; everything that is costly is worked out once and only when asked for."""

    config: RunConfig

    @cached_property
    def architecture(self) -> type[SpeechLLM]:
        from models.architectures import load

        return load(self.config.arch)

    @cached_property
    def preset(self) -> Preset:
        return changed(self.architecture.preset(self.config.preset), self.config.set, list(RunConfig.model_fields))

    @cached_property
    def sources(self) -> tuple[list[Recording], list[Reject]]:
        refuse_inside(self.config.lake, self.config.data)
        recordings, rejects = read_sources(self.config.data, self.config.ingest.trust)
        return assign_splits(recordings, self.config.seed, drain=True), rejects

    @property
    def dataset(self) -> str:
        return self.config.dataset_name

    @cached_property
    def model_name(self) -> str:
        return self.config.name or f"{self.config.arch}-{self.dataset}"

    # ---- audio --------------------------------------------------------------------------------------------------

    @cached_property
    def version(self) -> str:
        settings = ingest_config(self.config.per_shard, self.config.ingest)
        return dataset_version(*self.sources, settings, self.config.data)

    @property
    def audio_root(self) -> str:
        return storage.join(self.config.lake, "audio", self.dataset, self.version)

    @cached_property
    def audio(self) -> AudioManifest:
        _there(self.audio_root, "ingest")
        return read_manifest(self.audio_root)

    # ---- features -------------------------------------------------------------------------------------------------

    @cached_property
    def encoders(self) -> dict[str, AudioEncoder]:
        """On a card where this machine has one: where they compute is part of their features' key."""
        import torch

        from models.encoders import build_encoder

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return {role: build_encoder(spec).to(device) for role, spec in self.preset.encoders.items()}

    @property
    def cached(self) -> bool:
        """Whether some stage takes cached features; ValueError if one is to train the encoder behind units."""
        from components.features.key import refuse_if_trained

        hears = self.preset.recipe.hears
        if self.preset.units is not None:
            refuse_if_trained(self.preset.recipe.stages)
        return not hears[0]

    @cached_property
    def feature_roots(self) -> dict[str, str]:
        """Role -> root of the continuous features."""
        from components.features.key import feature_root

        return {
            role: feature_root(self.config.lake, self.key_of(role), self.dataset, self.version)
            for role in self.encoders
        }

    def key_of(self, role: str) -> dict[str, Any]:
        """What decides the bytes of the features of an encoder."""
        from components.features.key import feature_key

        projection = self.projections.get(role, (None, None))[1]
        return feature_key(self.encoders[role], None, self.forms[role], projection)

    @cached_property
    def forms(self) -> dict[str, Form]:
        """Role -> how its frames are stored; units are made of plain ones."""
        from components.features.key import form_for

        asked = BF16 if self.preset.units is not None else Form.parse(self.config.features)
        return {role: form_for(encoder, asked) for role, encoder in self.encoders.items()}

    @cached_property
    def projections(self) -> dict[str, tuple[str, str]]:
        """Role -> URL and digest of the principal components of its frames, fitted on the train split if need be."""
        from components.features.principal import fit_projection

        wanted = {role: form.dims for role, form in self.forms.items() if form.dims}
        if not wanted:
            return {}
        train = read_rows(self.audio_root).where("split", "train")
        place = (self.audio_root, self.audio.digest)
        return {
            role: fit_projection(self.encoders[role], train, *place, dims, self.config.lake, self.config.seed)
            for role, dims in wanted.items()
        }

    @cached_property
    def codebook(self) -> tuple[str, str] | None:
        """URL and digest of the k-means of a discrete system, fitted on the train split if it is not there yet."""
        from components.features.lloyd import fit_units
        from components.features.store import FeatureStore
        from pipelines.kmeans import on_ray

        if self.preset.units is None:
            return None
        store = FeatureStore(next(iter(self.feature_roots.values())))
        train = map(str, read_rows(self.audio_root).where("split", "train").table["key"].to_pylist())
        over = partial(on_ray, self.config)
        return fit_units(store, train, self.preset.units, self.config.seed, self.config.lake, over)

    @cached_property
    def model_inputs(self) -> dict[str, str]:
        """Role -> feature root that training reads: the features, or the units under the role 'units'.

        Empty if the very first stage trains an encoder.
        """
        from components.features.key import feature_key, feature_root

        if not self.cached:
            return {}
        if self.codebook is None:
            return self.feature_roots
        key = feature_key(next(iter(self.encoders.values())), self.codebook[1])
        return {UNIT_ROLE: feature_root(self.config.lake, key, self.dataset, self.version)}

    @cached_property
    def features(self) -> dict[str, FeatureManifest]:
        from components.features.store import published

        return {
            role: manifest
            for role, root in self.model_inputs.items()
            if _there(root, "cache") and (manifest := published(root))
        }

    # ---- run --------------------------------------------------------------------------------------------------------

    @cached_property
    def base_digest(self) -> str:
        """What every stage depends on: parts, data, features, seed and the version of the training code."""
        from components.features.key import feature_key

        parts = self.preset.model_dump(mode="json", exclude={"recipe"})
        cached: dict[str, Any] = {role: manifest.digest for role, manifest in self.features.items()}
        features = cached or {role: feature_key(encoder) for role, encoder in self.encoders.items()}
        return digest(
            [
                self.config.arch,
                parts,
                self.audio.digest,
                features,
                self.config.seed,
                self.preset.recipe.seed,
                TRAINING_VERSION,
            ]
        )

    @cached_property
    def stages(self) -> list[tuple[Stage, str]]:
        """Each stage with the URL of its artefact; a stage's digest chains those before it."""
        placed, chain = [], self.base_digest
        for number, stage in enumerate(self.preset.recipe.stages, 1):
            chain = digest([chain, stage.model_dump(mode="json")])
            name = f"{number}-{stage.name}-{chain[:12]}"
            placed.append((stage, storage.join(self.config.lake, "runs", self.config.arch, "stages", name)))
        return placed

    @property
    def fits(self) -> str:
        """Where `earloom fit-memory` keeps what it found."""
        return storage.join(self.config.lake, "fits")

    @cached_property
    def run_root(self) -> str:
        judged = [
            self.stages[-1][1],
            self.preset.recipe.decoding.model_dump(),
            self.config.split,
            self.config.eval_clips,
            self.config.baseline_clips,
            self.config.eval_task,
            self.config.eval_options,
        ]
        return storage.join(self.config.lake, "runs", self.config.arch, f"{self.dataset}-{digest(judged)[:12]}")

    @property
    def tracking_uri(self) -> str:
        given = self.config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if given:
            return given
        if not storage.is_local(self.config.lake):
            raise NotThere(
                f"the lake {self.config.lake} is remote: name an MLflow server, tracking_uri=… or $MLFLOW_TRACKING_URI"
            )
        return f"sqlite:///{storage.local_path(self.config.lake).resolve()}/mlflow.db"


def refuse_inside(lake: str, data: str) -> None:
    """Raise ValueError for a lake inside the data folder, whose shards would be taken for recordings."""
    if (lake.rstrip("/") + "/").startswith(data.rstrip("/") + "/"):
        raise ValueError(f"the lake {lake} lies in the data folder {data}: name another place with --lake")


def _there(root: str, stage: str) -> str:
    """URL of the manifest of an artefact. Raises NotThere if the stage that makes it has not finished."""
    url = storage.join(root, "manifest.json")
    if not storage.exists(url):
        raise NotThere(
            f"nothing at {root}: run `earloom {stage}` with the same settings first, or `earloom run` for all"
        )
    return url
