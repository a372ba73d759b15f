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

Layout = Literal["packed", "compressed-tensors", "dequantized"]
"""How an exported folder stores the weights: our dense codes, what vLLM and transformers read, or plain tensors."""

MANIFEST = "raydistill.json"
"""The file of an exported folder that says what its weights are."""

ADAPTER_FOLDER = "adapter"
"""Inside an exported folder: the adapter of a student in served mode, in PEFT's format."""

BITS: dict[str, Bits] = {"int4": 4, "int3": 3, "int2": 2}
SCALE_RULES: tuple[ScaleRule, ...] = ("absmax", "searched")
LAYOUTS: tuple[Layout, ...] = ("packed", "compressed-tensors", "dequantized")
ENGINE_GROUPS = (32, 64, 128, None)  # vLLM's 4-bit kernels take no other
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


def default_layout(fmt: WeightFormat | None) -> Layout:
    """What serves the format best: int4 as other tools read it, narrower codes as densely as we can, plain weights as
    they are."""
    if fmt is None:
        return "dequantized"
    return "compressed-tensors" if _engines_take(fmt) else "packed"


def check_layout(layout: Layout, fmt: WeightFormat | None, is_served: bool, merge_adapter: bool) -> None:
    """QuantError where a student cannot be stored that way, or only with a loss. is_served: it has an adapter of its
    own beside the weights; merge_adapter: that one is to become part of them."""
    if layout == "compressed-tensors" and (fmt is None or not _engines_take(fmt)):
        have = "unquantized weights" if fmt is None else fmt.name
        raise QuantError(
            f"--as compressed-tensors stores int4 with group_size 32, 64, 128 or 'channel', this student is {have}; "
            "use --as packed (small, for raydistill) or --as dequantized (plain weights for any tool)"
        )
    if merge_adapter and not is_served:
        raise QuantError("--merge-adapter: this student has no adapter beside its weights; leave the switch out")
    if merge_adapter and layout != "dequantized":
        raise QuantError(
            f"--merge-adapter with --as {layout}: an adapter trained in served mode cannot be merged into quantized "
            "weights without changing their codes; leave the switch out (base and adapter/ then lie side by side), use "
            "--as dequantized, or train with adapter.mode=merged"
        )


def _engines_take(fmt: WeightFormat) -> bool:
    return fmt.bits == 4 and fmt.group_size in ENGINE_GROUPS


def _check(good: bool, what: str, allowed: str) -> None:
    if not good:
        raise QuantError(f"weight format {what} is not supported; use {allowed}.")
