"""Settings of a quantization: those the model decides, and checks before anything is built."""

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from llmctl.artifacts.find import kind_of, needs_data
from llmctl.artifacts.load import is_bare
from llmctl.artifacts.with_adapters import read_model
from llmctl.config import MIXED, ModelConfig, QuantizeConfig, WeightsConfig
from llmctl.errors import UsageError
from llmctl.formats.artifact import Artifact
from llmctl.formats.gguf.write import check_kind
from llmctl.formats.quantization import HEAD, TOKEN_TABLES, packable_modules
from llmctl.metrics.gate import parse_gate
from llmctl.model.parameters import count
from llmctl.quant.methods import AnyScheme
from llmctl.quant.schemes import GROUPS, SCALE_BITS, SCHEMES, Scheme
from llmctl.quantizing.bit_allocation import parse_size
from llmctl.quantizing.gguf_plan import find_gguf_type, planned_blocks
from llmctl.training.settings import check_shared, lr_for_size
from llmctl.training.task_choice import choose_task

SMALL_GROUPS = (*GROUPS, 16, 8)
REFERENCE_LR, REFERENCE_PARAMETERS = 5e-5, 1e6
SMALLEST_LR, LARGEST_LR = 1e-6, 1e-3
"""Peak learning rate of trained weights, falling with the square root of the model size (learned)."""

SCALES_LR, SCALES_BITS = 1e-3, 4
"""Peak learning rate of scales, which are trained as logarithms: a relative change. With each additional bit the same relative
change moves the outermost codes by twice as many steps, so the rate is halved."""

DEFAULT_STEPS = 200
"""Steps of `learned` without a budget."""

OUTSIDE = ("head_dense", "classifier_dense")
"""Dense layers between the blocks and a head, which get the head's scheme."""


def settle(config: QuantizeConfig) -> QuantizeConfig:
    """Fill in what the model decides, so that the run's recipe states it.

    Raises: NotFoundError or ArtifactError for a missing or damaged model.
    """
    artifact = read_model(Path(config.model))
    model, train, weights, loss = artifact.config, config.train, config.weights, config.loss
    task = choose_task(config, artifact)
    method = weights.method
    if method == "auto":
        scheme = SCHEMES[weights.scheme]
        if weights.gguf:
            weights = replace(weights, gguf=find_gguf_type(weights.gguf))
        # Activation quantization needs calibration data anyway.
        wide = scheme.bits == 8 and not (
            scheme.activations or weights.target_bpw or weights.target_size or weights.gguf
        )
        method = "nearest" if wide else "guided"
    bare = has_only_states(artifact)
    loss = replace(
        loss,
        name=("none" if bare else "fkl") if loss.name == "auto" else loss.name,
        match=("hidden" if bare else "none") if loss.match == "auto" else loss.match,
        temperature=loss.temperature or 1.0,
        match_layer=loss.match_layer or (model.n_decoder_layers or model.n_layers),
        relation_heads=loss.relation_heads or model.n_heads,
    )
    if method == "learned" and not (train.steps or train.tokens or train.minutes or train.epochs):
        train = replace(train, steps=DEFAULT_STEPS)
    if method == "learned":  # codes are rounded from the weights, which must stay in float32
        train = replace(
            train, master_weights=False, metric=train.metric or ("kl" if loss.name != "none" and task == "text" else "")
        )
    train = replace(train, seq_len=min(train.seq_len, model.max_positions))
    # Metrics should show the error of the codes, not of bfloat16 matmuls.
    if method != "learned" and train.dtype == "auto":
        train = replace(train, dtype="float32")
    teacher = config.teacher
    if teacher.dtype == "auto":  # the differences to learn are smaller than bfloat16's rounding of the weights
        teacher = replace(teacher, dtype="float32")
    optim = config.optim
    if not optim.lr:
        # Of blocks, every layer's own bits count: they may be mixed.
        bits = SCALES_BITS if weights.gguf else SCHEMES[weights.scheme].bits
        scales_lr = SCALES_LR * 2.0 ** min(0, SCALES_BITS - bits)
        weights_lr = lr_for_size(count(model), REFERENCE_LR, REFERENCE_PARAMETERS, SMALLEST_LR, LARGEST_LR)
        optim = replace(optim, lr=float(f"{scales_lr:.2g}") if weights.learn == "scales" else weights_lr)
    weights = replace(weights, method=method)
    return replace(config, task=task, teacher=teacher, loss=loss, train=train, optim=optim, weights=weights)


def check_quantize(config: QuantizeConfig) -> None:
    """Refuse settings that contradict each other or do not fit the model.

    Raises: UsageError listing all of them.
    """
    if config.max_drop:
        parse_gate(config.max_drop)
    artifact = read_model(Path(config.model))
    if artifact.schemes:
        bits = ", ".join(sorted({str(scheme.bits) for scheme in artifact.schemes.values()}))
        raise UsageError(f"`{config.model}` is already quantized ({bits} bits)", "pass the original model")
    weights = config.weights
    what = "has no prediction head" if is_bare(artifact) else f"is {kind_of(artifact.config)}"
    check_shared(
        config,
        (
            weights.calibration_rows < 1,
            f"`weights.calibration_rows` is {weights.calibration_rows}, it must be at least 1",
        ),
        (
            weights.learn == "weights" and weights.method != "learned",
            f"`weights.learn` needs `weights.method` learned, not {weights.method}",
        ),
        (
            weights.scale_bits not in (0, 8, SCALE_BITS),
            f"`weights.scale_bits` is {weights.scale_bits}, it must be 0, 8 or {SCALE_BITS}",
        ),
        (
            weights.scale_bits == 8 and not SCHEMES[weights.scheme].group,
            f"`weights.scale_bits` 8 needs a scheme with groups, {weights.scheme} has one scale per output",
        ),
        (weights.group < -1, f"`weights.group` is {weights.group}, it must be -1, 0 or more"),
        (weights.target_bpw < 0, f"`weights.target_bpw` is {weights.target_bpw}, it is negative"),
        (
            bool(weights.target_bpw and weights.target_size),
            "`weights.target_bpw` and `weights.target_size` exclude each other",
        ),
        (
            bool(weights.target_bpw or weights.target_size) and bool(SCHEMES[weights.scheme].activations),
            "targets allocate bits of weights only: not with w8a8",
        ),
        (
            weights.method == "learned" and bool(SCHEMES[weights.scheme].activations),
            "`weights.method` learned trains weights only: not with w8a8",
        ),
        (
            has_only_states(artifact) and not is_bare(artifact) and config.loss.name != "none",
            f"`loss.name` {config.loss.name} needs token predictions, `{config.model}` {what}: use none",
        ),
        (
            bool(weights.gguf) and method_is_ours(weights),
            f"a GGUF file is not made with the method {weights.method}: nearest, clip, weighted, gptq, guided or learned",
        ),
        (
            bool(weights.gguf) and weights.learn == "weights",
            "`weights.learn` weights is for our own schemes: of a GGUF file `learned` trains the scales under fixed codes",
        ),
        (
            (weights.gguf == MIXED) != bool(weights.gguf and weights.target_size),
            "the GGUF type mixed needs `weights.target_size`, and no other type takes it",
        ),
        (
            bool(weights.gguf) and bool(weights.target_bpw or weights.keep),
            "a GGUF file takes no `weights.target_bpw` and no `weights.keep`",
        ),
        (config.loss.name == "seq", "`loss.name` seq is for `llmctl distill`"),
        (bool(config.teacher.cache), "`teacher.cache` is for `llmctl distill`"),
        (config.loss.on_policy > 0, "`loss.on_policy` is for `llmctl distill`"),
    )
    if weights.target_size:
        parse_size(weights.target_size)
    if weights.gguf:
        check_kind(artifact.config, artifact.architecture, Path(config.model))
    find_plan(artifact.config, config)
    if not config.data.paths and config.task != "text":
        raise needs_data(Path(config.model), artifact.config, config.task)


def method_is_ours(weights: WeightsConfig) -> bool:
    """Tell whether a method works only on our own schemes."""
    return weights.method in ("hqq", "awq", "awq-gptq")


def has_only_states(artifact: Artifact) -> bool:
    """Tell whether a model is compared by its hidden states: it predicts neither words nor labels of whole texts."""
    config = artifact.config
    return is_bare(artifact) or (config.n_labels > 0 and config.head != "text")


def other_groups(model: ModelConfig, plan: Mapping[str, AnyScheme], config: QuantizeConfig) -> list[str]:
    """Return a line for every size of rows that the scheme's groups do not divide: what was taken instead."""
    wanted = SCHEMES[config.weights.scheme].group
    if config.weights.group >= 0 or not wanted or config.weights.gguf:  # the export tells it of a GGUF file
        return []
    modules = packable_modules(model)
    found: dict[tuple[int, int], int] = {}
    for name, scheme in plan.items():
        n_in = modules[name][1]
        if name not in (*TOKEN_TABLES, HEAD, *OUTSIDE) and scheme.group != wanted:
            found[n_in, scheme.group] = found.get((n_in, scheme.group), 0) + 1
    return [
        f"{count} layers have {n_in} inputs, which groups of {wanted} do not divide: "
        + (f"groups of {group}" if group else "one scale a row")
        for (n_in, group), count in found.items()
    ]


def find_plan(model: ModelConfig, config: QuantizeConfig) -> dict[str, AnyScheme]:
    """Return the scheme of every module to quantize, before bits are allocated.

    Raises: UsageError as `plan_of`.
    """
    if not config.weights.gguf:
        return dict(plan_of(model, config))
    plan = planned_blocks(model, config.weights.gguf)
    if not plan:
        raise UsageError(
            "no matrix of the model has rows that divide into blocks of 32 weights: nothing can be quantized",
            f"`llmctl export {config.model} --to gguf` writes it in 16 bits",
        )
    return dict(plan)


def plan_of(model: ModelConfig, config: QuantizeConfig) -> dict[str, Scheme]:
    """Return our scheme of every module to quantize; a tied head is quantized with the embedding.

    Raises: UsageError for a group size that does not divide a layer's inputs, or if nothing is left to quantize.
    """
    weights = config.weights
    scheme = SCHEMES[weights.scheme]
    if weights.group >= 0:
        scheme = replace(scheme, group=weights.group)
    table = None if weights.embedding == "float" else SCHEMES[weights.embedding]
    if weights.scale_bits:
        scheme = replace(scheme, scale_bits=weights.scale_bits)
        table = table and replace(table, scale_bits=weights.scale_bits if table.group else SCALE_BITS)
    plan: dict[str, Scheme] = {}
    modules = packable_modules(model)
    for name, (_, n_in) in modules.items():
        if name == "classifier" or any(fnmatchcase(name, pattern) for pattern in weights.keep):
            continue
        is_table = name in (*TOKEN_TABLES, HEAD, *OUTSIDE)
        wanted = table if is_table else scheme
        if wanted is None:
            continue
        if not wanted.fits(n_in):
            if weights.group >= 0 and not is_table:
                fitting = ", ".join(str(size) for size in SMALL_GROUPS if n_in % size == 0) or "0"
                raise UsageError(
                    f"groups of {weights.group} do not divide the {n_in} inputs of `{name}`", f"--group {fitting}"
                )
            wanted = replace(
                wanted, group=next((size for size in SMALL_GROUPS if size < wanted.group and n_in % size == 0), 0)
            )
        plan[name] = wanted
    if not plan:
        raise UsageError("nothing is left to quantize", "weights.keep names all modules")
    return plan
