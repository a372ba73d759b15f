"""What the ranks of a tensor parallel engine rebuild is, put together, what one rank rebuilds: bit for bit."""

from dataclasses import replace

import pytest
import torch

from raydistill.errors import QuantError
from raydistill.quant.formats import WeightFormat
from raydistill.quant.hashing import hash_codes
from raydistill.quant.shards import WHOLE, LayerSplit, Shard, heads_split, join_codes, shard_of
from raydistill.quant.student import Mode, rebuild_codes, rebuild_weight

NAME = "model.layers.0.mlp.down_proj"
SCALING = 1.5
HEAD_DIM = 8


def layer(out_features: int, in_features: int, mode: Mode) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A weight with outliers, and what its layer trains in a mode."""
    generator = torch.Generator().manual_seed(out_features * 1000 + in_features)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weight = draw(out_features, in_features) ** 3
    if mode == "merged":
        return weight, {f"{NAME}.lora_A": draw(6, in_features), f"{NAME}.lora_B": draw(out_features, 6)}
    return weight, {f"{NAME}.weight": draw(out_features, in_features)} if mode == "none" else {}


def rebuilt(
    weight: torch.Tensor, adapter: dict[str, torch.Tensor], split: LayerSplit, rank: int, fmt: WeightFormat, mode: Mode
) -> tuple[Shard, object, torch.Tensor]:
    """(its shard, its codes, its dense part) of one rank, from its own parts of W, A and B alone."""
    shard = shard_of((weight.shape[0], weight.shape[1]), split, rank, fmt)
    mine = shard.of_weight(weight).clone()
    parts = {key: value.clone() for key, value in shard.of_adapter(NAME, adapter).items()}
    codes = rebuild_codes({NAME: mine}, parts, fmt, SCALING, mode)[NAME]
    return shard, codes, rebuild_weight(NAME, mine, parts, fmt, SCALING, mode)


def held(size: int, split: LayerSplit, rank: int) -> slice:
    """What vLLM's loader narrows to."""
    length = size // (split.world_size // split.replicas)
    start = rank // split.replicas * length
    return slice(start, start + length)


@pytest.mark.parametrize("mode", ["merged", "served", "none"])
@pytest.mark.parametrize("group_size", [None, 1, 5, 6, 12, 20, 60])
@pytest.mark.parametrize("along", ["outputs", "inputs", "nothing"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_shards_of_all_ranks_are_the_whole_layer_bit_for_bit(
    world_size: int, along: str, group_size: int | None, mode: Mode
) -> None:
    """60 inputs over 3 or 4 ranks begin and end inside groups of 12 and of 20."""
    fmt = WeightFormat(bits=3, group_size=group_size, symmetric=False, scale="searched")
    split = LayerSplit(along=along, world_size=world_size)  # type: ignore[arg-type]
    weight, adapter = layer(24, 60, mode)
    whole_codes = rebuild_codes({NAME: weight}, adapter, fmt, SCALING, mode)[NAME]
    whole = rebuild_weight(NAME, weight, adapter, fmt, SCALING, mode)
    ranks = [rebuilt(weight, adapter, split, rank, fmt, mode) for rank in range(world_size)]
    joined = join_codes([(shard, codes) for shard, codes, _ in ranks])  # type: ignore[misc]
    assert hash_codes({NAME: joined}) == hash_codes({NAME: whole_codes})
    for rank, (shard, _, dense) in enumerate(ranks):
        loaded = shard.placed(dense)
        assert loaded.shape == whole.shape
        rows = held(24, split, rank) if along == "outputs" else slice(None)
        columns = held(60, split, rank) if along == "inputs" else slice(None)
        assert torch.equal(loaded[rows, columns], whole[rows, columns])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("kv_heads", "world_size"), [(2, 4), (1, 4), (4, 4), (4, 2), (3, 6)])
def test_key_heads_fewer_than_ranks_are_replicated(kv_heads: int, world_size: int, bits: int, symmetric: bool) -> None:
    fmt = WeightFormat(bits=bits, group_size=16, symmetric=symmetric, scale="absmax")  # type: ignore[arg-type]
    split = heads_split(kv_heads, world_size)
    weight, adapter = layer(kv_heads * HEAD_DIM, 32, "merged")
    whole = rebuild_weight(NAME, weight, adapter, fmt, SCALING, "merged")
    ranks = [rebuilt(weight, adapter, split, rank, fmt, "merged") for rank in range(world_size)]
    joined = join_codes([(shard, codes) for shard, codes, _ in ranks])  # type: ignore[misc]
    assert hash_codes({NAME: joined}) == hash_codes(rebuild_codes({NAME: weight}, adapter, fmt, SCALING, "merged"))
    replicas = max(1, world_size // kv_heads)
    for rank, (shard, _, dense) in enumerate(ranks):
        heads = max(1, kv_heads // world_size)
        first = rank // replicas * heads
        assert shard.rows == (first * HEAD_DIM, (first + heads) * HEAD_DIM)
        assert torch.equal(dense, whole[slice(*shard.rows)])


def test_a_rank_rebuilds_its_share_and_whole_groups_at_its_borders() -> None:
    fmt = WeightFormat(bits=4, group_size=20, symmetric=True, scale="absmax")
    outputs, inputs = (LayerSplit(along=along, world_size=4) for along in ("outputs", "inputs"))  # type: ignore[arg-type]
    assert shard_of((24, 60), outputs, 1, fmt) == Shard(shape=(24, 60), rows=(6, 12), columns=(0, 60))
    columns = [shard_of((24, 60), inputs, rank, fmt).columns for rank in range(4)]
    assert columns == [(0, 20), (0, 40), (20, 60), (40, 60)]  # it holds 0-15, 15-30, 30-45, 45-60
    assert shard_of((24, 60), inputs, 2, replace(fmt, group_size=None)).is_whole  # one scale for the whole row
    assert shard_of((24, 60), inputs, 2, None).columns == (30, 45)  # unquantized
    assert shard_of((24, 60), inputs, 2, replace(fmt, group_size=15)).num_weights == 24 * 60 // 4
    assert shard_of((24, 60), WHOLE, 0, fmt).is_whole


def test_what_a_rank_did_not_rebuild_is_nan_for_the_loader() -> None:
    shard = shard_of((4, 6), LayerSplit(along="outputs", world_size=2), 1, None)
    loaded = shard.placed(torch.ones(2, 6, dtype=torch.bfloat16))
    assert loaded.dtype == torch.bfloat16
    assert torch.isnan(loaded[:2]).all()
    assert (loaded[2:] == 1).all()
    whole = torch.ones(4, 6)
    assert shard_of((4, 6), WHOLE, 0, None).placed(whole) is whole


def test_layers_without_an_adapter_have_no_part_of_it() -> None:
    shard = shard_of((24, 60), LayerSplit(along="inputs", world_size=2), 0, None)
    _, adapter = layer(24, 60, "merged")
    assert shard.of_adapter("model.layers.1.mlp.down_proj", adapter) == {}
    shapes = {key.rpartition(".")[2]: tuple(value.shape) for key, value in shard.of_adapter(NAME, adapter).items()}
    assert shapes == {"lora_A": (6, 30), "lora_B": (24, 6)}


def test_layers_that_do_not_divide_and_tensors_that_do_not_fit_are_refused() -> None:
    split = LayerSplit(along="outputs", world_size=5)
    with pytest.raises(QuantError, match="24 features do not divide over 5 parts"):
        shard_of((24, 60), split, 0, None)
    with pytest.raises(QuantError, match="rank 5 is not one of 5"):
        shard_of((25, 60), split, 5, None)
    for heads, ranks in ((3, 2), (2, 3)):
        with pytest.raises(QuantError, match=f"{heads} heads do not divide over {ranks} ranks"):
            heads_split(heads, ranks)
    _, adapter = layer(24, 66, "merged")
    with pytest.raises(QuantError, match=r"lora_A' has shape \(6, 66\)"):
        shard_of((24, 60), LayerSplit(along="inputs", world_size=2), 0, None).of_adapter(NAME, adapter)


def test_ranks_that_disagree_or_leave_a_gap_are_told_apart_from_a_whole_student() -> None:
    fmt = WeightFormat(bits=4, group_size=20, symmetric=False, scale="absmax")
    weight, adapter = layer(24, 60, "served")
    split = LayerSplit(along="inputs", world_size=4)
    ranks = [rebuilt(weight, adapter, split, rank, fmt, "served")[:2] for rank in range(4)]
    with pytest.raises(QuantError, match="do not hold every weight"):
        join_codes(ranks[:2])  # type: ignore[arg-type]
    other = rebuilt(weight + 1, adapter, split, 1, fmt, "served")[:2]
    with pytest.raises(QuantError, match="to different codes"):
        join_codes([ranks[0], other, *ranks[2:]])  # type: ignore[list-item]
