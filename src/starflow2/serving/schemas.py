"""Fields of requests that all routes share, and how they are checked: strictly, by name, none ignored in silence.

A field that is not listed is refused. One that means nothing here but that every client sends is listed with the values
that change nothing; any other value is refused, too, so that nobody waits for what will not happen.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["MAX_TEXT", "NEUTRAL_STRING", "Fields", "One", "ReplyFields", "Seed", "Zero"]

MAX_TEXT = 100_000  # characters
Seed = Annotated[int, Field(ge=0, le=2**63 - 1, description="the same seed gives the same reply")]
Zero = Annotated[float, Field(ge=0, le=0)]
One = Annotated[float, Field(ge=1, le=1)]
NEUTRAL_STRING = Annotated[str, Field(max_length=512)]  # is read, and changes nothing


class Fields(BaseModel):
    """Base of requests: unknown fields and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _unnest(cls, data: Any) -> Any:
        """Fields of `extra_body`, which some clients send as an object of its own, stand beside the others."""
        if not isinstance(data, dict) or "extra_body" not in data:
            return data
        extra = data["extra_body"]
        if not isinstance(extra, dict):
            raise ValueError("extra_body is no object; expected one with further fields")
        rest = {name: value for name, value in data.items() if name != "extra_body"}
        twice = sorted(set(rest) & set(extra))
        if twice:
            raise ValueError(f"{', '.join(twice)} stands both in extra_body and beside it; give it once")
        return rest | extra


class ReplyFields(Fields):
    """Fields of every request for a reply. The last four mean nothing here."""

    model: Annotated[str, Field(max_length=256)] | None = None
    seed: Seed | None = None
    guidance: Annotated[float, Field(ge=0, description="how closely to follow the words; 0: off")] | None = None
    tries: Annotated[int, Field(ge=1, description="replies made to keep the one that the model confirms")] | None = None
    timeout_s: Annotated[float, Field(gt=0, le=3600, description="seconds to finish in")] | None = None
    user: NEUTRAL_STRING | None = None
    safety_identifier: NEUTRAL_STRING | None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = None
