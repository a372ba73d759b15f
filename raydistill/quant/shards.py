"""Which part of a layer one rank of a tensor parallel engine holds, and what has to be rebuilt for it.

Column-parallel layers (q, k, v, gate, up) split their outputs, row-parallel layers (o, down) their inputs. Groups of a
format run along the inputs, so rows are independent of each other: a rank's rows of Q(W + s*BA) come from W[rows],
B[rows] and A alone. Columns are quantized by whole groups, so a rank whose columns begin or end inside a group rebuilds
that group too; with one scale per channel that is the whole row. Shard after shard the same codes come out as from the
whole layer, bit for bit.

Shape letters: O out_features, I in_features, R adapter rank, G groups in a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from raydistill.errors import QuantError
from raydistill.quant.formats import WeightFormat
from raydistill.quant.grid import QuantizedWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSplit:
    """How the ranks of an engine share one layer.

    along: "outputs" (column-parallel), "inputs" (row-parallel) or "nothing" (every rank holds it whole).
    world_size: ranks of the engine. replicas: neighbouring ranks that hold the same part, above 1 for key and value
    heads that are fewer than the ranks.
    """

    along: Literal["outputs", "inputs", "nothing"]
    world_size: int = 1
    replicas: int = 1

    def __post_init__(self) -> None:
        if self.replicas < 1 or self.world_size % self.replicas:
            raise QuantError(f"{self.world_size} ranks cannot hold {self.replicas} copies each of a layer's parts.")


WHOLE = LayerSplit(along="nothing")


def heads_split(num_heads: int, world_size: int) -> LayerSplit:
    """The split of a projection to attention heads: each rank gets its heads, and where there are fewer heads than ranks
    (grouped queries) each head goes to several ranks."""
    fewer = num_heads < world_size
    if (world_size % num_heads) if fewer else (num_heads % world_size):
        raise QuantError(f"{num_heads} heads do not divide over {world_size} ranks; change the tensor parallel size.")
    return LayerSplit(along="outputs", world_size=world_size, replicas=world_size // num_heads if fewer else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The part of one layer's weight [O, I] that a rank rebuilds: rows and columns as half-open ranges."""

    shape: tuple[int, int]  # of the whole layer
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def is_whole(self) -> bool:
        return self.rows == (0, self.shape[0]) and self.columns == (0, self.shape[1])

    @property
    def num_weights(self) -> int:
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])

    def of_weight(self, weight_OI: Tensor) -> Tensor:
        """The rebuilt part of a whole weight; a view."""
        return weight_OI[slice(*self.rows), slice(*self.columns)]

    def of_adapter(self, name: str, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of the adapter (in mode "none": of the trained weight) belongs to this part of layer `name`; views. Empty
        for a layer without an adapter. QuantError where a tensor does not fit the whole layer."""
        out_features, in_features = self.shape
        parts = {}
        for part, fits, take in (
            ("lora_A", (None, in_features), (slice(None), slice(*self.columns))),
            ("lora_B", (out_features, None), (slice(*self.rows),)),
            ("weight", self.shape, (slice(*self.rows), slice(*self.columns))),
        ):
            key = f"{name}.{part}"
            if key not in adapter:
                continue
            found = tuple(adapter[key].shape)
            if len(found) != 2 or any(want not in (None, have) for want, have in zip(fits, found, strict=True)):
                raise QuantError(
                    f"adapter tensor {key!r} has shape {found}, which does not fit the layer's {self.shape}."
                )
            parts[key] = adapter[key][take]
        return parts

    def placed(self, part: Tensor) -> Tensor:
        """A tensor of the whole layer's shape that holds the rebuilt part in its place and NaN elsewhere.

        For a loader that takes whole weights and narrows them to its rank's part by itself: NaN that it should ever read
        shows in the first log-prob, where zeros would pass for a bad student.
        """
        if self.is_whole:
            return part
        whole_OI = torch.full(self.shape, float("nan"), dtype=part.dtype, device=part.device)
        self.of_weight(whole_OI).copy_(part)
        return whole_OI


def shard_of(shape: tuple[int, int], split: LayerSplit, rank: int, fmt: WeightFormat | None) -> Shard:
    """The part of a layer [O, I] that `rank` rebuilds. QuantError where the layer does not divide.

    Along the outputs its rows; along the inputs its columns, widened to whole groups of `fmt` (None: unquantized).
    """
    out_features, in_features = shape
    rows, columns = (0, out_features), (0, in_features)
    if split.along == "outputs":
        rows = _part(out_features, split, rank)
    elif split.along == "inputs":
        start, stop = _part(in_features, split, rank)
        size = 1 if fmt is None else fmt.group_size or in_features
        columns = (start // size * size, min(-(-stop // size) * size, in_features))
    return Shard(shape=shape, rows=rows, columns=columns)


def join_codes(parts: Sequence[tuple[Shard, QuantizedWeight]]) -> QuantizedWeight:
    """One layer's codes from the shards of all ranks. Parts may overlap (replicas, groups across a border); QuantError
    where they disagree or leave a gap."""
    (shard, first), *others = parts
    if shard.is_whole and not others:
        return first
    out_features, in_features = shard.shape
    size = first.codes_OI.shape[1] // first.scale_OG.shape[1]
    shape_OG = (out_features, in_features // size)
    whole: list[Tensor] = [
        first.codes_OI.new_empty(*shape_OG, size),
        first.scale_OG.new_empty(*shape_OG, 1),
    ]
    if first.zero_point_OG is not None:
        whole.append(first.zero_point_OG.new_empty(*shape_OG, 1))
    seen_OG = torch.zeros(shape_OG, dtype=torch.bool)
    for shard, part in parts:
        place = slice(*shard.rows), slice(shard.columns[0] // size, shard.columns[1] // size)
        stored = [tensor for tensor in (part.codes_OI, part.scale_OG, part.zero_point_OG) if tensor is not None]
        for mine, tensor in zip(whole, stored, strict=True):
            here = mine[place]
            if bool(((here != tensor.reshape(here.shape)).any(-1) & seen_OG[place]).any()):
                raise QuantError("ranks of the engine that hold the same weights rebuilt them to different codes.")
            here.copy_(tensor.reshape(here.shape))
        seen_OG[place] = True
    if not bool(seen_OG.all()):
        raise QuantError("the ranks of the engine together do not hold every weight of a layer.")
    codes, scale, zero = (*whole, None)[:3]
    return QuantizedWeight(
        codes_OI=cast(Tensor, codes).reshape(shard.shape),
        scale_OG=cast(Tensor, scale).reshape(shape_OG),
        zero_point_OG=None if zero is None else zero.reshape(shape_OG),
        fmt=first.fmt,
    )


def _part(size: int, split: LayerSplit, rank: int) -> tuple[int, int]:
    if not 0 <= rank < split.world_size:
        raise QuantError(f"rank {rank} is not one of {split.world_size}.")
    num_parts = split.world_size // split.replicas
    if size % num_parts:
        raise QuantError(f"{size} features do not divide over {num_parts} parts; change the tensor parallel size.")
    length, index = size // num_parts, rank // split.replicas
    return index * length, (index + 1) * length
