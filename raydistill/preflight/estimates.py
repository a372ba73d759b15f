"""What a run will take, computed from its sizes: memory, bytes on the wire, FLOPs, seconds. Every number is an estimate.

Pure functions of numbers: no torch, no config, nothing is read. `plan` fills in the sizes. Memory counts tensors only: a
CUDA context, the allocator's slack and Ray's own processes come on top. A mixture of experts counts as if all ran.
"""

# Letters in the formulas: P parameters, b bytes of one weight, T tokens, N completion tokens, V vocabulary, K candidates,
# L layers, H hidden, q and k the widths of all query and of all key heads, M width of the MLP.
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

Mode = Literal["merged", "served", "none"]
Place = Literal["GPU", "host"]
Stage = Literal["rollout", "teacher", "trainer"]

FLOAT32 = 4
INT32 = 4
REBUILD_BYTES = 20  # of one weight while its layer is quantized: B A in float64, then three float32 copies
SEARCH_CANDIDATES = 16  # scales tried for each group where quant.scale = searched
SEARCH_ELEMENTS = {"GPU": 64_000_000, "host": 400_000}  # candidates held at once, in two float32 buffers
SOFTMAX_BYTES = 12  # of one logit while a log-softmax is taken: logits, scaled logits, result, all float32
LOSS_CHUNK_LOGITS = 2**25  # logits that the losses convert to float32 at once
LOSS_CHUNK_BYTES = 8  # of one of those: the copy and one intermediate
REDUCE_BUCKET = 500_000_000  # gradient elements of DeepSpeed's bucket, its default
LIVE_PARAMETERS = 1_000_000_000  # that ZeRO-3 keeps gathered at once, its default


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """The numbers of one architecture."""

    parameters: int  # tied weights once
    matmul: int  # weights of the decoder's matrix products: neither embedding nor head
    vocab_size: int
    hidden: int
    layers: int
    query: int  # heads x head_dim
    key: int  # key heads x head_dim
    mlp: int

    @property
    def head(self) -> int:
        """Weights of the output head, tied or not."""
        return self.hidden * self.vocab_size


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentSize:
    """A model with what is quantized and trained of it."""

    model: ModelSize
    mode: Mode
    quantizable: int  # weights of the layers that are quantized; the rollout worker keeps a copy of these
    targets: int  # weights of the layers with an adapter
    trainable: int  # the adapter's A and B, or everything in mode "none"
    largest_layer: int  # weights of the largest quantized layer
    is_quantized: bool
    is_searched: bool
    weight_bytes: int  # of one weight in student.dtype

    @property
    def frozen(self) -> int:
        return 0 if self.mode == "none" else self.model.parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Sequences of one kind that are held at once, at their longest."""

    sequences: int
    tokens: int  # of one sequence: prompt + completion
    completion: int  # of one sequence

    @property
    def num_tokens(self) -> int:
        return self.sequences * self.tokens

    @property
    def num_completion(self) -> int:
        return self.sequences * self.completion


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the teacher says of one token; `candidates` None: log-probs of the whole shared vocabulary."""

    vocab_size: int
    candidates: int | None

    @property
    def token_bytes(self) -> int:
        """Top-K: K ids (int32), K log-probs (float32), one tail (float32) = 8 K + 4. Dense: 4 V."""
        if self.candidates is None:
            return FLOAT32 * self.vocab_size
        return (INT32 + FLOAT32) * min(self.candidates, self.vocab_size) + FLOAT32


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One piece of the memory of one actor."""

    name: str
    place: Place
    bytes: int


# Memory ---------------------------------------------------------------------------------------------------------------


def kept_dense_bytes(student: StudentSize) -> int:
    """Dense weights that transformers students keep between rebuilds: b x targets (merged); 2 b x quantizable (none, a
    copy of W beside it); 0 (served, or none unquantized). Not partitioned by any ZeRO stage."""
    if student.mode == "merged":
        return student.weight_bytes * student.targets
    return 2 * student.weight_bytes * student.quantizable if student.mode == "none" and student.is_quantized else 0


def rebuild_bytes(student: StudentSize, place: Place) -> int:
    """Scratch of a rebuild, one layer at a time: 20 bytes x the largest layer, and for the scale search two float32 buffers
    of 16 candidates for each weight, as many at once as the quantizer takes."""
    if not student.is_quantized:
        return 0
    search = min(SEARCH_ELEMENTS[place], SEARCH_CANDIDATES * student.largest_layer) if student.is_searched else 0
    return REBUILD_BYTES * student.largest_layer + 2 * FLOAT32 * search


def forward_bytes(model: ModelSize, num_tokens: int, weight_bytes: int) -> int:
    """A forward pass without gradients, rough: T x (4 H + 3 M) x b, the widest layer's inputs and outputs. Attention is
    assumed fused: no T x T scores."""
    return num_tokens * (4 * model.hidden + 3 * model.mlp) * weight_bytes


def activation_bytes(model: ModelSize, num_tokens: int, weight_bytes: int, checkpointing: bool) -> int:
    """What backward needs of the decoder, rough: L x T x (6 H + 3 q + 4 k + 5 M) x b, within a third of what PyTorch
    saves for Qwen3 and Llama with the default targets (a served adapter on few layers saves less). With gradient
    checkpointing L x T x H x b and one layer of the former. Attention is assumed fused."""
    layer = num_tokens * (6 * model.hidden + 3 * model.query + 4 * model.key + 5 * model.mlp) * weight_bytes
    if not checkpointing:
        return model.layers * layer
    return model.layers * num_tokens * model.hidden * weight_bytes + layer


def key_value_bytes(model: ModelSize, num_tokens: int, weight_bytes: int) -> int:
    """KV cache: 2 x L x k x T x b; full attention in every layer."""
    return 2 * model.layers * model.key * num_tokens * weight_bytes


def rollout_memory(
    student: StudentSize, batch: Batch, *, engine: str, place: Place, tensor_parallel: int, cpu_cache_bytes: int
) -> list[Part]:
    """One rollout actor (its GPUs together hold `tensor_parallel` times the GPU parts).

    vLLM: weights P b / tp, dense, whatever the format's bits: the served weights are dequantized codes. KV cache: on a GPU
    that of all the batch's sequences at their longest / tp (vLLM fills rollout.gpu_memory_utilization in any case), on a CPU
    rollout.kv_cache_gib of each rank. The served adapter has its A and B once more in b. One layer's rebuild, where the rank
    computes: of its 1 / tp of the layer; with tp > 1 vLLM's loader holds two layers (gate and up) whole in b. On the host
    the ranks together keep W of the quantizable layers in b (a little more where key heads are replicated or a group lies on
    a border), and each the last A and B in float32; while they start, each reads the whole model.
    hf: the trainer's model without its optimizer; logits of one token of each sequence.
    """
    model, b = student.model, student.weight_bytes
    if engine == "hf":
        return [
            Part(name="weights", place=place, bytes=(model.parameters + _adapter(student)) * b),
            Part(name="dense weights kept", place=place, bytes=kept_dense_bytes(student)),
            Part(name="KV cache", place=place, bytes=key_value_bytes(model, batch.num_tokens, b)),
            Part(name="logits of one token", place=place, bytes=batch.sequences * model.vocab_size * SOFTMAX_BYTES),
            Part(name="one layer's rebuild", place=place, bytes=rebuild_bytes(student, place)),
        ]
    served = b * student.trainable if student.mode == "served" else 0
    cache = key_value_bytes(model, batch.num_tokens, b) // tensor_parallel if place == "GPU" else cpu_cache_bytes
    here = 1 if place == "GPU" else tensor_parallel  # ranks whose parts add up: each has a GPU, all share the host
    rebuild = rebuild_bytes(replace(student, largest_layer=_share(student.largest_layer, tensor_parallel)), place)
    loader = 2 * b * student.largest_layer if tensor_parallel > 1 else 0
    return [
        Part(name="weights, dense", place=place, bytes=here * (model.parameters * b + served) // tensor_parallel),
        Part(name="KV cache", place=place, bytes=here * cache),
        Part(name="one layer's rebuild", place=place, bytes=here * (rebuild + loader)),
        Part(name="W kept for rebuilding", place="host", bytes=student.quantizable * b),
        Part(name="A and B", place="host", bytes=tensor_parallel * student.trainable * FLOAT32),
    ]


def teacher_memory(
    teacher: ModelSize,
    weight_bytes: int,
    batch: Batch,
    answer: Answer,
    *,
    logits_rows: int,
    place: Place,
    num_devices: int = 1,
) -> list[Part]:
    """One teacher actor, of several devices the one with the head: weights P b / devices; one forward pass of the batch; the
    largest block of logits, min(N, rows) x V x 12 bytes (three float32 copies while the softmax is taken); the answers of
    the batch, N x bytes of one answer, on the device and once more on the host."""
    rows = min(batch.num_completion, logits_rows)
    answers = batch.num_completion * answer.token_bytes
    return [
        Part(name="weights", place=place, bytes=_share(teacher.parameters * weight_bytes, num_devices)),
        Part(name="one forward pass", place=place, bytes=forward_bytes(teacher, batch.num_tokens, weight_bytes)),
        Part(name="largest block of logits", place=place, bytes=rows * teacher.vocab_size * SOFTMAX_BYTES),
        Part(name="answers", place=place, bytes=answers),
        Part(name="answers to send", place="host", bytes=answers),
    ]


def trainer_memory(
    student: StudentSize,
    batch: Batch,
    answer: Answer | None,
    *,
    place: Place,
    stage: int,
    world_size: int,
    checkpointing: bool,
) -> list[Part]:
    """One rank; `batch` is one micro-batch. Of w ranks each holds, by ZeRO stage:

    frozen weights P_f b, from stage 3 on P_f b / w; trainable weights P_t b, from stage 3 on / w; gradients P_t b, from stage
    2 on / w; AdamW's two moments 8 P_t, from stage 1 on / w; float32 weights to update 4 P_t, from stage 1 on / w, none where
    stage 0 or 3 trains in float32 (the weights are those); in bfloat16 the update's gradients in float32, 4 P_t likewise.
    Stage 3 adds what it keeps gathered, at most 1e9 weights, and takes at least the whole student, which every rank builds
    before it is split; stages 1 to 3 add DeepSpeed's bucket of 5e8 gradients (on the host memory that is not written does
    not count: min(P_t, 5e8)). DeepSpeed casts A and B to student.dtype.
    Logits: 2 x N x V x b (they and their gradient) and one float32 chunk. Activations: `activation_bytes`.
    """
    model, b, trainable = student.model, student.weight_bytes, student.trainable
    whole_or_share = [1 if stage < first else world_size for first in (1, 2, 3)]
    states, gradients, weights = whole_or_share
    master = 0 if b == FLOAT32 and stage in (0, 3) else FLOAT32 * trainable
    update = 0 if b == FLOAT32 else FLOAT32 * trainable
    gathered = min(student.frozen + trainable, LIVE_PARAMETERS) * b if stage == 3 and world_size > 1 else 0
    bucket = 0 if stage == 0 else (REDUCE_BUCKET if place == "GPU" else min(trainable, REDUCE_BUCKET)) * b
    logits = batch.num_completion * model.vocab_size
    sizes = {
        "frozen weights": _share(student.frozen * b, weights),
        "trainable weights": _share(trainable * b, weights),
        "gradients": _share(trainable * b, gradients),
        "optimizer states": _share(2 * FLOAT32 * trainable + master, states),
        "float32 gradients of the update": _share(update, states),
        "gathered weights (ZeRO-3)": gathered,
        "reduction bucket": bucket,
        "dense weights kept": kept_dense_bytes(student),
        "logits and their gradient": 2 * logits * b + min(logits, LOSS_CHUNK_LOGITS) * LOSS_CHUNK_BYTES,
        "teacher's answers": 0 if answer is None else batch.num_completion * answer.token_bytes,
        "activations (rough)": activation_bytes(model, batch.num_tokens, b, checkpointing),
        "one layer's rebuild": rebuild_bytes(student, place),
    }
    if stage == 3 and world_size > 1:  # it is split only when all of it is there
        sizes["whole student while it is built"] = max(0, (student.frozen + trainable) * b - sum(sizes.values()))
    return [Part(name=name, place=place, bytes=size) for name, size in sizes.items()]


def evaluator_memory(
    student: StudentSize, batch: Batch, answer: Answer | None, *, held_out_tokens: int, place: Place
) -> list[Part]:
    """The evaluation actor: the student as the trainer holds it, without gradients; one forward pass of its batch; one chunk
    of logits, min(N V, 2^25) x (b + 12); on the host the teacher's answers on all held-out tokens."""
    model, b = student.model, student.weight_bytes
    logits = min(batch.num_completion * model.vocab_size, LOSS_CHUNK_LOGITS)
    return [
        Part(name="weights", place=place, bytes=model.parameters * b + FLOAT32 * _adapter(student)),
        Part(name="dense weights kept", place=place, bytes=kept_dense_bytes(student)),
        Part(name="one forward pass", place=place, bytes=forward_bytes(model, batch.num_tokens, b)),
        Part(name="one chunk of logits", place=place, bytes=logits * (b + SOFTMAX_BYTES)),
        Part(name="one layer's rebuild", place=place, bytes=rebuild_bytes(student, place)),
        Part(name="held-out answers", place="host", bytes=held_out_tokens * answer.token_bytes if answer else 0),
    ]


def _adapter(student: StudentSize) -> int:
    return 0 if student.mode == "none" else student.trainable


def _share(size: int, ranks: int) -> int:
    return -(-size // ranks)


# Wire -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimizer step on average: its sequences and their tokens."""

    sampled: float  # sequences that the student answers: lambda x trainer.sequences_per_step
    given: float  # sequences with a reference completion
    prompt: float  # tokens of one prompt
    completion: float  # tokens of one completion, sampled or given

    @property
    def sequences(self) -> float:
        return self.sampled + self.given

    @property
    def num_completion(self) -> float:
        return self.sequences * self.completion


def rows_bytes(sequences: float, tokens: float) -> float:
    """`TokenRows`: 4 bytes for each id and 4 for each row's length."""
    return sequences * (INT32 * tokens + INT32)


def wire_bytes(student: StudentSize, step: Step, answer: Answer | None, *, num_rollouts: int) -> dict[str, float]:
    """Bytes of tensors that actors receive in one step; names of rows, message headers and probes are left out.

    Adapter: A and B (in mode "none" every weight) as float32 to each rollout actor, only where the student samples. Prompts
    to the rollout actors. Completions travel with their prompts, to the teacher and on to the trainer; references likewise.
    Teacher's answers: `Answer.token_bytes` for each completion token. Without a teacher, straight to the trainer.
    """
    hops = 1 if answer is None else 2
    sampled = rows_bytes(step.sampled, step.prompt) + rows_bytes(step.sampled, step.completion)
    given = rows_bytes(step.given, step.prompt) + rows_bytes(step.given, step.completion)
    return {
        "adapter to rollout actors": float(num_rollouts * FLOAT32 * student.trainable) if step.sampled else 0.0,
        "prompts to rollout actors": rows_bytes(step.sampled, step.prompt),
        "sampled completions": hops * sampled,
        "references": hops * given,
        "teacher's answers": step.num_completion * answer.token_bytes if answer is not None else 0.0,
    }


# FLOPs and time -------------------------------------------------------------------------------------------------------


def forward_flops(model: ModelSize, sequences: float, step: Step, extra_weights: int = 0) -> float:
    """2 x weights x tokens, causal attention 2 L q t^2 for each sequence of t tokens, and the head at completion positions
    2 H V N. One multiply-add is two FLOPs."""
    tokens = step.prompt + step.completion
    decoder = 2 * (model.matmul + extra_weights) * tokens + 2 * model.layers * model.query * tokens**2
    return sequences * (decoder + 2 * model.head * step.completion)


def step_flops(student: StudentSize, teacher: ModelSize | None, step: Step, checkpointing: bool) -> dict[Stage, float]:
    """FLOPs of each stage in one step, over all its actors; rebuilding the codes is left out.

    Rollout: one forward pass of each sampled sequence (prefill and decode). Teacher: one of every sequence. Trainer: a
    forward, as much again for the gradients of activations, 2 T for each weight that needs a gradient (merged: the targets'
    whole W, whose gradient gives those of A and B; served: A and B; none: all, head included), and with gradient
    checkpointing the decoder's forward again.
    """
    model = student.model
    adapter = student.trainable if student.mode == "served" else 0
    tokens = step.sequences * (step.prompt + step.completion)
    forward = forward_flops(model, step.sequences, step, adapter)
    trained = {"merged": student.targets, "served": student.trainable, "none": model.matmul}[student.mode]
    head = 2 * model.head * step.num_completion
    trainer = 2 * forward + 2 * trained * tokens + (head if student.mode == "none" else 0)
    if checkpointing:
        trainer += forward - head
    return {
        "rollout": forward_flops(model, step.sampled, step, adapter),
        "teacher": forward_flops(teacher, step.sequences, step) if teacher is not None else 0.0,
        "trainer": trainer,
    }


def stage_seconds(step: Step, rates: Mapping[Stage, float], actors: Mapping[Stage, int]) -> dict[Stage, float]:
    """Completion tokens of a step / (tokens per second of one actor x actors), for the stages with a rate."""
    tokens: dict[Stage, float] = {
        "rollout": step.sampled * step.completion,
        "teacher": step.num_completion,
        "trainer": step.num_completion,
    }
    return {stage: tokens[stage] / (rate * actors[stage]) for stage, rate in rates.items()}


def step_seconds(stages: Mapping[Stage, float], max_staleness: int) -> float:
    """Time between two optimizer steps: max(slowest stage, sum of the stages / (S + 1)).

    S = 0: the sum, everything is serial. S >= 1: the slowest stage, unless sampling, scoring and training of one step, one
    after another, take longer than the S + 1 steps that the loop keeps under way.
    """
    return max(max(stages.values()), sum(stages.values()) / (max_staleness + 1))
