"""Weight formats as plain data: what a quantized weight is made of, with no arithmetic and no torch.

A width of the integer grid is one entry in `BITS`, a format that looks values up one entry in `CODEBOOKS`; a run may also
bring a codebook of its own (`quant.codebook`). A family with another kind of scale (NVFP4) arrives as one more dataclass
beside `WeightFormat`; "no quantization" is the absence of a format (`None`) everywhere.
"""

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from raydistill.errors import QuantError

ScaleRule = Literal["absmax", "searched"]
ScaleDtype = Literal["float16", "bfloat16", "float32"]

Layout = Literal["packed", "compressed-tensors", "dequantized"]
"""How an exported folder stores the weights: our dense codes, what vLLM and transformers read, or plain tensors."""

MANIFEST = "raydistill.json"
"""The file of an exported folder that says what its weights are."""

TEMPLATE = "template"
"""Entry of its `extra`: the variables of the chat template that the student was trained with."""

PLAIN_COPY, SOURCE = ".dequantized", "source"
"""What the name of a plain copy that vLLM runs has behind its export's; the entry of its `extra` that tells what it is of."""

ADAPTER_FOLDER = "adapter"
"""Inside an exported folder: the adapter of a student in served mode, in PEFT's format."""

BITS: dict[str, int] = {"int4": 4, "int3": 3, "int2": 2}
CODEBOOKS: dict[str, tuple[float, ...]] = {
    # The quantiles of a normal distribution, in bitsandbytes' float32 values (QLoRA, arXiv 2305.14314, appendix E).
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
}
if TYPE_CHECKING:
    FormatName = str  # a type checker reads no Literal that is computed
else:
    FormatName = Literal[(*BITS, *CODEBOOKS, "codebook")]
"""What `quant.format` may name, for the config's check, help and schema; "codebook" takes its values from the config."""

MAX_BITS = 8  # codes are int8
SCALE_RULES: tuple[ScaleRule, ...] = ("absmax", "searched")
LAYOUTS: tuple[Layout, ...] = ("packed", "compressed-tensors", "dequantized")
ENGINE_GROUPS = (32, 64, 128, None)  # vLLM's 4-bit kernels take no other
SCALE_BITS: dict[str, int] = {"float16": 16, "bfloat16": 16, "float32": 32}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """A grid for the weights of a linear layer: one scale (and zero point) for each group of inputs.

    bits: width of a code. codebook: the values that codes stand for, from low to high, in units of the scale, which
    is then the largest weight of the group; None: integers, evenly spaced. group_size: inputs that share a scale;
    None means the whole row (per output channel). symmetric: no zero point. scale: "absmax" spans the group's
    range, "searched" shrinks that range to the factor with the least squared error. scale_dtype: scales are rounded
    to it before the codes are computed, so what is stored is what was trained.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    scale: ScaleRule
    scale_dtype: ScaleDtype = "float16"
    codebook: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.codebook is None:
            _check(self.bits in BITS.values(), f"bits={self.bits}", f"one of {sorted(BITS.values())}")
        else:
            _check_codebook(self.codebook)
            _check(
                self.bits == code_bits(self.codebook),
                f"bits={self.bits}",
                f"{code_bits(self.codebook)} for its codebook",
            )
            _check(self.symmetric, "quant.symmetric=false with a codebook", "true: a codebook has its zero where it is")
            _check(self.scale == "absmax", f"quant.scale={self.scale!r} with a codebook", "'absmax'")
        _check(self.group_size is None or self.group_size > 0, f"group_size={self.group_size}", "positive, or None")
        _check(self.scale in SCALE_RULES, f"scale={self.scale!r}", f"one of {SCALE_RULES}")
        _check(self.scale_dtype in SCALE_BITS, f"scale_dtype={self.scale_dtype!r}", f"one of {tuple(SCALE_BITS)}")

    @property
    def name(self) -> str:
        """Such as "int2-g32-asym-searched" or "nf4-g64"; "channel" in place of the group for one scale per output
        channel, and the scale's dtype at the end when it is not float16."""
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        parts = [self.family, group]
        if self.codebook is None:
            parts += ["sym" if self.symmetric else "asym", self.scale]
        return "-".join(parts if self.scale_dtype == "float16" else [*parts, self.scale_dtype])

    @property
    def family(self) -> str:
        """Such as "int2", "nf4" or, for a codebook of the run's own, "codebook5" by its number of values."""
        if self.codebook is None:
            return f"int{self.bits}"
        named = [name for name, values in CODEBOOKS.items() if values == self.codebook]
        return named[0] if named else f"codebook{len(self.codebook)}"

    @property
    def code_min(self) -> int:
        """The lowest code: codes are signed, for symmetric and asymmetric formats alike."""
        return -(2 ** (self.bits - 1))

    @property
    def code_max(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def named_format(name: str, *, codebook: tuple[float, ...] | None = None, **settings: Any) -> WeightFormat:
    """The format that `quant.format` names. codebook: the run's own, which "codebook" needs and no other name takes;
    settings: the other fields of `WeightFormat`. QuantError where they do not go together."""
    if (name == "codebook") != (codebook is not None):
        raise QuantError(
            f"quant.format={name!r} with quant.codebook={codebook}: a codebook of your own needs quant.format='codebook', "
            "and that needs one"
        )
    values = CODEBOOKS.get(name, codebook)
    return WeightFormat(bits=BITS[name] if values is None else code_bits(values), codebook=values, **settings)


def format_from_dict(data: dict[str, Any]) -> WeightFormat:
    """The inverse of `WeightFormat.to_dict`, for a format read from a file."""
    try:
        codebook = data.get("codebook")
        return WeightFormat(**{**data, "codebook": None if codebook is None else tuple(codebook)})
    except TypeError as error:
        raise QuantError(f"not a weight format: {data} ({error}); give bits, group_size, symmetric, scale.") from error


def code_bits(codebook: tuple[float, ...]) -> int:
    """Bits of a code that names one of the values."""
    return max(1, (len(codebook) - 1).bit_length())


def _check_codebook(values: tuple[float, ...]) -> None:
    shown = f"{values[:4]}..." if len(values) > 4 else f"{values}"
    _check(2 <= len(values) <= 2**MAX_BITS, f"quant.codebook of {len(values)} values", f"2 to {2**MAX_BITS} values")
    _check(
        all(a < b for a, b in pairwise(values)),
        f"quant.codebook={shown}",
        "values from low to high",
    )
    _check(max(-values[0], values[-1]) == 1.0, f"quant.codebook={shown}", "values whose largest, or lowest, is 1 or -1")
    _check(values[0] >= -1 and values[-1] <= 1, f"quant.codebook={shown}", "values from -1 to 1")


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
    return fmt.codebook is None and fmt.bits == 4 and fmt.group_size in ENGINE_GROUPS


def _check(good: bool, what: str, allowed: str) -> None:
    if not good:
        raise QuantError(f"weight format {what} is not supported; use {allowed}.")
