"""The four packages hold no call that would run what it reads; and the check that says so can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.security.source_check import check, check_folder

REPOSITORY = Path(__file__).resolve().parents[2]
BAD = {
    "import pickle": "imports pickle",
    "from pickle import loads as read": "imports pickle.loads",
    "from ray import cloudpickle": "imports ray.cloudpickle",
    "import marshal, os": "imports marshal",
    "import torch\ntorch.load('x')": "torch.load without",
    "import torch\ntorch.load('x', weights_only=False)": "torch.load without",
    "from torch import load as get\nget('x')": "torch.load without",
    "import torch as t\nt.load('x', weights_only=safe)": "torch.load without",
    "import numpy as np\nnp.load('x', allow_pickle=True)": "allow_pickle",
    "import yaml\nyaml.load(text, Loader=yaml.Loader)": "yaml.load",
    "from yaml import unsafe_load\nunsafe_load(text)": "yaml.unsafe_load",
    "AutoModel.from_pretrained(x, trust_remote_code=True)": "trust_remote_code",
    "eval(text)": "calls eval",
    "exec(text)": "calls exec",
    "import os\nos.system('ls')": "os.system",
    "import subprocess as s\ns.run('ls', shell=True)": "shell",
    "import subprocess\nsubprocess.run(x, shell=wanted)": "shell",
    "import mlflow\nmlflow.pyfunc.load_model('x')": "takes mlflow of MLflow",
    "from mlflow.pyfunc import load_model": "takes mlflow.pyfunc.load_model",
    "import mlflow.transformers as m": "takes mlflow.transformers",
    "import tarfile\ntarfile.open(x).extractall()": "unpacks an archive",
    "import importlib\nimportlib.import_module(name)": "named by a value",
    "import pandas\npandas.read_pickle(x)": "pandas.read_pickle",
    "import os\ngetattr(os, 'sys' + 'tem')(x)": "reaches into a module",
}
GOOD = """
import numpy as np, os, subprocess, torch, yaml, re
from mlflow import MlflowClient
np.load("x"); np.load("x", allow_pickle=False); yaml.safe_load("x"); torch.load("x", weights_only=True)
subprocess.run(["ls"], shell=False); re.compile("x"); model.eval(); AutoModel.from_pretrained("x")
AutoModel.from_pretrained("x", trust_remote_code=False); json.load(file); tensors.load("x")
"""


@pytest.mark.parametrize("source", BAD)
def test_each_bad_line_is_found(source: str) -> None:
    found = check(source)
    assert any(BAD[source] in finding.what for finding in found), found
    assert {finding.line for finding in found} <= {source.count("\n") + 1, 1}


def test_good_lines_are_not() -> None:
    assert check(GOOD) == []


def test_our_sources_hold_none() -> None:
    findings, files = check_folder(REPOSITORY, ("pipelines", "components", "models", "infra"))
    assert findings == []
    assert files > 200
