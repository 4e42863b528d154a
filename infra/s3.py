"""How S3 is reached: credentials from the usual chain, an endpoint of one's own, and encryption on the server's side.

Keys, region, endpoint and proxies are botocore's business: environment, profile, role of the machine. Nothing of them
is kept here, so that no setting of ours can hold a secret. What botocore has no variable for is read from these:

    EARLOOM_S3_SSE          AES256 (keys of S3), aws:kms or aws:kms:dsse; none: what the bucket's own rule says
    EARLOOM_S3_KMS_KEY      id or ARN of the KMS key; none: the account's key for S3
    EARLOOM_S3_ADDRESSING   path (http://host/bucket) or virtual (http://bucket.host); none: what botocore takes, which
                            is path for an endpoint of one's own

Source of the request fields: Amazon S3 API reference, PutObject and CreateMultipartUpload; of the styles: botocore,
`botocore.config.Config`, `s3`.
"""

from __future__ import annotations

import json
import os
from typing import Any

SSE, KMS_KEY, ADDRESSING = "EARLOOM_S3_SSE", "EARLOOM_S3_KMS_KEY", "EARLOOM_S3_ADDRESSING"
KMS = ("aws:kms", "aws:kms:dsse")


def options(limits: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an `s3fs.S3FileSystem`: `limits` are fields of botocore's Config. ValueError for a wrong setting.

    A person's own `$FSSPEC_S3` wins.
    """
    import fsspec

    own = fsspec.config.conf.get("s3", {})
    config = limits | ({"s3": {"addressing_style": style}} if (style := _addressing()) else {})
    found: dict[str, Any] = {"config_kwargs": config | own.get("config_kwargs", {})}
    if sent := encryption() | own.get("s3_additional_kwargs", {}):
        found["s3_additional_kwargs"] = sent
    return found


def encryption() -> dict[str, str]:
    """What each request that writes an object says of its encryption; nothing if that is left to the bucket."""
    kind, key = os.environ.get(SSE, ""), os.environ.get(KMS_KEY, "")
    if kind not in ("", "AES256", *KMS):
        raise ValueError(f"{SSE}={kind!r} is unknown to S3: set AES256, aws:kms or aws:kms:dsse, or nothing")
    if key and kind not in KMS:
        raise ValueError(f"{KMS_KEY} needs {SSE}=aws:kms: with {kind or 'nothing'!r} the key would not be used")
    return ({"ServerSideEncryption": kind} if kind else {}) | ({"SSEKMSKeyId": key} if key else {})


def mlflow_environment() -> dict[str, str]:
    """The same for what MLflow itself uploads: variables for its server and its clients."""
    sent = encryption()
    return {"MLFLOW_S3_UPLOAD_EXTRA_ARGS": json.dumps(sent)} if sent else {}


def _addressing() -> str | None:
    style = os.environ.get(ADDRESSING)
    if style not in (None, "", "auto", "path", "virtual"):
        raise ValueError(f"{ADDRESSING}={style!r} is no style of S3 addresses: set path, virtual or auto")
    return style or None
