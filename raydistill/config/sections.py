"""The sections of the configuration: frozen, typed, every field described; unknown keys and bad values fail here.

Imports no torch, ray or vllm, so that `--help` and a bad config answer within a second. What excludes each other within a
section is refused by `checks`. A relative path is relative to the current directory, also when it stands in a config file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from raydistill.config.checks import (
    check_adapter,
    check_evaluation,
    check_objective,
    check_quant,
    check_results_section,
    check_rollout,
    check_run,
    check_study,
    check_teacher,
    check_trainer,
    check_world,
)
from raydistill.quant.formats import FormatName, WeightFormat, named_format

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Dtype = Literal["float32", "bfloat16"]
Scalar = bool | int | float | str


def _default_template() -> dict[str, Scalar]:
    """Models that can think aloud answer directly unless a run says otherwise; other templates ignore it."""
    return {"enable_thinking": False}


class Section(BaseModel):
    """Frozen, no unknown keys, defaults are checked too."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _bool_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic reads `true` as the number 1; here `num_steps = true` is a mistake."""
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("true and false fit yes/no fields only")
        return value


class RunSection(Section):
    """What the run is called, where it writes, what makes it repeatable."""

    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of the run and of its folder (letters, digits, '.', '_', '-'); unset: made from the time",
    )
    output: Path = Field(Path("outputs"), description="folder that holds runs/, logs and the results file")
    storage: str | None = Field(
        None,
        description="URL for checkpoints, ledgers, record and export (s3://bucket/prefix, or any that fsspec opens): nodes "
        "then need share no file system, and a run goes on with an empty disk; unset: all of it lies under run.output alone",
    )
    seed: int = Field(0, ge=0, description="prompts, lambda draws and sampling seeds all derive from it")
    verbose: bool = Field(False, description="show the engines' own output instead of keeping it in log files")
    resume: Literal["auto", "never"] = Field(
        "auto",
        description="auto: the same command goes on where an unfinished run stopped (without run.name also with other "
        "timeouts, devices, checkpoint. or results.); never: start anew",
    )

    @model_validator(mode="after")
    def _check(self) -> RunSection:
        check_run(self)
        return self


class StudentSection(Section):
    """The model that is quantized, trained and served."""

    model: str | None = Field(None, description="folder or hub id of the model to quantize and train (safetensors)")
    dtype: Dtype = Field("bfloat16", description="precision of the weights and of the forward passes, all engines")
    trust_remote_code: bool = Field(False, description="run Python code that ships with the model")


class TeacherSection(Section):
    """The full-precision model whose distributions are the target, and the actors that hold it."""

    model: str | None = Field(None, description="folder or hub id of the teacher; unset: the student's own model")
    dtype: Dtype = Field("bfloat16", description="precision of the teacher's forward pass")
    trust_remote_code: bool = Field(False, description="run Python code that ships with the model")
    num_actors: PositiveInt = Field(1, description="teacher actors, each with a full copy of the teacher")
    num_gpus: float = Field(
        0, ge=0, description="GPUs of one teacher actor: a share of one, or a number over which its layers are spread"
    )
    num_cpus: float = Field(0.5, ge=0, description="CPU cores that Ray books for one teacher actor")
    batch_tokens: PositiveInt = Field(16384, description="tokens (padding counted) of one teacher forward pass")
    cache_gib: float = Field(
        0,
        ge=0,
        description="GiB of answers to rows of the data set that each actor keeps: a row costs one forward pass over all "
        "epochs, and all runs of a sweep; 0 keeps none",
    )

    @model_validator(mode="after")
    def _check(self) -> TeacherSection:
        check_teacher(self)
        return self


class DataSection(Section):
    """The rows that give prompts (and reference completions), and which of them are kept."""

    path: Path | None = Field(None, description="training rows, JSONL: {messages: [...]} or {question/prompt, answer}")
    eval_path: Path | None = Field(None, description="held-out rows; unset: eval_rows are split off `path` by hash")
    eval_rows: int = Field(256, ge=0, description="held-out rows used for evaluation; 0 turns evaluation off")
    max_rows: PositiveInt | None = Field(None, description="read at most this many training rows; unset: all")
    max_length: PositiveInt = Field(1024, description="tokens of prompt + completion; longer rows are cut or left out")
    min_prompt_room: PositiveInt = Field(32, description="keep a row only if prompt tokens < max_length - this")
    min_completion: PositiveInt = Field(32, description="keep a row only if at least this many completion tokens fit")
    on_bad_row: Literal["error", "skip"] = Field("error", description="a malformed row stops the run, or is counted")
    template: dict[str, Scalar] = Field(
        default_factory=_default_template,
        description="variables of the chat template, in training, evaluation and serving (enable_thinking, date_string)",
    )


class ObjectiveSection(Section):
    """Who writes the completions (lambda), which divergence is minimised (beta), on which teacher signal."""

    on_policy_fraction: Fraction = Field(0.5, description="lambda: share of completions sampled by the student")
    mixing: Literal["step", "sequence"] = Field("sequence", description="draw lambda once per step or per sequence")
    beta: Fraction = Field(
        0.5, description="0 = forward KL(teacher||student), 1 = reverse KL(student||teacher), between: generalized JSD"
    )
    divergence: str = Field(
        "generalized_jsd", description="the divergence of beta's meaning below, or your own as module:function"
    )
    scale: Literal["raw", "continuous"] = Field("raw", description="continuous: D/(beta(1-beta)), comparable over beta")
    temperature: float = Field(1.0, gt=0, description="softens both sides of the loss; sampling: rollout.temperature")
    target: Literal["top_k", "dense"] = Field("top_k", description="teacher signal; dense: the whole vocabulary")
    top_k: PositiveInt = Field(64, description="teacher candidates per token (target = top_k)")
    treatment: Literal["tail", "truncated", "renormalised"] = Field("tail", description="tail: exact mass of the rest")
    distill_weight: float = Field(1.0, ge=0, description="weight of the divergence; 0 needs no teacher")
    ce_weight: float = Field(0.0, ge=0, description="weight of the cross-entropy; counts on reference completions only")

    @model_validator(mode="after")
    def _check(self) -> ObjectiveSection:
        check_objective(self)
        return self


class QuantSection(Section):
    """The weight format that the student is trained in and served in."""

    format: FormatName | Literal["none"] = Field("int4", description="weight format of the student")
    codebook: tuple[float, ...] | None = Field(
        None, description="values of a format of your own (format = 'codebook'), low to high, from -1 to 1"
    )
    group_size: int | Literal["channel"] = Field(32, description="weights that share one scale, or 'channel'")
    symmetric: bool = Field(False, description="true: grid around 0; false: each group has a zero point")
    scale: Literal["absmax", "searched"] = Field("searched", description="searched: least squared error per group")
    scale_dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="stored type of the scales")
    skip: tuple[str, ...] = Field(("lm_head",), description="linear layers left unquantized, by name ending")

    @model_validator(mode="after")
    def _check(self) -> QuantSection:
        check_quant(self)
        return self

    @property
    def weight_format(self) -> WeightFormat | None:
        """The format as the quant room knows it; None for an unquantized student."""
        if self.format == "none":
            return None
        return named_format(
            self.format,
            codebook=self.codebook,
            group_size=None if self.group_size == "channel" else self.group_size,
            symmetric=self.symmetric,
            scale=self.scale,
            scale_dtype=self.scale_dtype,
        )


class AdapterSection(Section):
    """What is trained: a LoRA adapter merged into the quantized weights, or served beside them."""

    mode: Literal["merged", "served", "none"] = Field(
        "merged", description="merged: Q(W + s*BA), no extra byte; served: Q(W) + LoRA; none: train all weights"
    )
    rank: PositiveInt = Field(32, description="LoRA rank r")
    alpha: float = Field(64.0, gt=0, description="LoRA alpha; the scale s is alpha / r")
    dropout: BelowOne = Field(0.0, description="LoRA dropout (adapter.mode = served only)")
    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        description="linear layers that get an adapter, by the last part of their name",
    )

    @model_validator(mode="after")
    def _check(self) -> AdapterSection:
        check_adapter(self)
        return self


class RolloutSection(Section):
    """The actors that sample the student, and how they sample."""

    engine: Literal["vllm", "hf"] = Field("vllm", description="what samples: vLLM, or transformers' generate")
    num_actors: PositiveInt = Field(1, description="rollout actors, each with a full student")
    num_gpus: float = Field(0, ge=0, description="GPUs of one rollout actor (tensor_parallel_size, or a fraction)")
    num_cpus: float = Field(0.5, ge=0, description="CPU cores that Ray books for one rollout actor")
    tensor_parallel_size: PositiveInt = Field(
        1,
        description="ranks over which one engine splits the student: its GPUs, or with num_gpus = 0 processes on CPUs",
    )
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = Field(0.85, description="share of a GPU vLLM takes")
    kv_cache_gib: float = Field(1.0, gt=0, description="GiB of KV cache of each rank of a vLLM engine on CPUs")
    temperature: float = Field(1.0, ge=0, description="sampling temperature, 0 is greedy (loss: objective.temperature)")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="nucleus sampling; below 1 cuts rare tokens")
    min_new_tokens: int = Field(0, ge=0, description="EOS is not sampled before this many tokens")
    max_new_tokens: PositiveInt = Field(128, description="a completion is cut here")
    timeout_s: float = Field(600, gt=0, description="a call that takes longer counts as a dead actor")

    @model_validator(mode="after")
    def _check(self) -> RolloutSection:
        check_rollout(self)
        return self


class TrainerSection(Section):
    """The data-parallel trainer: its workers, the batch, the optimizer."""

    num_workers: PositiveInt = Field(1, description="Ray Train workers (data-parallel ranks)")
    num_gpus: float = Field(0, ge=0, description="GPUs of one worker, at most 1; 0 trains on CPU with gloo")
    num_cpus: float = Field(0.5, ge=0, description="CPU cores that Ray books for one worker")
    num_steps: PositiveInt = Field(1000, description="optimizer steps")
    sequences_per_step: PositiveInt = Field(32, description="sequences of one optimizer step, all workers together")
    sequences_per_micro_batch: PositiveInt = Field(8, description="sequences of one forward/backward of one worker")
    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="after the warm-up")
    warmup_fraction: Fraction = Field(0.05, description="share of the steps with a rising learning rate")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    betas: tuple[BelowOne, BelowOne] = Field((0.9, 0.999), description="AdamW betas")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this global norm")
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="DeepSpeed ZeRO stage")
    gradient_checkpointing: bool = Field(False, description="trade compute for activation memory")
    max_skipped_fraction: Fraction = Field(0.05, description="stop when more steps than this were NaN or infinite")
    timeout_s: float = Field(1800, gt=0, description="a step that takes longer counts as a dead trainer")

    @model_validator(mode="after")
    def _check(self) -> TrainerSection:
        check_trainer(self)
        return self

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches of one rank in one optimizer step (gradient accumulation steps)."""
        return self.sequences_per_step // (self.num_workers * self.sequences_per_micro_batch)


class SyncSection(Section):
    """How closely the sampling engine follows the trainer, and how that is checked."""

    max_staleness: int = Field(1, ge=0, description="S: optimizer steps a sample's policy may lie behind; 0 = serial")
    max_policy_gap_nats: float | None = Field(
        None, gt=0, description="largest mean |trainer - engine| log-prob; unset: 1e-3 in float32, 0.05 in bfloat16"
    )
    probe_sequences: PositiveInt = Field(4, description="sequences scored on both sides at each sync")
    probe_tokens: PositiveInt = Field(32, description="tokens of one probe sequence")
    codes_check_every: PositiveInt = Field(10, description="syncs between two comparisons of the codes' hash")


class EvaluationSection(Section):
    """Held-out evaluation during training, on the weights that would be served."""

    eval_every: PositiveInt = Field(50, description="evaluate after every so many steps (and at start and end)")
    num_actors: Literal[1] = Field(1, description="actors that score held-out rows beside training")
    num_gpus: float = Field(0, ge=0, description="GPUs of the evaluation actor, at most 1")
    num_cpus: float = Field(0.25, ge=0, description="CPU cores that Ray books for the evaluation actor")
    exact_match: Literal["off", "final_number"] = Field("off", description="generate and compare the final number")
    max_new_tokens: PositiveInt = Field(128, description="tokens generated per row for exact_match and shown_rows")
    shown_rows: int = Field(
        4,
        ge=0,
        description="held-out rows whose greedy answers, the teacher's and the student's before and after, are recorded",
    )

    @model_validator(mode="after")
    def _check(self) -> EvaluationSection:
        check_evaluation(self)
        return self


class CheckpointSection(Section):
    """What a crash costs, and what stays on the disk."""

    save_every: PositiveInt = Field(50, description="checkpoint after every so many steps (and at each evaluation)")
    keep_last: PositiveInt = Field(2, description="newest checkpoints kept: a damaged one leaves the one before it")
    keep_best: PositiveInt = Field(
        1, description="best checkpoints kept, by held-out KL (without a teacher: perplexity)"
    )


class ResultsSection(Section):
    """Where metrics, settings and artifacts are recorded."""

    uri: str | None = Field(None, description="MLflow tracking URI; unset: an SQLite file under run.output")
    experiment: str = Field("raydistill", description="MLflow experiment")
    tags: dict[str, str] = Field(default_factory=dict, description="tags of the run in the results store")
    sinks: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (),
        description="where the record goes beside the store; tensorboard: <run>/tensorboard; wandb: Weights & Biases",
    )
    deliver: bool = Field(
        True, description="bring the record there meanwhile; false: later, with `python -m raydistill.results.deliver`"
    )

    @model_validator(mode="after")
    def _check(self) -> ResultsSection:
        check_results_section(self)
        return self

    @field_validator("uri")
    @classmethod
    def _whole_path(cls, uri: str | None) -> str | None:
        """Who opens the store later, the delivery or a command that reads the record, may stand in another folder."""
        name = (uri or "").removeprefix("sqlite:///")
        return uri if not name or name == uri or name.startswith("/") else f"sqlite:///{Path(name).absolute()}"


class ClusterSection(Section):
    """The Ray cluster."""

    address: str | None = Field(None, description="Ray cluster to join; unset: RAY_ADDRESS, else a local one")
    num_cpus: PositiveInt | None = Field(None, description="cores of a local cluster; unset: all")
    by_role: bool = Field(
        False, description="place actors on nodes that have the resource of their role: rollout, teacher, trainer"
    )


class WorldSection(Section):
    """An embedded world that makes its own data, tokenizer and teacher, and fills in those paths."""

    name: Literal["stories", "question_answers", "text", "none"] = Field(
        "none", description="which embedded world; text: passages of plain text files and their continuations"
    )
    folder: Path | None = Field(None, description="where the world is cached; unset: <run.output>/worlds")
    train_path: Path | None = Field(None, description="what to learn from: JSONL rows {question, answer}, or text")
    test_path: Path | None = Field(None, description="the same for the final table, disjoint")
    recipe: dict[str, Scalar] = Field(
        default_factory=dict, description="overrides of the tiny teacher's recipe (hidden_size, num_steps, ...)"
    )

    @model_validator(mode="after")
    def _check(self) -> WorldSection:
        check_world(self)
        return self


class StudySection(Section):
    """What `raydistill compare` and `raydistill demo` compare, beside the teacher."""

    arms: tuple[Literal["student", "gold-ce", "off-policy", "mixed", "on-policy"], ...] = Field(
        ("student", "gold-ce"),
        description="runs to compare; student: this config as it is; gold-ce: cross-entropy on the data set's answers; "
        "off-policy, mixed, on-policy: lambda and beta at 0, 0.5, 1",
    )
    seeds: PositiveInt = Field(1, description="runs of each arm, with run.seed, run.seed + 1, ...; means are compared")
    ptq_methods: tuple[Literal["rtn", "gptq", "awq"], ...] = Field(
        ("rtn",),
        description="plain quantization to compare with; rtn: rounding, whose best grid the student is trained on; "
        "gptq, awq: by llm-compressor, after `make ptq`",
    )
    ptq_formats: tuple[Literal["int4", "int3", "int2"], ...] = Field(
        ("int4", "int3", "int2"), description="widths of the PTQ rows, each with the best of four grids"
    )
    calibration_rows: PositiveInt = Field(512, description="training rows that GPTQ and AWQ look at, drawn by run.seed")
    grid_rows: PositiveInt = Field(256, description="held-out rows on which the PTQ grids are chosen")
    test_path: Path | None = Field(
        None, description="rows of the final table, JSONL; unset: the world's test file (needed without a world)"
    )
    test_rows: PositiveInt = Field(512, description="how many of them at most")
    tasks: tuple[str, ...] = Field((), description="lm-eval's tasks in the final table, such as hellaswag,arc_easy")
    task_data: Path | None = Field(None, description="their rows, FOLDER/TASK/SPLIT.jsonl, or YAMLs; unset: the hub's")
    task_limit: PositiveInt | None = Field(None, description="the first so many documents of each task; unset: all")
    num_fewshot: int | None = Field(None, ge=0, description="examples that tasks show; unset: as each task says")

    @model_validator(mode="after")
    def _check(self) -> StudySection:
        check_study(self)
        return self
