"""What a rebuild costs one rank of a tensor parallel engine, and what the engine makes of it.

    python benchmarks/shards.py [--engine]

Arithmetic: CPU-seconds of one rank to rebuild its parts of a random 4-layer, 512-wide student, int4 with searched scales,
for 1, 2 and 4 ranks (one thread). --engine: seconds of `VllmEngine.load` with 1 and 2 ranks on this machine's CPUs, and
the largest difference of their log-probs.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from raydistill.actors.vllm_settings import CPU_ENGINE_ENVIRONMENT, ENGINE_ENVIRONMENT

os.environ.update(ENGINE_ENVIRONMENT | CPU_ENGINE_ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1"})

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from raydistill.config import AdapterSection, QuantSection, RolloutSection, StudentSection
from raydistill.messages import StudentWeights, TokenRows
from raydistill.models import StudentSpec, build_student, quantizable_weights
from raydistill.quant.shards import LayerSplit, heads_split, shard_of
from raydistill.quant.student import adapter_state, rebuild_weight

HEADS, KEY_HEADS = 8, 4
REPEATS = 5
INPUT_SPLIT = ("o_proj", "down_proj")


def make_student(folder: Path) -> StudentSpec:
    shape = {
        "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4,
        "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "head_dim": 64, "max_position_embeddings": 256,
    }  # fmt: skip
    AutoModelForCausalLM.from_config(Qwen3Config(**shape)).save_pretrained(folder)
    return StudentSpec(
        student=StudentSection(model=str(folder), dtype="float32"),
        quant=QuantSection(),
        adapter=AdapterSection(rank=16, alpha=32),
    )


def split_of(name: str, ranks: int) -> LayerSplit:
    """As vLLM splits a Qwen3."""
    leaf = name.rpartition(".")[2]
    if leaf in INPUT_SPLIT:
        return LayerSplit(along="inputs", world_size=ranks)
    heads = {"q_proj": HEADS, "k_proj": KEY_HEADS, "v_proj": KEY_HEADS}
    return heads_split(heads[leaf], ranks) if leaf in heads else LayerSplit(along="outputs", world_size=ranks)


def rank_seconds(spec: StudentSpec, state: dict[str, torch.Tensor], ranks: int) -> float:
    """CPU-seconds of the first rank for one rebuild; median."""
    held = {}
    for name, weight in quantizable_weights(spec).items():
        shard = shard_of((weight.shape[0], weight.shape[1]), split_of(name, ranks), 0, spec.weight_format)
        held[name] = shard, shard.of_weight(weight).clone()
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        for name, (shard, weight) in held.items():
            adapter = shard.of_adapter(name, state)
            shard.placed(rebuild_weight(name, weight, adapter, spec.weight_format, spec.scaling, spec.adapter.mode))
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def engine_seconds(spec: StudentSpec, state: dict[str, torch.Tensor], ranks: int) -> tuple[float, np.ndarray]:
    """(wall seconds of a load, median; log-probs of a fixed row)."""
    from raydistill.actors.vllm_engine import VllmEngine

    engine = VllmEngine(spec, RolloutSection(tensor_parallel_size=ranks), 128, [2])
    tensors = {name: tensor.numpy() for name, tensor in state.items()}
    seconds = []
    for version in range(REPEATS):
        start = time.time()
        engine.load("run-a", StudentWeights(version=version, tensors=tensors, probe=None), want_codes=False)
        seconds.append(time.time() - start)
    scores = engine.score(TokenRows.from_rows([list(range(3, 99))]))
    engine.close()
    return statistics.median(seconds), scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="store_true", help="start the real engine as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        spec = make_student(Path(folder))
        state = {
            key: value + 0.02 * torch.randn(value.shape) for key, value in adapter_state(build_student(spec)).items()
        }
        for ranks in (1, 2, 4):
            print(f"{ranks} ranks: {rank_seconds(spec, state, ranks):.3f} CPU-seconds of one rank for one rebuild")
        if options.engine:
            found = {ranks: engine_seconds(spec, state, ranks) for ranks in (1, 2)}
            for ranks, (seconds, _) in found.items():
                print(f"engine of {ranks} ranks: {seconds:.3f} s for one load")
            print(f"largest difference of log-probs: {np.abs(found[1][1] - found[2][1]).max():.1e} nats")


if __name__ == "__main__":
    main()
