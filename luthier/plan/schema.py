"""The typed, complete description of a run. Every default of a run is stated here, once; docs and --help read it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Rate = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]


def counts(annotation: Any) -> bool:
    """Whether a type takes numbers and no true or false, which pydantic would read as 1 and 0."""
    kinds = _kinds(annotation)
    return bool({int, float} & kinds) and bool not in kinds


def _kinds(annotation: Any) -> set[Any]:
    parts = [a for a in get_args(annotation) if not isinstance(a, (str, int))]  # not the words of a Literal
    return set().union(*map(_kinds, parts)) if parts else {annotation}


class Stated(BaseModel):
    """What is stated is meant: a blank text is no name and no path, and true is no number."""

    @field_validator("*", mode="before")
    @classmethod
    def _meant(cls, value: Any, info: ValidationInfo) -> Any:
        empty = "" in value if isinstance(value, list) else isinstance(value, str) and not value.strip()
        if empty:
            raise ValueError("holds an empty text: state it, or leave it out")
        if isinstance(value, bool) and counts(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError(f"expected a number, got {str(value).lower()}")
        return value


class Section(Stated):
    """A part of a plan: unknown keys are errors (plan.load names the nearest valid one)."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class BaseSpec(Section):
    """The model as it was before."""

    name: str = Field("practice", description="Hub name, folder, or 'practice' for the built-in base.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub name.")
    kind: Literal["causal", "classify", "seq2seq"] = Field("causal", description="Which head the model carries.")
    labels: list[str] | None = Field(None, min_length=1, description="Class names for kind: classify, in index order.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type the frozen base is held in; auto goes by train.precision, see docs/precision.md."
    )
    attention: str | None = Field(None, description="transformers attention implementation; default sdpa.")
    trust_remote_code: bool = Field(False, description="Run code that the model's repository brings along.")
    tokenizer: str | None = Field(None, description="Hub name or folder of another tokenizer.")
    new_tokens: list[str] = Field([], description="Tokens to add; their embedding rows are trained and saved.")
    roles: dict[str, str] = Field({}, description="For unknown architectures: module-name pattern -> role.")
    deltas: list[str] = Field([], description="Delta folders to put on the base first, frozen, in this order.")


class SourceSpec(Section):
    """Where records come from and how they are read."""

    path: str = Field(..., description="File, glob, folder, hub dataset, or 'practice:FAMILY[,FAMILY…]'.")
    format: Literal[
        "auto", "messages", "prompt-completion", "alpaca", "sharegpt", "text", "chosen-rejected", "labelled"
    ] = Field("auto", description="Record shape; auto recognises it by the columns.")
    columns: dict[str, str] = Field({}, description="Our column name -> the file's (prompt: question …).")
    constants: dict[str, Any] = Field({}, description="Column values every record gets (system: …).")
    split: str = Field(
        "train", description="Split of a hub dataset, of a folder whose files name theirs, or of a practice family."
    )
    subset: str | None = Field(
        None, description="Configuration name of a hub dataset; of practice records: preferences."
    )
    limit: int | None = Field(None, ge=1, description="At most this many records.")
    skip: int = Field(0, ge=0, description="Leave out this many records at the start.")
    weight: float = Field(1.0, gt=0, description="Loss weight of every record of this source.")
    pattern: str | None = Field(
        None, description="Regular expression with named groups, for text files of one record a line."
    )


class DataSpec(Section):
    """From records to batches."""

    train: list[SourceSpec] = Field(..., description="One source or several; read in this order.")
    eval: list[SourceSpec] = Field([], description="Held-out sources for the loss during training.")
    holdout: int = Field(0, ge=0, description="With no eval source: hold out this many records at the end of train.")
    template: str | None = Field(None, description="Chat template: a Jinja file or text; default the tokenizer's own.")
    template_options: dict[str, Any] = Field({}, description="Variables handed to the template (enable_thinking …).")
    max_length: int = Field(1024, ge=2, description="Longest row in tokens.")
    too_long: Literal["truncate", "drop", "error"] = Field(
        "truncate", description="What happens to longer records; always counted."
    )
    loss_on: Literal["assistant", "last", "all"] = Field(
        "assistant", description="Which turns carry loss: every assistant turn, the last one only, or all tokens."
    )
    role_weights: dict[str, Weight] = Field({}, description="Loss weight by role, over loss_on ({tool: 0.5} …).")
    thinking: Literal["keep", "mask", "strip"] = Field(
        "keep", description="Thinking blocks in assistant turns: train, show without loss, or remove."
    )
    unsupervised: Literal["error", "drop"] = Field("error", description="A record without a supervised token.")
    end_of_turn: Literal["require", "allow-missing"] = Field(
        "require", description="Refuse rows whose answer does not end in a supervised end-of-turn."
    )
    packing: bool = Field(False, description="Fill rows of max_length with several records, isolated from each other.")
    bucket: int = Field(64, ge=1, description="Batches taken together when sorting by length; 1 keeps the drawn order.")
    shuffle: bool = Field(True, description="New seeded order every epoch.")
    stream: bool | Literal["auto"] = Field(
        "auto", description="Read while training, not before; auto above 100,000 records."
    )
    window: int = Field(
        2048, ge=1, description="Records checked before step one when streaming; also the shuffle window."
    )
    cache: bool = Field(
        True, description="Keep tokenised rows on disk, keyed by content of data, tokenizer and template."
    )

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        value = [value] if isinstance(value, (str, dict, SourceSpec)) else value
        return [{"path": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value


class DeltaSpec(Stated):
    """One form or one choice with its own sites and learning rate; other keys are the method's own settings."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    form: str | None = Field(None, description="How the delta is written down: lora, dora, adapter …")
    choice: str | None = Field(None, description="Which of the base's own parameters move: full, hft, lisa, bias …")
    name: str | None = Field(None, description="Name of this piece in the delta; default the form's or choice's.")
    sites: list[str] | None = Field(None, min_length=1, description="Roles or name patterns; default the method's own.")
    except_: list[str] = Field([], alias="except", description="Roles or name patterns to leave out.")
    layers: list[int] | None = Field(
        None, min_length=1, description="Only these layers (negative counts from the end)."
    )
    lr: float | None = Field(None, gt=0, description="Learning rate of this piece; default train.lr.")
    weight_decay: float | None = Field(
        None, ge=0, description="Weight decay of this piece; default train.weight_decay."
    )
    start_from: str | None = Field(
        None, description="Delta folder whose piece of this name goes on; pieces that no delta takes stay on, frozen."
    )

    @field_validator("sites", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_kind(self) -> DeltaSpec:
        if (self.form is None) == (self.choice is None):
            raise ValueError("a delta states exactly one of 'form' and 'choice'")
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """The method's own settings: every key that is not one of ours."""
        return dict(self.__pydantic_extra__ or {})


class ObjectiveSpec(Stated):
    """The loss; other keys are its settings."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    name: str = Field("sft", description="Objective by name; classification and seq2seq bases choose theirs with sft.")

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class TrainSpec(Section):
    """The loop."""

    epochs: float = Field(1.0, gt=0, description="Passes over the data; steps overrides it.")
    steps: int | None = Field(None, ge=1, description="Optimiser steps.")
    batch_size: int = Field(8, ge=1, description="Rows in a micro-batch on each process.")
    tokens_at_once: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        "auto",
        description="Positions in one forward pass; larger micro-batches are cut into parts that give the same sums. "
        "auto is 2,048 on a CPU; null never cuts.",
    )
    accumulate: int = Field(1, ge=1, description="Micro-batches in one optimiser step.")
    lr: float = Field(2e-4, gt=0, description="Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine", "wsd"] = Field(
        "cosine", description="After warm-up; wsd decays over the last fifth."
    )
    warmup: float = Field(0.03, ge=0, description="Share of the steps below 1, number of steps from 1 on.")
    min_lr: float = Field(0.0, ge=0, le=1, description="Where the schedule ends, as a share of lr.")
    optimiser: str = Field("adamw", description="Optimiser by name.")
    betas: tuple[Rate, Rate] = Field((0.9, 0.999), description="AdamW's decay rates.")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(
        0.0, ge=0, description="Decoupled (sgd adds it to the gradient); not on norms, biases and vectors."
    )
    clip: float | None = Field(1.0, gt=0, description="Largest gradient norm; null for none.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Type of the arithmetic; auto is bf16 on hardware that has it. See docs/precision.md."
    )
    checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    compile: bool = Field(False, description="torch.compile the model.")
    seed: int = Field(0, ge=0, description="Of the draws, the order and dropout.")
    eval_every: int = Field(0, ge=0, description="Steps between evaluations; 0 for none but the last.")
    eval_batch_size: int | None = Field(None, ge=1, description="Default batch_size.")
    early_stop: int | None = Field(None, ge=1, description="Stop after this many evaluations without a better loss.")
    keep_best: bool = Field(False, description="End with the delta of the best evaluation loss.")
    non_finite: Literal["stop", "skip"] = Field(
        "stop", description="A loss that is not finite: stop and write the records, or skip and count."
    )
    max_skips: int = Field(10, ge=0, description="With non_finite: skip, stop after this many.")
    log_every: int = Field(1, ge=1, description="Steps between log lines.")
    report_to: list[str] = Field([], description="tensorboard, wandb, mlflow, trackio.")
    callbacks: list[str] = Field([], description="module:name of callables on (event, loop).")
    rehearse: bool = Field(True, description="Run the longest batch through everything before step one.")
    fsdp: bool = Field(False, description="Shard with FSDP2 instead of DDP when launched on several processes.")

    @field_validator("report_to", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if value in ("none", None):
            return []
        return [value] if isinstance(value, str) else value


class CheckpointSpec(Section):
    """What is kept to resume from."""

    every: int = Field(0, ge=0, description="Steps between checkpoints; 0 keeps none but on interruption.")
    keep: int = Field(2, ge=1, description="Newest checkpoints kept.")


class CheckSpec(Section):
    """One measurement of the audit: records and a metric."""

    name: str | None = Field(None, description="Shown in the report; default from the source.")
    source: SourceSpec = Field(..., description="Its records.")
    metric: str = Field(
        "auto",
        description="Verifier or metric by name; auto is the family's own, exact match for answers, loss for text.",
    )
    metric_options: dict[str, Any] = Field({}, description="Settings of the metric.")
    max_new_tokens: int = Field(64, ge=1, description="Longest generated answer.")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"source": {"path": value, "split": "test"}} if isinstance(value, str) else value

    @field_validator("source", mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return {"path": value, "split": "test"} if isinstance(value, str) else value


class AuditSpec(Section):
    """What is measured before and after."""

    enabled: bool = Field(True, description="Measure at all.")
    target: list[CheckSpec] = Field([], description="What the tuning is for.")
    guards: list[CheckSpec] = Field([], description="What must not be lost.")
    shifted: list[CheckSpec] = Field([], description="The target under shift: longer, rephrased, recombined.")
    items: int = Field(100, ge=2, description="Most items per check.")
    resamples: int = Field(1000, ge=100, description="Bootstrap draws for the intervals.")
    drift_tokens: int = Field(
        2048, ge=0, description="Tokens of the base's own text on which KL is measured; 0 for none."
    )
    samples: int = Field(6, ge=0, description="Answers shown side by side per check.")
    batch_size: int = Field(32, ge=1, description="Prompts generated at once.")


class GateSpec(Section):
    """What a release may cost and has to bring, for `luthier gate` and `luthier rebase`."""

    min_gain: float = Field(
        0.0, description="Least gain on every target, in its metric's unit (share: 0.02 = 2 points)."
    )
    tolerance: float = Field(
        0.05, ge=0, description="What a check may lose: a guard against the old model, a target against min_gain."
    )
    tolerances: dict[str, float] = Field(
        {}, description="Tolerance of single checks, by the name that the report shows."
    )
    max_negative_flips: float | None = Field(
        0.05,
        ge=0,
        le=1,
        description="Largest share of a check's items that were right and are wrong; null for no line.",
    )
    max_drift: float | None = Field(
        0.25, ge=0, description="Largest KL(old || new) in nats a token on the old model's own text; null for no line."
    )
    max_refusal_loss: float | None = Field(
        0.05,
        ge=0,
        le=1,
        description="What the share of refused must-refuse prompts may lose, and that of refused benign ones gain, on checks "
        "with the metric refusal; null for no line.",
    )
    max_calibration_loss: float | None = Field(
        0.1, ge=0, le=1, description="Largest growth of the expected calibration error; null for no line."
    )
    confidence: Literal["answer", "token"] = Field(
        "answer",
        description="Confidence of a written answer: its probability, or the geometric mean of its tokens' probabilities.",
    )
    underpowered: Literal["fail", "pass"] = Field(
        "fail", description="What a line that has too few items to tell means for the verdict."
    )


class RebaseSpec(Section):
    """What `luthier rebase` tries on the new base, cheapest first."""

    move: str = Field("portllm", description="Move of weights by name; see luthier port.")
    factors: list[float] = Field([0.75, 0.5, 1.25], description="Factors on the whole change, each a repair.")
    lines: list[float] = Field(
        [0.5], description="LiNeS: factors at the first layer, rising to 1 at the last; each a repair."
    )
    steps: int = Field(
        50, ge=0, description="Steps of further tuning on the plan's data from the ported delta; 0 for none."
    )


class Plan(Section):
    """A run: base, data, deltas, objective, loop, audit."""

    base: BaseSpec = Field(BaseSpec(), description="The model.")  # pyright: ignore[reportCallIssue]
    data: DataSpec = Field(..., description="The records.")
    delta: list[DeltaSpec] = Field(..., min_length=1, description="What may change: one or several.")
    objective: ObjectiveSpec = Field(ObjectiveSpec(), description="The loss.")  # pyright: ignore[reportCallIssue]
    train: TrainSpec = Field(TrainSpec(), description="The loop.")  # pyright: ignore[reportCallIssue]
    checkpoint: CheckpointSpec = Field(CheckpointSpec(), description="Checkpoints.")  # pyright: ignore[reportCallIssue]
    audit: AuditSpec = Field(AuditSpec(), description="Measurements.")  # pyright: ignore[reportCallIssue]
    gate: GateSpec | None = Field(None, description="Limits of a release, for luthier gate and luthier rebase.")
    rebase: RebaseSpec | None = Field(None, description="Repairs to try, for luthier rebase.")
    push_to: str | None = Field(None, description="Hub repository that receives the delta at the end.")

    @field_validator("base", mode="before")
    @classmethod
    def _named_base(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("data", mode="before")
    @classmethod
    def _data_path(cls, value: Any) -> Any:
        return {"train": value} if isinstance(value, str) else value

    @field_validator("delta", mode="before")
    @classmethod
    def _deltas(cls, value: Any) -> Any:
        value = [value] if isinstance(value, (str, dict, DeltaSpec)) else value
        return [{"form": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value

    @field_validator("objective", mode="before")
    @classmethod
    def _named_objective(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class MeasuringPlan(Plan):
    """A plan that is only measured by: it may leave out what to train, and on what."""

    data: DataSpec | None = Field(None, description="The records; how their prompts are rendered.")  # pyright: ignore
    delta: list[DeltaSpec] = Field([], description="What may change.")
