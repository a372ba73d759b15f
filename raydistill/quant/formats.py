"""Weight formats as plain data: what a quantized weight is made of, with no arithmetic and no torch.

A family of formats that is not an integer grid (NVFP4, NF4, ternary) arrives as one more entry in `BITS` or as one more
dataclass beside `WeightFormat`; "no quantization" is the absence of a format (`None`) everywhere.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from raydistill.errors import QuantError

Bits = Literal[2, 3, 4]
ScaleRule = Literal["absmax", "searched"]
ScaleDtype = Literal["float16", "bfloat16", "float32"]

BITS: dict[str, Bits] = {"int4": 4, "int3": 3, "int2": 2}
SCALE_RULES: tuple[ScaleRule, ...] = ("absmax", "searched")
SCALE_BITS: dict[str, int] = {"float16": 16, "bfloat16": 16, "float32": 32}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """An integer grid for the weights of a linear layer: one scale (and zero point) for each group of inputs.

    bits: width of a code. group_size: inputs that share a scale; None means the whole row (per output channel).
    symmetric: no zero point. scale: "absmax" spans the group's range, "searched" shrinks that range to the factor with
    the least squared error. scale_dtype: scales are rounded to it before the codes are computed, so what is stored is
    what was trained.
    """

    bits: Bits
    group_size: int | None
    symmetric: bool
    scale: ScaleRule
    scale_dtype: ScaleDtype = "float16"

    def __post_init__(self) -> None:
        _check(self.bits in BITS.values(), f"bits={self.bits}", f"one of {sorted(BITS.values())}")
        _check(self.group_size is None or self.group_size > 0, f"group_size={self.group_size}", "positive, or None")
        _check(self.scale in SCALE_RULES, f"scale={self.scale!r}", f"one of {SCALE_RULES}")
        _check(self.scale_dtype in SCALE_BITS, f"scale_dtype={self.scale_dtype!r}", f"one of {tuple(SCALE_BITS)}")

    @property
    def name(self) -> str:
        """Such as "int2-g32-asym-searched"; "channel" in place of the group for one scale per output channel, and the
        scale's dtype at the end when it is not float16."""
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        parts = [f"int{self.bits}", group, "sym" if self.symmetric else "asym", self.scale]
        return "-".join(parts if self.scale_dtype == "float16" else [*parts, self.scale_dtype])

    @property
    def code_min(self) -> int:
        """The lowest code: codes are signed, for symmetric and asymmetric formats alike."""
        return -(2 ** (self.bits - 1))

    @property
    def code_max(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def format_from_dict(data: dict[str, Any]) -> WeightFormat:
    """The inverse of `WeightFormat.to_dict`, for a format read from a file."""
    try:
        return WeightFormat(**data)
    except TypeError as error:
        raise QuantError(f"not a weight format: {data} ({error}); give bits, group_size, symmetric, scale.") from error


def _check(good: bool, what: str, allowed: str) -> None:
    if not good:
        raise QuantError(f"weight format {what} is not supported; use {allowed}.")
