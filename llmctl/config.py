"""Every setting once: frozen dataclasses, one default and one line of meaning per field.

Config is data. It never builds, imports or mutates; whoever builds a thing reads its section from here.
A YAML key is the dotted path of a field (`train.batch_size`), an environment variable is `LLMCTL_TRAIN_BATCH_SIZE`,
and `--set train.batch_size=8` is the flag.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Family = Literal["decoder", "encoder", "encoder_decoder"]
ObjectiveName = Literal["clm", "mlm", "span", "seq2seq"]
TaskName = Literal["chat", "text", "classify", "translate", "summarize", "qa"]
Problem = Literal["single", "multi", "regression"]


def setting(default: Any, meaning: str) -> Any:
    """Declare a field with its default and its one line of meaning, which `--print-config` shows."""
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": meaning})
    return field(default=default, metadata={"help": meaning})


def listed(default: tuple[str, ...], meaning: str) -> Any:
    """Declare a field of names, which may also be written as one text with commas between them."""
    return field(default=default, metadata={"help": meaning, "commas": True})


def section(kind: type, meaning: str) -> Any:
    """Declare a field that is itself a config section."""
    return field(default_factory=kind, metadata={"help": meaning})


@dataclass(frozen=True)
class ModelConfig:
    """The family tree of Transformers in one record; every combination that makes sense builds one model.

    The defaults are the maths of `LlamaForCausalLM` (pre-norm, RMSNorm, rotary positions, gated SiLU, no biases).
    """

    family: Family = setting("decoder", "decoder, encoder, or encoder_decoder")
    vocab_size: int = setting(0, "rows of the embedding table; 0 takes the tokenizer's size")
    d_model: int = setting(256, "width of the residual stream")
    n_layers: int = setting(4, "blocks in the decoder or encoder stack (encoder side of an encoder_decoder)")
    n_decoder_layers: int = setting(0, "blocks in the decoder of an encoder_decoder; 0 means as many as n_layers")
    n_heads: int = setting(4, "query heads")
    n_kv_heads: int = setting(0, "key/value heads (grouped-query attention); 0 means n_heads")
    head_dim: int = setting(0, "width of one head; 0 means d_model / n_heads")
    d_ff: int = setting(0, "width of the feed-forward layer; 0 means 4 d_model, or 8/3 d_model rounded to 64 if gated")
    max_positions: int = setting(1024, "longest sequence the model is built for, in tokens")
    norm: Literal["rmsnorm", "layernorm"] = setting("rmsnorm", "rmsnorm or layernorm")
    norm_position: Literal["pre", "post"] = setting("pre", "pre: x + f(norm(x)); post: norm(x + f(x)), as in 2017")
    norm_eps: float = setting(1e-5, "epsilon inside the norms")
    embedding_norm: bool = setting(False, "norm right after the embeddings (BERT, BART)")
    positions: Literal["rope", "learned", "sinusoidal", "relative", "none"] = setting("rope", "position scheme")
    rope_theta: float = setting(10000.0, "base of the rotary frequencies")
    position_offset: int = setting(0, "rows skipped in the learned position table (BART: 2)")
    n_relative_buckets: int = setting(32, "buckets of the relative position bias (T5)")
    max_relative_distance: int = setting(128, "distance, in tokens, from which the last relative bucket is shared (T5)")
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = setting("silu", "feed-forward activation")
    gated: bool = setting(True, "gated feed-forward: down(act(gate(x)) * up(x))")
    attention_bias: bool = setting(False, "bias in the attention projections")
    mlp_bias: bool = setting(False, "bias in the feed-forward projections")
    qk_norm: bool = setting(False, "RMSNorm of queries and keys per head (Qwen3)")
    attention_scale: float = setting(0.0, "factor on the attention scores; 0 means head_dim ** -0.5 (T5: 1)")
    attention_windows: tuple[int, ...] = setting(
        (), "per-layer attention width in tokens, repeated over the layers; 0 is full"
    )
    query_layer: bool = setting(False, "extra top layer whose queries are position embeddings (PanGu-Alpha)")
    n_token_types: int = setting(0, "rows of the token-type embedding (BERT: 2); 0 is none")
    embedding_scale: float = setting(1.0, "factor on the token embeddings; 0 means sqrt(d_model), as in 2017")
    tie_embeddings: bool = setting(True, "the head shares the embedding's weight")
    logits_scale: float = setting(1.0, "factor on the hidden states before the head (tied T5: d_model ** -0.5)")
    logits_bias: bool = setting(False, "bias on the logits (BERT, BART, Marian)")
    head_transform: bool = setting(False, "dense + activation + norm before the head (BERT)")
    n_labels: int = setting(0, "outputs of a classification head in place of the vocabulary's; 0 is the vocabulary's")
    problem: Problem = setting("single", "what the outputs are: one label of many, several labels, or numbers")
    pooling: Literal["first", "mean", "last"] = setting(
        "mean", "which hidden state is classified: the first token's, the mean, or the last token's"
    )
    pooled_activation: Literal["none", "tanh", "gelu"] = setting(
        "none", "dense layer with this activation between the pooled state and the outputs, which then have a bias"
    )
    labels: tuple[str, ...] = setting((), "names of the outputs, in their order")
    dropout: float = setting(0.0, "dropout in embeddings, attention output and feed-forward output")
    init_std: float = setting(0.02, "standard deviation of the initial weights")
    pad_id: int = setting(-1, "padding token; -1 is none")
    bos_id: int = setting(-1, "beginning-of-text token; -1 is none")
    eos_id: int = setting(-1, "end-of-text token; -1 is none")
    mask_id: int = setting(-1, "mask token; -1 is none")
    decoder_start_id: int = setting(-1, "first token of the decoder in an encoder_decoder; -1 is none")


@dataclass(frozen=True)
class ModelChoice:
    """Which model to train: a preset's name or a model folder, and fields of ModelConfig that replace its own."""

    preset: str = setting("auto", "a preset's name, a model folder or file to go on from, or auto")
    overrides: Mapping[str, Any] = setting({}, "fields of the model configuration that replace the preset's")


@dataclass(frozen=True)
class TokenizerConfig:
    """How a tokenizer is trained when none is given."""

    path: str = setting("", "an existing tokenizer (file or folder); empty trains one on the corpus")
    model_type: Literal["bpe", "unigram", "char"] = setting("bpe", "bpe, unigram, or char (one token per character)")
    vocab_size: int = setting(0, "pieces, specials and bytes included; 0 fits it to the text: 2,048 up to 32,768")
    n_sentinels: int = setting(0, "sentinel tokens <extra_id_i> for span corruption")
    character_coverage: float = setting(0.9995, "share of the corpus's characters that get a piece; the rest is bytes")
    max_train_bytes: int = setting(50_000_000, "text the trainer samples at most, in bytes; more is sampled evenly")


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it is laid out."""

    paths: tuple[str, ...] = setting((), "files, folders, globs or `-`; empty is the embedded default corpus")
    text_key: str = setting("text", "field of jsonl, csv and parquet rows that holds the text")
    source_key: str = setting("source", "field that holds the input of a pair (seq2seq)")
    target_key: str = setting("target", "field that holds the output of a pair (seq2seq)")
    split: Literal["file", "line", "blank"] = setting(
        "file", "what one document of a .txt is: the file, a line, or a paragraph"
    )
    val_paths: tuple[str, ...] = setting((), "data that is held out; empty holds out a share of the paths")
    val_frac: float = setting(0.05, "share of the documents held out for evaluation")
    val_tail: bool = setting(False, "hold out the last part of the text instead of drawn documents")
    isolate: bool = setting(True, "a document never attends into its neighbor in a packed row")
    mask_frac: float = setting(0.15, "share of the tokens that are predicted (mlm) or removed (span)")
    whole_word: bool = setting(False, "mask all pieces of a word together (mlm)")
    mean_span_tokens: float = setting(3.0, "mean length of a removed span, in tokens (span)")
    workers: int = setting(0, "processes that encode text; 0 means one per core")


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "muon"] = setting("muon", "adamw, or muon for the matrices with adamw for the rest")
    lr: float = setting(3e-3, "peak learning rate of adamw")
    muon_lr: float = setting(0.02, "peak learning rate of muon")
    weight_decay: float = setting(0.1, "decoupled weight decay of the matrices")
    beta1: float = setting(0.9, "adamw's first moment decay")
    beta2: float = setting(0.95, "adamw's second moment decay")
    eps: float = setting(1e-8, "adamw's epsilon")
    momentum: float = setting(0.95, "muon's momentum")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = setting(
        "wsd", "shape of the learning rate over the steps"
    )
    warmup_frac: float = setting(0.02, "share of the steps that warm up linearly")
    decay_frac: float = setting(0.5, "share of the steps that decay (wsd)")
    min_lr_frac: float = setting(0.0, "final learning rate as a share of the peak")
    layer_decay: float = setting(1.0, "factor on the learning rate of each layer below the one above it")
    clip_norm: float = setting(1.0, "largest gradient norm; 0 is no clipping")


@dataclass(frozen=True)
class TrainConfig:
    """The loop: budget, batch, precision, intervals, and what happens when something goes wrong."""

    steps: int = setting(0, "optimizer steps; 0 takes the other budgets")
    tokens: int = setting(0, "budget in trained tokens; 0 is none")
    epochs: float = setting(0.0, "budget in passes over the training rows; 0 is none")
    minutes: float = setting(0.0, "budget in minutes of wall time; 0 is none")
    limit_minutes: float = setting(
        0.0,
        "save and end with exit code 75 before this many minutes, as a batch job must; 0 is Slurm's own limit or none",
    )
    batch_size: int = setting(8, "rows per optimizer step, over all processes")
    micro_batch_size: int = setting(0, "rows per forward pass; 0 means no accumulation, -1 what fits into the memory")
    seq_len: int = setting(256, "tokens per row")
    seed: int = setting(0, "seed of weights, data order and masking")
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = setting(
        "auto", "precision of the products; auto is bfloat16 where it is fast"
    )
    master_weights: bool = setting(
        True, "bfloat16 in one process on a CPU: weights in bfloat16 beside a float32 master that takes the updates"
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to train")
    threads: int = setting(0, "processor threads per process; 0 shares the cores among the processes of a machine")
    return_memory: bool = setting(
        False, "give freed memory back to the system at once: a step takes what --dry-run says, and longer (CPU)"
    )
    compile: bool = setting(False, "compile the model with torch.compile")
    loss_chunk_tokens: int = setting(512, "tokens whose logits exist at the same time")
    eval_every: int = setting(0, "steps between evaluations; 0 means a tenth of the steps")
    eval_tokens: int = setting(65536, "held-out tokens per evaluation during training; the final one uses all")
    save_every: int = setting(0, "steps between checkpoints; 0 means at every evaluation")
    save_minutes: float = setting(15.0, "minutes after which a checkpoint is saved in any case; 0 is never")
    keep_checkpoints: int = setting(2, "newest checkpoints kept beside the best")
    log_every: int = setting(10, "steps between lines of metrics.jsonl")
    track: tuple[str, ...] = listed((), "trackers besides metrics.jsonl: tensorboard, trackio, wandb, ...")
    max_bad_steps: int = setting(20, "steps in a row without a finite loss and gradient after which training diverged")
    on_divergence: Literal["stop", "rollback"] = setting(
        "stop", "stop with exit code 6, or go back to the last checkpoint with a smaller learning rate and other data"
    )
    rollback_lr_frac: float = setting(0.5, "factor on the learning rate after a rollback")
    max_rollbacks: int = setting(3, "rollbacks after which a run stops all the same")
    patience: int = setting(0, "evaluations in a row without a better one after which training ends; 0 is never")
    metric: str = setting(
        "", "held-out figure by which the best step is chosen, such as loss, accuracy, bleu; empty is the task's own"
    )
    label_smoothing: float = setting(0.0, "probability taken from each label and spread over all (arXiv:1512.00567)")
    freeze: tuple[str, ...] = listed(
        (), "parameters that are not trained: embeddings, layers.0-3, or patterns of names such as model.encoder.*"
    )
    skip_spikes: bool = setting(False, "take no step whose loss or gradient stands out by 6 deviations")
    sample_prompts: tuple[str, ...] = setting(
        (), "prompts continued at every evaluation; empty takes the objective's own"
    )


@dataclass(frozen=True)
class ParallelConfig:
    """How several processes train one model; one process needs none of it."""

    strategy: Literal["ddp", "fsdp"] = setting(
        "ddp", "ddp: every process holds the model; fsdp: weights, gradients and optimizer state are shared out"
    )
    deterministic: bool = setting(
        False, "the same weights, bit for bit, on any number of processes that divides gradient_chunks"
    )
    gradient_chunks: int = setting(4, "parts of a batch whose gradients are summed as a binary tree (deterministic)")
    timeout_seconds: int = setting(600, "longest wait for another process")
    activation_checkpointing: bool = setting(False, "compute activations again in the backward pass to save memory")
    cpu_offload: bool = setting(False, "keep sharded weights and optimizer state in main memory (fsdp)")


@dataclass(frozen=True)
class PretrainConfig:
    """Everything `llmctl pretrain` reads."""

    objective: ObjectiveName = setting("clm", "clm next token, mlm masked tokens, span T5 spans, seq2seq pairs")
    model: ModelChoice = section(ModelChoice, "the model")
    tokenizer: TokenizerConfig = section(TokenizerConfig, "the tokenizer")
    data: DataConfig = section(DataConfig, "the text")
    optim: OptimConfig = section(OptimConfig, "the optimizer")
    train: TrainConfig = section(TrainConfig, "the loop")
    parallel: ParallelConfig = section(ParallelConfig, "several processes")


@dataclass(frozen=True)
class ColumnsConfig:
    """Which column of a table holds what; an empty name finds the usual ones (`text`, `sentence`, `label`, ...)."""

    names: tuple[str, ...] = listed((), "column names, in order, of a table whose first line is no header")
    text: str = setting("", "column of the text (classify, text, mask, lastword)")
    pair: str = setting("", "column of the second text of a pair (classify, similarity)")
    label: str = setting("", "column of the label or number (classify, similarity)")
    source: str = setting("", "column of the input (translate, summarize)")
    target: str = setting("", "column of the wanted output (translate, summarize)")
    question: str = setting("", "column of the question (qa)")
    context: str = setting("", "column of the text that answers it (qa)")
    answer: str = setting("", "column of the answer (qa)")
    messages: str = setting("", "column of the list of messages (chat)")


@dataclass(frozen=True)
class AdapterConfig:
    """A low-rank adapter beside frozen weights (LoRA, arXiv:2106.09685; DoRA, arXiv:2402.09353)."""

    rank: int = setting(16, "rank of the two factors")
    alpha: float = setting(32.0, "scale: the product of the factors is multiplied by alpha / rank")
    dropout: float = setting(0.0, "dropout before the first factor")
    targets: tuple[str, ...] = listed(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "linear layers that get one; those that a model does not have are passed over",
    )


@dataclass(frozen=True)
class FinetuneDataConfig(DataConfig):
    """Where the examples come from and how they are laid out; the keys for raw text matter to `task: text` only."""

    pack: Literal["auto", "always", "never"] = setting(
        "auto", "several examples in a row, isolated from each other (decoders); auto: if that leaves enough rows"
    )
    too_long: Literal["cut", "drop", "refuse"] = setting(
        "cut", "what happens to an example of more than train.seq_len tokens; it is counted and said in any case"
    )
    strict: bool = setting(False, "end with an error where the data has findings that would otherwise be said")


@dataclass(frozen=True)
class FinetuneOptimConfig(OptimConfig):
    """Optimizer and learning-rate schedule of a model that knows something already."""

    name: Literal["adamw", "muon"] = setting("adamw", "adamw, or muon for the matrices with adamw for the rest")
    lr: float = setting(0.0, "peak learning rate of adamw; 0 takes one by method and size of the model")
    weight_decay: float = setting(0.01, "decoupled weight decay of the matrices")
    beta2: float = setting(0.999, "adamw's second moment decay")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = setting(
        "linear", "shape of the learning rate over the steps"
    )
    warmup_frac: float = setting(0.06, "share of the steps that warm up linearly")


@dataclass(frozen=True)
class FinetuneTrainConfig(TrainConfig):
    """The loop, with the budget and batch of fine-tuning."""

    batch_size: int = setting(16, "rows per optimizer step, over all processes")
    seq_len: int = setting(512, "tokens per row at most; a model with a shorter context takes its own")


@dataclass(frozen=True)
class TaskConfig:
    """What a model that is there is trained on: a task, and how its examples are read."""

    task: TaskName = setting("chat", "chat, text, classify, translate, summarize or qa")
    model: str = setting("", "the model to adapt: a folder, a file or a run")
    problem: Literal["auto", "single", "multi", "regression"] = setting(
        "auto", "classify: one label per row, several, or a number; auto sees it in the data"
    )
    labels: tuple[str, ...] = listed(
        (), "classify: the labels in their order, or one file that lists them; empty takes those of the data"
    )
    template: str = setting("", "what the model is given, with {column} for a column; empty takes the task's own")
    system: str = setting("", "chat: a system message for conversations without one")
    columns: ColumnsConfig = section(ColumnsConfig, "the columns of the data")
    data: FinetuneDataConfig = section(FinetuneDataConfig, "the examples")
    optim: FinetuneOptimConfig = section(FinetuneOptimConfig, "the optimizer")
    train: FinetuneTrainConfig = section(FinetuneTrainConfig, "the loop")
    parallel: ParallelConfig = section(ParallelConfig, "several processes")


@dataclass(frozen=True)
class FinetuneConfig(TaskConfig):
    """Everything `llmctl finetune` reads."""

    method: Literal["full", "lora", "dora", "qlora", "qdora"] = setting(
        "full",
        "train all weights, or an adapter beside frozen ones; those of a base in few bits stay in them; qlora, qdora: of "
        "another base they are rounded to 4 bits before",
    )
    pooling: Literal["auto", "first", "mean", "last"] = setting(
        "auto", "classify: the state under the head; auto is what the model's published classifier takes"
    )
    qat: Literal["", "int8", "int6", "int5", "int4", "int4-sym", "int3", "int2"] = setting(
        "", "train through the rounding of this scheme, and write the model in few bits (quantization-aware training)"
    )
    merge: bool = setting(False, "write the whole model with the adapter in its weights, not the adapter")
    adapter: AdapterConfig = section(AdapterConfig, "the adapter (lora, dora, qlora, qdora)")


@dataclass(frozen=True)
class StudentConfig:
    """What the student looks like, and where its first weights come from."""

    shape: str = setting(
        "50%", "share of the teacher's parameters, or layers=6,dim=512,heads=8,ffn=1408, or a model that is there"
    )
    init: Literal["auto", "prune", "random"] = setting(
        "auto", "prune: cut out of the teacher; random: fresh weights; auto: prune"
    )
    pick: Literal["auto", "greedy", "influence", "uniform"] = setting(
        "auto", "how the layers that stay are chosen: by measured loss, by block influence, or evenly spaced"
    )
    calibration_rows: int = setting(32, "training rows on which layers, heads and units are ranked")
    refit_tokens: int = setting(
        32_768,
        "training tokens on which, after the cut, the maps into the stream are solved for so that they make up for what is "
        "gone; 0 leaves them as they were cut",
    )


@dataclass(frozen=True)
class DistillLossConfig:
    """What of the teacher the student learns."""

    name: Literal["auto", "fkl", "rkl", "jsd", "skl", "srkl", "akl", "taid", "tvd", "seq", "none"] = setting(
        "auto",
        "divergence of the student's predictions from the teacher's; seq: learn the texts that the teacher writes; none: only "
        "what is matched; auto: fkl, or none where the teacher predicts nothing (sentence encoders)",
    )
    temperature: float = setting(0.0, "temperature of both sides; 0 takes 1, for mlm and labels 2")
    weight: float = setting(1.0, "share of the divergence; the rest is cross-entropy with the data")
    beta: float = setting(0.5, "weight of the teacher in the mixture (jsd)")
    skew: float = setting(0.1, "share of the other side in the mixture (skl, srkl)")
    head_mass: float = setting(0.5, "teacher's probability that counts as the head (akl)")
    taid_start: float = setting(0.4, "share of the teacher in the target at the first step (taid)")
    match: Literal["auto", "none", "hidden", "relation"] = setting(
        "auto",
        "matched besides: the last hidden states, or the attention relations of a layer; auto: relation for encoders",
    )
    match_weight: float = setting(1.0, "factor on what is matched")
    match_layer: int = setting(0, "teacher's layer whose relations are matched, from 1; 0 is the last")
    relation_heads: int = setting(0, "heads that relations are split into; 0 takes the teacher's")
    on_policy: float = setting(0.0, "share of the batches that the student writes itself (decoders; arXiv:2306.13649)")
    on_policy_tokens: int = setting(64, "tokens that the student writes of a row at most")


@dataclass(frozen=True)
class TeacherConfig:
    """How the teacher is asked."""

    more: tuple[str, ...] = listed((), "further teachers of the same vocabulary; their probabilities are averaged")
    dtype: Literal["auto", "fp32", "bf16", "int8"] = setting(
        "auto", "its weights in memory; auto: as training computes"
    )
    cache: str = setting("", "folder of signals that `llmctl distill cache` made, in place of the teacher")
    kind: Literal["sampled", "topk", "hidden"] = setting(
        "sampled", "what a cache keeps: draws, the likeliest tokens and the rest's mass, or hidden states"
    )
    draws: int = setting(32, "draws of each token's distribution (sampled)")
    top_k: int = setting(64, "likeliest tokens (topk)")
    beams: int = setting(4, "beam width of an encoder-decoder that writes (seq); 1 is greedy")
    max_tokens: int = setting(128, "tokens of a text that it writes at most (seq)")


@dataclass(frozen=True)
class DistillOptimConfig(OptimConfig):
    """Optimizer and learning-rate schedule of a student."""

    name: Literal["adamw", "muon"] = setting("adamw", "adamw, or muon for the matrices with adamw for the rest")
    lr: float = setting(0.0, "peak learning rate of adamw; 0 takes one by the student's size")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = setting(
        "cosine", "shape of the learning rate over the steps"
    )
    warmup_frac: float = setting(0.05, "share of the steps that warm up linearly")


@dataclass(frozen=True)
class DistillTrainConfig(FinetuneTrainConfig):
    """The loop, with the rows of distillation."""

    seq_len: int = setting(256, "tokens per row at most; a model with a shorter context takes its own")
    loss_chunk_tokens: int = setting(256, "tokens whose logits exist at the same time")


@dataclass(frozen=True)
class BaselineConfig:
    """The same student from fresh weights on the same data, to hold the distilled one against."""

    enabled: bool = setting(False, "train it too")
    lr_factors: tuple[float, ...] = setting(
        (0.2, 0.6, 2.0), "its learning rates as multiples of the student's; the best one is reported"
    )
    compute: bool = setting(True, "also give it the steps that the teacher's share of the work would have paid for")


@dataclass(frozen=True)
class TaughtConfig(TaskConfig):
    """What commands read that make one model out of another."""

    task: Literal["auto", "chat", "text", "classify", "translate", "summarize", "qa"] = setting(  # type: ignore[assignment]
        "auto", "chat, text, classify, translate, summarize or qa; auto is what the teacher was made for"
    )
    model: str = setting("", "the teacher: a folder, a file or a run")
    loss: DistillLossConfig = section(DistillLossConfig, "what is learned from the teacher")
    teacher: TeacherConfig = section(TeacherConfig, "how the teacher is asked")
    max_drop: str = setting("", "gate: how much worse than the teacher the model may be, 0.05 or 5%; exit code 10")
    optim: DistillOptimConfig = section(DistillOptimConfig, "the optimizer")  # type: ignore[assignment]
    train: DistillTrainConfig = section(DistillTrainConfig, "the loop")


@dataclass(frozen=True)
class DistillConfig(TaughtConfig):
    """Everything `llmctl distill` reads."""

    student: StudentConfig = section(StudentConfig, "the student")
    stages: int = setting(
        0, "steps in which the student is cut; 0: two where more than half of the teacher goes, else one"
    )
    baseline: BaselineConfig = section(BaselineConfig, "the same model from scratch")


@dataclass(frozen=True)
class WeightsConfig:
    """How weights are held in few bits, and how their codes are chosen."""

    scheme: Literal["int8", "w8a8", "int6", "int5", "int4", "int4-sym", "int3", "int2"] = setting(
        "int8", "int8, w8a8 (inputs in eight bits too), int6, int5, int4, int4-sym (no zeros), int3, or int2"
    )
    group: int = setting(
        -1, "inputs that share a scale; 0 is the row; -1 the scheme's, or what divides a layer's inputs"
    )
    scale_bits: int = setting(
        0, "bits of a scale: 16 as other tools read them, or 8, multiples of a power of two by row; 0 is the scheme's"
    )
    method: Literal["auto", "nearest", "clip", "weighted", "hqq", "awq", "gptq", "awq-gptq", "guided", "learned"] = (
        setting(
            "auto",
            "how codes are chosen; auto: nearest for int8, else guided (gptq, each error counted as predictions lose by it, and"
            " refined); learned: trained to say what the model said",
        )
    )
    learn: Literal["scales", "weights"] = setting(
        "scales",
        "what `learned` trains: scales under the codes that were chosen, or the weights behind the codes too",
    )
    embedding: Literal["int8", "int4", "float"] = setting(
        "int8", "embedding and head over the vocabulary: int8, int4, or float (16 bits)"
    )
    target_bpw: float = setting(0.0, "bits per weight of the blocks, scales counted, that layers share out; 0 is off")
    target_size: str = setting("", "size of the whole model, such as 60MB, within which layers share bits out")
    keep: tuple[str, ...] = listed((), "modules that stay as they are, by patterns of names such as model.layers.0.*")
    calibration_rows: int = setting(128, "training rows on which layers are calibrated")


@dataclass(frozen=True)
class QuantizeTrainConfig(DistillTrainConfig):
    """The rows on which codes are chosen, and the loop where they are learned."""

    batch_size: int = setting(8, "rows per optimizer step, over all processes (learned)")
    steps: int = setting(0, "optimizer steps; 0 takes the other budgets (learned)")


@dataclass(frozen=True)
class QuantizeOptimConfig(DistillOptimConfig):
    """Optimizer and learning-rate schedule of codes that are learned."""

    lr: float = setting(0.0, "peak learning rate of adamw; 0 takes one by the model's size")
    weight_decay: float = setting(0.0, "decoupled weight decay of the matrices")


@dataclass(frozen=True)
class QuantizeConfig(TaughtConfig):
    """Everything `llmctl quantize` reads."""

    model: str = setting("", "the model: a folder, a file or a run")
    weights: WeightsConfig = section(WeightsConfig, "the bits")
    optim: QuantizeOptimConfig = section(QuantizeOptimConfig, "the optimizer (learned)")
    train: QuantizeTrainConfig = section(QuantizeTrainConfig, "the rows, and the loop where codes are learned")


TRAINING: dict[str, type] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "distill": DistillConfig,
    "quantize": QuantizeConfig,
}
"""The config of each command that trains."""


@dataclass(frozen=True)
class GenerateConfig:
    """How text is drawn from a model."""

    max_tokens: int = setting(128, "new tokens at most")
    temperature: float = setting(0.8, "0 is greedy")
    top_k: int = setting(0, "keep the k most probable tokens; 0 is off")
    top_p: float = setting(1.0, "keep the smallest set with this probability; 1 is off")
    min_p: float = setting(0.0, "drop tokens below this share of the best one's probability; 0 is off")
    repetition_penalty: float = setting(
        1.0, "divide the logits of tokens seen before (CTRL, arXiv:1909.05858); 1 is off"
    )
    stop: tuple[str, ...] = setting((), "strings that end the text; they are cut off")
    seed: int = setting(0, "seed of the draws; each prompt has its own stream")
    beams: int = setting(1, "beam width of an encoder_decoder; 1 is off")
    length_penalty: float = setting(1.0, "beam scores are divided by length ** this")
    batch_size: int = setting(16, "prompts decoded together")
    kv: str = setting("float", "how keys and values of past tokens are held: float is the model's precision, or int8")


EvaluationName = Literal[
    "auto", "text", "mask", "classify", "similarity", "translate", "summarize", "qa", "choice", "lastword"
]


@dataclass(frozen=True)
class EvaluateConfig:
    """Everything `llmctl evaluate` reads."""

    task: EvaluationName = setting("auto", "what is measured; auto is what the first model is for")
    data: tuple[str, ...] = setting((), "files, folders or globs; empty is the embedded corpus (text, mask)")
    columns: ColumnsConfig = section(ColumnsConfig, "the columns of tables")
    labels: str = setting("", "file with the name of one label per line; empty takes the model's own (classify)")
    split: Literal["file", "line", "blank"] = setting(
        "file", "what one document of a .txt is: the file, a line, or a paragraph (text, mask)"
    )
    limit: int = setting(0, "rows, or windows of text, that are measured at most; 0 is all")
    metric: str = setting("", "figure that --max-drop compares and the table shows first; empty is the task's own")
    batch_size: int = setting(16, "rows per forward pass; changes no figure")
    seq_len: int = setting(0, "longest row, or width of a window of text, in tokens; 0 is the model's context")
    stride: int = setting(0, "tokens from one window of text to the next; 0 is the window's width (text)")
    seed: int = setting(0, "seed of the masks (mask)")
    mask_frac: float = setting(0.15, "share of the tokens that are masked (mask)")
    pooling: Literal["mean", "first", "last"] = setting("mean", "which hidden states stand for a text (similarity)")
    template: str = setting("", "prompt with {source}, {question}, ...; empty is the model's own or the task's")
    beams: int = setting(1, "beam width; 1 is greedy (translate, summarize, qa)")
    max_tokens: int = setting(128, "longest answer, in tokens (translate, summarize, qa)")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "precision; auto is float32 on a CPU, bfloat16 on a GPU"
    )
