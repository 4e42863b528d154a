"""What ingest does with audio besides decoding it: every step is declared here, off unless a person wants it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from models.recipe import Declared


class Ingest(Declared):
    """Steps of the ingest stage; they are part of the version of a data set and stand in its manifest."""

    channels: Literal["mean", "loudest", "first"] = Field("mean", description="what becomes of several channels")
    cut: Literal["never", "pauses", "speech"] = Field(
        "never",
        description="recordings without a transcript: never cut; cut at pauses into pieces of at most `longest`; or "
        "keep only the speech that Silero VAD finds, in such pieces",
    )
    longest: float = Field(30.0, ge=1, le=3600, description="seconds of the longest piece, where recordings are cut")
    measure: bool = Field(False, description="loudness, peak, clipping, noise and bandwidth of each clip in the index")
    min_snr: float | None = Field(None, description="dB; noisier clips are set aside")
    min_bandwidth: float | None = Field(None, description="Hz; clips that were upsampled from less are set aside")
    max_clipped: float | None = Field(None, ge=0, le=1, description="share of clipped samples; above it, set aside")
    min_seconds: float | None = Field(None, ge=0, description="shorter clips are set aside")
    max_seconds: float | None = Field(None, gt=0, description="longer clips are set aside")
    plain_text: bool = Field(False, description="transcripts: plain quotes and spaces, no invisible signs")
    check_language: bool = Field(False, description="set aside transcripts in another script than their language's")
    check_rate: bool = Field(False, description="set aside transcripts too long or too short for their audio")
    duplicates: Literal["keep", "exact", "near"] = Field(
        "keep", description="drop clips with the same samples; near: also those that sound the same (fingerprints)"
    )
    leaks: Literal["ignore", "report", "drop", "refuse"] = Field(
        "report", description="the same audio in two splits: count it, drop it from train, or stop"
    )
    leak_speakers: bool = Field(False, description="a declared speaker in two splits counts as a leak as well")
    leak_sentences: bool = Field(False, description="a transcript in two splits counts as a leak as well")
    trust: bool = Field(
        False, description="16 kHz mono FLAC is kept by its header, not decoded: damage is found when it is read"
    )

    @model_validator(mode="after")
    def _possible(self) -> Ingest:
        wants = [name for name in ("min_snr", "min_bandwidth", "max_clipped") if getattr(self, name) is not None]
        if self.trust and (wants or self.measure or self.duplicates != "keep" or self.cut != "never"):
            raise ValueError("trust=true decodes nothing: measures, cuts and duplicates need trust=false")
        return self

    @property
    def measures(self) -> bool:
        """Whether the samples of each clip are measured."""
        return self.measure or any(limit is not None for limit in (self.min_snr, self.min_bandwidth, self.max_clipped))

    @property
    def only_keeps(self) -> bool:
        """Whether whole clips are looked at for nothing but damage."""
        return self.cut == "never" and not self.measures and not self.fingerprints

    @property
    def fingerprints(self) -> bool:
        return self.duplicates == "near"
