"""The YAML schema of a run: one frozen model per section, one line of documentation per field.

``load`` reads a file, applies dotted overrides, checks everything at once and returns a :class:`Config`; ``dump`` writes one
that loads to the same. Nothing here imports torch, so a bad configuration is answered in an instant.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from safe_lab import yaml_core
from safe_lab.byte_size import parse_bytes
from safe_lab.data.tasks import TASKS
from safe_lab.importance import METRICS
from safe_lab.policy import POLICIES
from safe_lab.schedule import CURVES
from safe_lab.section import ConfigError, Section, check, override_all, read_tree
from safe_lab.sharpness import ESTIMATORS, LANDSCAPES, MEASURES
from safe_lab.suggest import did_you_mean

Share = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=1)]


def _count_up(seeds: Any) -> Any:
    return tuple(range(seeds)) if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds > 0 else seeds


def _check_different(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise PydanticCustomError("option", "a seed stands twice")
    return seeds


Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32)]
# Some seeds; a number N stands for 0 to N - 1.
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), BeforeValidator(_count_up), AfterValidator(_check_different)]


def _check_bytes(size: Any) -> str:
    try:
        # YAML reads 185 as a number, which lacks a unit all the same.
        parse_bytes(str(size))
    except ValueError as error:
        raise PydanticCustomError("size", str(error)) from None
    return str(size)


ByteSize = Annotated[str, BeforeValidator(_check_bytes)]


def _metric_options() -> str:
    def choices(values: tuple[Any, ...]) -> str:
        return (
            f"{values[0]} (between {values[1]} and {values[2]})"
            if isinstance(values[0], float)
            else " | ".join(map(str, values)).lower()
        )

    return "; ".join(
        f"{name}: " + ", ".join(f"{key}={choices(values)}" for key, values in metric.options.items())
        for name, metric in METRICS.items()
        if metric.options
    )


class ModelSection(Section):
    """The pre-trained model."""

    path: str = Field(
        min_length=1,
        description="hub id, local folder, package://name/path inside an installed package, or shape://name: a named "
        "architecture with random weights",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of the weights")
    attention: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None = Field(
        None, description="attention implementation; null: the library's choice"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")


class DataSection(Section):
    """The task and its examples."""

    task: str = Field(description="a task of safe_lab.data: " + ", ".join(TASKS))
    path: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="file or folder of JSONL, CSV, TSV or Parquet, folder of datasets, or hub id; null: the task's own source",
    )
    text_column: str | None = Field(None, description="column of the (first) text; null: the task's own")
    text_pair_column: str | None = Field(None, description="column of the second text; null: the task's own")
    label_column: str | None = Field(None, description="column of the label; null: the task's own")
    labels: tuple[str, ...] | None = Field(
        None, description="names of the labels in the order of their ids; null: from the data"
    )
    max_length: Annotated[int, Field(strict=True, ge=4)] = Field(128, description="tokens a text (or pair) is cut to")
    max_train_samples: Count | None = Field(
        None, description="random subset of the training split, in examples; null: all"
    )
    max_validation_samples: Count | None = Field(
        None, description="random subset of each validation split, in examples; null: all"
    )
    validation_share: Annotated[float, Field(strict=True, gt=0, lt=1)] = Field(
        0.1, description="share of the training split held out where the source has no validation split"
    )
    group_by_length: bool = Field(
        False, description="batches of texts of like length: less padding, a little less random"
    )

    @field_validator("task")
    @classmethod
    def _known_task(cls, task: str) -> str:
        return _known("task", task, TASKS)


class AdapterSection(Section):
    """The adapters, through PEFT."""

    method: str = Field(
        "lora",
        min_length=1,
        description="PEFT method by its name: lora, loha, lokr, ia3, oft, vera, ... (its layers must be BaseTunerLayer)",
    )
    rank: Count | None = Field(None, description="rank r; null: the method's default (LoRA: 8)")
    alpha: Positive | None = Field(
        None, description="scaling numerator, LoRA scales by alpha / rank; null: the method's default (LoRA: 8)"
    )
    dropout: Annotated[float, Field(strict=True, ge=0, lt=1)] | None = Field(
        None, description="dropout on the adapter's input; null: the method's default (LoRA: 0)"
    )
    target_modules: tuple[str, ...] | str | None = Field(
        None,
        description="names of modules to adapt, a regular expression, or all-linear; null: PEFT's choice for the model",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="further arguments of the method's own PEFT config: use_rslora, use_dora, init_lora_weights, ...",
    )


class TrainingSection(Section):
    """The optimisation."""

    epochs: Count = Field(10, description="passes over the training split")
    max_steps: Count | None = Field(None, description="optimizer steps after which training ends; null: as epochs say")
    batch_size: Count = Field(32, description="examples in a micro-batch, of all processes together")
    gradient_accumulation: Count = Field(
        1,
        description="N micro-batches in an optimizer step; an epoch's last step may have fewer, each of them still weighs 1/N",
    )
    eval_batch_size: Count = Field(64, description="examples in an evaluation batch, per process")
    learning_rate: Positive = Field(1e-3, description="peak learning rate of AdamW")
    weight_decay: NonNegative = Field(0.01, description="AdamW's decoupled weight decay")
    adam_beta1: Annotated[float, Field(strict=True, ge=0, lt=1)] = Field(
        0.9, description="AdamW's decay of the first moment"
    )
    adam_beta2: Annotated[float, Field(strict=True, ge=0, lt=1)] = Field(
        0.999, description="AdamW's decay of the second moment"
    )
    adam_epsilon: Positive = Field(1e-8, description="AdamW's epsilon")
    lr_schedule: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = Field(
        "linear", description="learning-rate schedule of transformers"
    )
    warmup_ratio: Share = Field(0.06, description="share of the steps over which the learning rate rises")
    max_grad_norm: Positive | None = Field(
        1.0, description="gradient norm above which gradients are scaled down; null: never"
    )
    mixed_precision: Literal["none", "bf16", "fp16"] = Field(
        "none", description="automatic mixed precision of Accelerate"
    )
    log_every: Count = Field(10, description="optimizer steps between rows of metrics.jsonl")
    eval_every: Literal["epoch", "never"] | Count = Field(
        "epoch", description="evaluate after each epoch, every N steps, or never before the end"
    )
    save_every: Literal["epoch", "never"] | Count = Field(
        "epoch", description="checkpoint after each epoch, every N steps, or never"
    )
    keep_checkpoints: Count = Field(2, description="newest checkpoints to keep")
    select: Literal["best", "last"] = Field(
        "best", description="weights the run ends with: those of the best evaluation, or the last"
    )
    early_stopping: Count | None = Field(
        None, description="evaluations without a better main metric after which training stops; null: never"
    )
    num_workers: Annotated[int, Field(strict=True, ge=0)] = Field(
        0, description="processes that load data; 0: the training process itself"
    )


class FreezingSection(Section):
    """Which adapters freeze when (the paper's part)."""

    policy: str = Field("safe", description="; ".join(f"{name}: {policy.summary}" for name, policy in POLICIES.items()))
    metric: str = Field(
        "cka", description="importance; " + "; ".join(f"{name}: {metric.summary}" for name, metric in METRICS.items())
    )
    metric_options: dict[str, Any] = Field(
        default_factory=dict, description=f"options of the metric, default first; {_metric_options()}"
    )
    unit: Literal["layer", "module", "matrix"] = Field(
        "layer", description="what freezes as one: all adapters of a layer, one adapted module, or one weight matrix"
    )
    normalize: Literal["none", "max", "rank"] = Field(
        "none",
        description="scores as they are, divided by the largest, or as quantiles (0.5 parts the units in halves)",
    )
    probe_samples: Count | None = Field(
        None,
        description="training examples to score on; null: 128, at most 1 in 50 of the training split, at least 16",
    )
    interval: Literal["epoch"] | Count = Field("epoch", description="a scoring after each epoch, or every N steps")
    warmup: Annotated[int, Field(strict=True, ge=0)] | Literal["stable"] = Field(
        1,
        description="t_w in intervals: nothing freezes before it; stable: until no score changes by more than stable_share",
    )
    stable_share: Positive = Field(
        0.05, description="relative change between two scorings under which a score counts as settled (warmup: stable)"
    )
    final: Count = Field(6, description="t_f in intervals: threshold, share or budget has its final value from then on")
    curve: str = Field(
        "cubic",
        description="how the threshold rises from t_w to t_f; "
        + "; ".join(f"{name}: {curve.summary}" for name, curve in CURVES.items()),
    )
    stairs: Count = Field(4, description="number of equal rises (curve: step)")
    final_threshold: float = Field(
        0.05,
        strict=True,
        allow_inf_nan=False,
        description="tau_T: from t_f on, units of lower score freeze (policy safe)",
    )
    final_share: Share = Field(0.5, description="share of the units frozen from t_f on (policies prefix and random)")
    final_importance: Share = Field(
        0.1, description="share of the total importance that may be frozen from t_f on (policy budget)"
    )
    budget_saves: Literal["flops", "bytes"] = Field(
        "flops", description="what policy budget saves most of: FLOPs of a step, or bytes at its peak"
    )
    refresh: bool = Field(True, description="score anew at each interval; false: keep the scores of the end of warm-up")

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, policy: str) -> str:
        return _known("policy", policy, POLICIES)

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, metric: str) -> str:
        return _known("metric", metric, METRICS)

    @field_validator("curve")
    @classmethod
    def _known_curve(cls, curve: str) -> str:
        return _known("curve", curve, CURVES)

    @model_validator(mode="after")
    def _check_together(self) -> FreezingSection:
        if self.warmup == "stable" and not POLICIES[self.policy].uses_scores:
            raise PydanticCustomError(
                "final", f"warmup: stable needs scores to settle, and policy {self.policy} has none"
            )
        if isinstance(self.warmup, int) and self.final < self.warmup:
            raise PydanticCustomError(
                "final",
                f"final (t_f) is {self.final}, before warmup (t_w), {self.warmup}: the rise cannot end before it begins",
            )
        try:
            METRICS[self.metric].check_options(self.metric_options)
        except ValueError as error:
            raise PydanticCustomError("option", f"metric_options: {error}") from None
        return self


class SavingsSection(Section):
    """What a frozen adapter is turned into."""

    fold: bool = Field(True, description="merge a frozen adapter into a copy of its base weight")
    fold_tolerance: Positive = Field(
        1e-4,
        description="largest relative change of an adapted layer's output by folding; beyond it (bfloat16) the adapter stays",
    )
    prefix: bool = Field(
        True, description="run the layers below the frozen depth apart: once a batch, without a graph, in eval mode"
    )
    prefix_eval: bool = Field(
        True, description="no dropout in the frozen prefix; false: it stays, and there is no cache"
    )
    cache: bool = Field(
        True, description="keep the output of an eval-mode prefix for every example, and start later epochs from it"
    )
    cache_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="dtype of cached activations; null: as computed, so that nothing changes"
    )
    cache_store: Literal["disk", "memory"] = Field("disk", description="a file in the run folder, or the host's memory")
    cache_limit: ByteSize | None = Field(
        None, description="most bytes of cached activations; what does not fit is computed; null: half of what is free"
    )
    keep_cache: bool = Field(False, description="leave the cache's file in the run folder at the end")
    trim_padding: Count | None = Field(
        None,
        description="cut batches into micro-batches of like length where a cut spares more than so many tokens of padding, "
        "about what a micro-batch costs by itself (32 on a CPU; more on a GPU); gradients add up to the same batch, but dropout "
        "draws otherwise; null: batches stay whole",
    )


class MemorySection(Section):
    """How much memory there is."""

    budget: ByteSize | None = Field(
        None,
        description="most live bytes: batches are split into micro-batches whose predicted peak fits, more rows as adapters "
        "freeze, and gradients add up to the same batch; null: no limit",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in stages where not even one row fits the budget without"
    )


class SharpnessSection(Section):
    """Curvature of the loss where training has ended, and its shape around there; ``safe-lab sharpness`` measures it later."""

    when: Literal["never", "end"] = Field("never", description="measure at the end of the run")
    every: Literal["never", "freeze"] | Count = Field(
        "never", description="measure during training too: after each freeze event, or every N epochs"
    )
    measures: tuple[str, ...] = Field(
        tuple(MEASURES), description="; ".join(f"{name}: {what}" for name, what in MEASURES.items())
    )
    validation_measures: tuple[str, ...] = Field(
        ("effective_weights", "ball", "average", "gauss_newton"),
        description="the same, over the validation sample, where the Hessian's trace may take hundreds of products",
    )
    every_measures: tuple[str, ...] = Field(
        ("trace",), description="the same, over the training sample during training"
    )
    landscape: tuple[str, ...] = Field(
        (), description="slices of the loss; " + "; ".join(f"{name}: {what}" for name, what in LANDSCAPES.items())
    )
    samples: Count = Field(256, description="examples of the training split")
    validation_samples: Annotated[int, Field(strict=True, ge=0)] = Field(
        256, description="examples of the (first) validation split; 0: none"
    )
    batch_tokens: Annotated[int, Field(strict=True, ge=16)] = Field(
        512,
        description="tokens in a pass with padding; a product takes some three times a training step's bytes for each",
    )
    seed: Seed = Field(
        0, description="seed of samples and random vectors; the same for all runs that are to be compared"
    )
    head: bool = Field(False, description="look at the task head's weights too, beside the adapters'")
    units: tuple[str, ...] | None = Field(None, description="look at these units' weights alone; null: all adapters'")
    dtype: Literal["float32", "float64"] = Field("float32", description="precision of model and vectors, at least")
    estimator: str = Field(
        "xtrace", description="of traces; " + "; ".join(f"{name}: {what}" for name, what in ESTIMATORS.items())
    )
    tolerance: Positive = Field(0.05, description="relative standard error of a trace at which it is good enough")
    eigenvalues: Count = Field(5, description="how many of the largest")
    eigenvalue_tolerance: Positive = Field(
        0.05, description="residual of an eigenvalue, as a share of it, at which it is good enough"
    )
    spectrum_starts: Annotated[int, Field(strict=True, ge=2)] = Field(
        4, description="random starts of the spectrum's density"
    )
    spectrum_steps: Annotated[int, Field(strict=True, ge=2)] = Field(10, description="Lanczos steps from each")
    radius: Positive = Field(0.05, description="radius of SAM's ball")
    adaptive_radius: Positive = Field(
        0.5, description="radius of adaptive SAM's ball, whose axes are the weights' sizes"
    )
    deviation: Positive = Field(0.01, description="standard deviation of the noise on the weights")
    adaptive_deviation: Positive = Field(0.1, description="standard deviation of the noise as a share of each weight")
    directions: Annotated[int, Field(strict=True, ge=2)] = Field(8, description="directions of the noise")
    landscape_points: Annotated[int, Field(strict=True, ge=3)] = Field(
        15, description="points of a slice, on each axis of a plane; an odd number, so that the solution is one of them"
    )
    landscape_span: Positive = Field(
        1.0, description="how far slices along random directions go both ways, in norms of the weights' filters"
    )
    eigen_span: Positive = Field(
        0.1, description="how far slices along eigenvectors go both ways, in norms of the weights"
    )
    budget_seconds: Positive | None = Field(
        None,
        description="seconds for a sample's measures, which then end with the error they have reached; null: no limit",
    )
    budget_products: Count | None = Field(
        200, description="the same in products with a curvature matrix, some two gradients each; null: no limit"
    )

    @field_validator("measures", "validation_measures", "every_measures")
    @classmethod
    def _known_measures(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_known("measure", name, MEASURES) for name in names)

    @field_validator("landscape_points")
    @classmethod
    def _odd(cls, number: int) -> int:
        if number % 2 == 0:
            raise PydanticCustomError("odd", "an odd number is needed, with the solution in the middle")
        return number

    @field_validator("landscape")
    @classmethod
    def _known_landscapes(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_known("landscape", name, LANDSCAPES) for name in names)

    @field_validator("estimator")
    @classmethod
    def _known_estimator(cls, estimator: str) -> str:
        return _known("estimator", estimator, ESTIMATORS)


class TrackingSection(Section):
    """Where figures go besides the run folder."""

    wandb: Literal["offline", "online", "disabled"] = Field(
        "offline", description="W&B: files in the run folder only, sent at once, or off; never a prompt"
    )
    project: str = Field("safe_lab", min_length=1, description="project name for W&B and the other trackers")
    others: tuple[
        Literal["tensorboard", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio"], ...
    ] = Field((), description="further trackers of Accelerate, by name")


class Config(Section):
    """One run."""

    name: str = Field(description="experiment; the run folder is <output_dir>/<name>/<variant>/seed-<seed>")
    variant: str = Field("default", description="variant within the experiment")
    seed: Seed = Field(0, description="seed of head and adapter initialisation, data order, dropout and probe")
    output_dir: str = Field("runs", min_length=1, description="folder of all run folders")
    model: ModelSection
    data: DataSection
    adapter: AdapterSection = AdapterSection()
    training: TrainingSection = TrainingSection()
    freezing: FreezingSection = FreezingSection()
    savings: SavingsSection = SavingsSection()
    memory: MemorySection = MemorySection()
    sharpness: SharpnessSection = SharpnessSection()
    tracking: TrackingSection = TrackingSection()

    @field_validator("name", "variant")
    @classmethod
    def _plain_folder_name(cls, name: str) -> str:
        return plain_folder_name(name)

    @property
    def run_folder(self) -> Path:
        """Where the run writes."""
        return Path(self.output_dir).expanduser() / self.name / self.variant / f"seed-{self.seed}"


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply overrides such as ``training.epochs=3``, and check the whole.

    Args:
        path: A YAML file (YAML 1.2: ``1e-3`` is a number, ``no`` a string).
        overrides: ``dotted.key=value``; the value is read as YAML.

    Raises:
        ConfigError: With one line for every fault found.
    """
    tree = read_tree(path)
    faults = override_all(tree, overrides)
    try:
        config = build(tree)
    except ConfigError as more:
        faults.append(str(more))
    if faults:
        raise ConfigError("\n".join(faults))
    return config


def build(tree: Mapping[str, Any]) -> Config:
    """Check a tree of plain values, as read from YAML.

    Raises:
        ConfigError: With one line for every fault found.
    """
    return check(Config, tree)


def find_faults(tree: Mapping[str, Any]) -> list[str]:
    """What is wrong with a tree of plain values, a line each."""
    try:
        build(tree)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def dump(config: Config) -> str:
    """The configuration as YAML with every default written out; ``load`` gives the same back."""
    return yaml_core.write(config.model_dump(mode="json"))


def warnings(config: Config) -> list[str]:
    """What is allowed but will hardly be meant: settings that have no effect, or thresholds that decide nothing."""
    freezing, training = config.freezing, config.training
    found = []
    if POLICIES[freezing.policy].level == "importance":
        if freezing.final_importance == 0:
            found.append("freezing.final_importance is 0: only units without any importance can ever freeze")
        if freezing.final_importance == 1:
            found.append("freezing.final_importance is 1, all there is: all units freeze, at t_f at the latest")
        if freezing.normalize == "max":
            found.append("freezing.normalize: max has no effect: shares of importance are the same without")
    if POLICIES[freezing.policy].level == "threshold":
        bounded = freezing.normalize != "none" or freezing.metric in ("cka", "random")
        if freezing.normalize == "none" and freezing.metric not in ("cka", "random", "depth"):
            found.append(
                f"freezing.final_threshold, {freezing.final_threshold:g}, is compared with raw {freezing.metric} scores, whose "
                "scale depends on model and data: normalize: rank or max gives a threshold a meaning"
            )
        if freezing.final_threshold <= 0 and freezing.metric != "contribution":
            found.append(
                f"freezing.final_threshold is {freezing.final_threshold:g}, and no score lies under it: "
                "nothing can ever freeze"
            )
        if bounded and freezing.final_threshold > 1:
            found.append(
                f"freezing.final_threshold is {freezing.final_threshold:g}, and no score is over 1: "
                "all units freeze, at t_f at the latest"
            )
    if config.savings.trim_padding is not None and training.batch_size == 1:
        found.append("savings.trim_padding has no effect: a batch of one row has no padding")
    if freezing.policy != "none" and freezing.interval == "epoch" and training.max_steps is None:
        at_once = freezing.curve == "constant" or freezing.policy == "all"
        first = max(1, freezing.warmup + (not at_once)) if isinstance(freezing.warmup, int) else 2
        if first >= training.epochs:
            found.append(
                f"training.epochs is {training.epochs}, and no unit can freeze before the end of epoch {first}: "
                "freezing saves nothing"
            )
        elif (
            POLICIES[freezing.policy].level != "none"
            and freezing.final >= training.epochs
            and freezing.curve != "constant"
        ):
            found.append(
                f"freezing.final (t_f) is {freezing.final}, the last scoring that counts follows epoch {training.epochs - 1}: "
                "the threshold does not reach its final value"
            )
    if config.model.dtype == "float16":
        found.append(
            "model.dtype is float16, where AdamW's epsilon is 0; training.mixed_precision: fp16 keeps float32 weights"
        )
    savings, memory = config.savings, config.memory
    if savings.keep_cache and not (savings.cache and savings.cache_store == "disk"):
        found.append("savings.keep_cache has no effect without a cache on disk")
    if memory.gradient_checkpointing and memory.budget is None:
        found.append(
            "memory.gradient_checkpointing has no effect without memory.budget; model.gradient_checkpointing is always on"
        )
    sharpness = config.sharpness
    if sharpness.every == "freeze" and freezing.policy == "none":
        found.append("sharpness.every: freeze measures nothing with freezing.policy: none, which freezes nothing")
    if "eigenvalues" not in sharpness.measures:
        found += [
            f"sharpness.landscape: {kind} is left out without eigenvalues among sharpness.measures"
            for kind in sharpness.landscape
            if kind.startswith("eigen")
        ]
    if training.early_stopping and training.eval_every == "never":
        found.append("training.early_stopping has no effect with eval_every: never")
    return found


def plain_folder_name(name: str) -> str:
    """The name, if a folder can be called so; a fault of the schema if not."""
    if not re.fullmatch(r"[\w][\w.+=,-]{0,99}", name):
        raise PydanticCustomError(
            "folder",
            f"{name!r} is no plain folder name: up to 100 letters, digits and . _ + = , - are allowed, and no leading dot",
        )
    return name


def safe_folder_name(text: str) -> str:
    """A plain folder name made of any text: what is not allowed in one is left out.

    >>> safe_folder_name("rank=[4, 8]")
    'rank=4,8'
    """
    return re.sub(r"[^\w.+=,-]", "", text).lstrip(".+=,-")[:100]


def fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Every field of the schema as (dotted key, type, default, description), in order."""
    for name, field in section.model_fields.items():
        key = prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from fields(field.annotation, key + ".")
            continue
        default = "required" if field.is_required() else _plain(field.get_default(call_default_factory=True))
        yield key, _type_name(section.__annotations__[name]), default, field.description or ""


def _known(what: str, name: str, known: Mapping[str, Any]) -> str:
    if name not in known:
        raise PydanticCustomError(
            "unknown", f"{name!r} is no {what}{did_you_mean(name, known)}; there are {', '.join(known) or 'none'}"
        )
    return name


def _plain(value: Any) -> str:
    return yaml_core.write(list(value) if isinstance(value, tuple) else value, flow=True).removesuffix("...\n").strip()


def _type_name(annotation: str) -> str:
    names = re.sub(r"Annotated\[(\w+), Field\(([^)]*)\)\]", r"\1 (\2)", annotation)
    names = re.sub(r"Literal\[([^\]]*)\]", lambda match: re.sub("[\"']", "", match[1]).replace(", ", " | "), names)
    names = names.replace("strict=True, ", "").replace(" (strict=True)", "")
    for short, long in {
        "Count": "int (ge=1)",
        "Share": "float (0 to 1)",
        "Positive": "float (gt=0)",
        "NonNegative": "float (ge=0)",
        "ByteSize": "size such as 6GiB",
        "None": "null",
    }.items():
        names = re.sub(rf"\b{short}\b", long, names)
    return re.sub(r"tuple\[(.*?), \.\.\.\]", r"list of \1", names.replace("dict[str, Any]", "mapping"))
