"""Every setting as a field of a frozen dataclass, with its default and a one-line description.

Config is plain data: it never builds, imports or mutates anything. Each component reads its own section.
A YAML key is the dotted path of a field (`train.batch_size`), an environment variable is `LLMCTL_TRAIN_BATCH_SIZE`,
and `--set train.batch_size=8` is the flag.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llmctl.quant.schemes import SCHEMES, weight_schemes
from llmctl.tables.backends import BACKENDS
from llmctl.tables.losses import ACROSS, DIVERGENCES, OTHER_LOSSES
from llmctl.tables.methods import LEARNED, METHODS
from llmctl.tables.objectives import OBJECTIVES
from llmctl.tables.optimizers import OPTIMIZERS, SCHEDULES
from llmctl.tables.preferences import PREFERENCES
from llmctl.tables.tasks import measured_tasks, taught_tasks, trained_tasks

Family = Literal["decoder", "encoder", "encoder_decoder"]
Problem = Literal["single", "multi", "regression"]
Head = Literal["text", "tokens", "span"]


def setting(default: Any, meaning: str) -> Any:
    """Declare a field with its default and the one-line description that `--print-config` shows."""
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": meaning})
    return field(default=default, metadata={"help": meaning})


def choice(
    default: str, meaning: str, *tables: Mapping[str, Any] | tuple[str, ...] | Callable[[], tuple[str, ...]]
) -> Any:
    """Declare a field that names a row of a table; the names are read when a config is loaded or shown."""

    def names() -> tuple[str, ...]:
        return tuple(name for table in tables for name in (table() if callable(table) else table))

    return field(default=default, metadata={"help": meaning, "choices": names})


def listed(default: tuple[str, ...], meaning: str) -> Any:
    """Declare a list-of-names field, which may also be written as one comma-separated string."""
    return field(default=default, metadata={"help": meaning, "commas": True})


def section(kind: type, meaning: str) -> Any:
    """Declare a nested config section."""
    return field(default_factory=kind, metadata={"help": meaning})


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of any supported Transformer: decoder, encoder or encoder-decoder.

    The defaults reproduce `LlamaForCausalLM` (pre-norm, RMSNorm, rotary positions, gated SiLU, no biases).
    """

    family: Family = setting("decoder", "decoder, encoder, or encoder_decoder")
    vocab_size: int = setting(0, "rows of the embedding table; 0: the tokenizer's size")
    source_vocab_size: int = setting(
        0, "rows of an encoder_decoder's own table of source tokens (Marian with two vocabularies); 0: it has none"
    )
    d_model: int = setting(256, "width of the residual stream")
    n_layers: int = setting(4, "blocks of the decoder or encoder (of an encoder_decoder: the encoder)")
    n_decoder_layers: int = setting(0, "decoder blocks of an encoder_decoder; 0: n_layers")
    n_heads: int = setting(4, "query heads")
    n_kv_heads: int = setting(0, "key/value heads (grouped-query attention); 0: n_heads")
    head_dim: int = setting(0, "width of one head; 0: d_model / n_heads")
    d_ff: int = setting(0, "width of the feed-forward layer; 0: 4 d_model, or 8/3 d_model rounded to 64 if gated")
    max_positions: int = setting(1024, "maximum sequence length in tokens")
    norm: Literal["rmsnorm", "layernorm"] = setting("rmsnorm", "rmsnorm or layernorm")
    norm_position: Literal["pre", "post", "output", "both"] = setting(
        "pre",
        "pre: x + f(norm(x)); post: norm(x + f(x)) (arXiv:1706.03762); output: x + norm(f(x)) (OLMo 2); "
        "both: x + norm(f(norm(x))) (Gemma 2)",
    )
    norm_eps: float = setting(1e-5, "epsilon of the norms")
    norm_weight: bool = setting(True, "scale in the norms (OLMo 1: none)")
    norm_bias: bool = setting(True, "bias in layernorm (ModernBERT, Cohere: none)")
    first_norm: bool = setting(True, "norm before the first attention of a pre-norm model (ModernBERT: none)")
    parallel: Literal["none", "shared", "separate"] = setting(
        "none",
        "attention and feed-forward side by side: shared: x + attention(norm(x)) + mlp(norm(x)) (GPT-J); "
        "separate: each with a norm of its own (GPT-NeoX)",
    )
    residual_scale: float = setting(
        1.0, "factor on what attention and feed-forward add to the residual stream (Granite)"
    )
    embedding_norm: bool = setting(False, "normalize the embeddings (BERT, BART)")
    positions: Literal["rope", "learned", "sinusoidal", "relative", "alibi", "disentangled", "none"] = setting(
        "rope", "position encoding: rope, learned, sinusoidal, relative, alibi, disentangled (DeBERTa), or none"
    )
    rope_theta: float = setting(10000.0, "base of the rotary frequencies")
    rope_thetas: tuple[float, ...] = setting(
        (), "rotary bases, cycled over the layers; 0: no rotation (SmolLM3); empty: rope_theta"
    )
    rotary_dim: int = setting(0, "channels of a head that are rotated (GPT-NeoX, Phi); 0: all")
    rope_scaling: Literal["none", "linear", "llama3", "yarn", "longrope"] = setting(
        "none", "scaling of the rotary frequencies for longer contexts"
    )
    rope_scaling_layers: Literal["all", "full"] = setting(
        "all", "layers whose rotary frequencies are scaled: all, or full: those without a window (Gemma 3, OLMo 3)"
    )
    rope_scaling_values: tuple[float, ...] = setting((), "numbers of rope_scaling, see model/positions.py")
    alibi_scale: float = setting(1.0, "factor on the slopes of alibi (Falcon-RW: head_dim ** -0.5)")
    sinusoid_rates: Literal["interleaved", "halves"] = setting(
        "interleaved", "rates of sinusoidal positions: as in arXiv:1706.03762, or fairseq's (M2M-100)"
    )
    position_offset: int = setting(0, "rows skipped at the start of the position table (BART: 2)")
    relative_bias: bool = setting(False, "relative position bias in addition to other positions (MPNet)")
    relative_bias_per_layer: bool = setting(False, "a relative position bias for every layer (UMT5)")
    n_relative_buckets: int = setting(32, "buckets of relative positions (T5; DeBERTa: both directions)")
    max_relative_distance: int = setting(
        128, "distance in tokens beyond which all positions share the last bucket (T5, DeBERTa)"
    )
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = setting(
        "silu", "feed-forward activation: silu, gelu, gelu_tanh, relu, or relu2 (squared, arXiv:2109.08668)"
    )
    gated: bool = setting(True, "gated feed-forward: down(act(gate(x)) * up(x))")
    n_experts: int = setting(0, "experts of a feed-forward layer (Qwen3-MoE), each of width d_ff; 0: no mixture")
    n_active_experts: int = setting(2, "experts that transform a token, those of the highest probability")
    normalized_experts: bool = setting(True, "divide the probabilities of a token's experts by their sum")
    attention_bias: bool = setting(False, "bias in the attention projections")
    attention_output_bias: Literal["same", "yes", "no"] = setting(
        "same", "bias in the output projection of attention: same as attention_bias, yes, or no (Qwen2)"
    )
    mlp_bias: bool = setting(False, "bias in the feed-forward projections")
    mlp_output_bias: Literal["same", "yes", "no"] = setting(
        "same", "bias in the down projection: same as mlp_bias, yes (GTE), or no"
    )
    qk_norm: bool = setting(False, "RMSNorm on the queries and keys (Qwen3)")
    qk_norm_kind: Literal["head", "width", "rotated"] = setting(
        "head",
        "qk_norm over: head: each head; width: all heads (OLMo 2); rotated: each head, after rotation (Hunyuan)",
    )
    attention_softcap: float = setting(0.0, "attention scores become c tanh(score / c) (Gemma 2); 0: off")
    attention_scale: float = setting(0.0, "factor on the attention scores; 0: head_dim ** -0.5 (T5: 1)")
    attention_windows: tuple[int, ...] = setting(
        (), "sliding-window sizes in tokens, cycled over the layers; 0: full attention"
    )
    query_layer: bool = setting(False, "add a top layer whose queries are position embeddings (PanGu-Alpha)")
    n_token_types: int = setting(0, "rows of the token-type embedding (BERT: 2); 0: none")
    d_embedding: int = setting(0, "width of the embeddings, projected to d_model (ALBERT, ELECTRA); 0: d_model")
    share_layers: bool = setting(False, "all layers of an encoder share their weights (ALBERT)")
    embedding_scale: float = setting(1.0, "factor on the token embeddings; 0: sqrt(d_model) (arXiv:1706.03762)")
    tie_embeddings: bool = setting(True, "the output head shares the embedding weight")
    logits_scale: float = setting(1.0, "factor on the hidden states before the head (tied T5: d_model ** -0.5)")
    logits_softcap: float = setting(0.0, "logits become c tanh(logit / c) (Gemma 2); 0: off")
    logits_bias: bool = setting(False, "bias on the logits (BERT, BART, Marian)")
    head_transform: bool = setting(False, "dense + activation + norm before the head (BERT)")
    head_transform_bias: bool = setting(True, "bias in the dense layer of head_transform (ModernBERT: none)")
    n_labels: int = setting(0, "outputs of a classification head; 0: a language-model head over the vocabulary")
    head: Head = setting(
        "text",
        "what the outputs of a classification head are of: text: all of it; tokens: each one (named entities); span: "
        "each one, as the start and the end of an answer",
    )
    problem: Problem = setting(
        "single", "classification: single (one label), multi (several labels), or regression (numbers)"
    )
    pooling: Literal["first", "mean", "last"] = setting(
        "mean", "hidden state to classify: the first token's, the mean, or the last token's"
    )
    pooled_activation: Literal["none", "tanh", "gelu", "relu"] = setting(
        "none",
        "activation of a dense layer before the classification head, whose outputs then have a bias; none: no layer",
    )
    labels: tuple[str, ...] = setting((), "label names in output order")
    architecture: str = setting("", "published architecture to be written as, if it can hold the model")
    dropout: float = setting(0.0, "dropout after the embeddings, attention and feed-forward")
    init_std: float = setting(0.02, "standard deviation of the initial weights")
    pad_id: int = setting(-1, "padding token; -1: none")
    bos_id: int = setting(-1, "beginning-of-text token; -1: none")
    eos_id: int = setting(-1, "end-of-text token; -1: none")
    mask_id: int = setting(-1, "mask token; -1: none")
    decoder_start_id: int = setting(-1, "first decoder token of an encoder_decoder; -1: none")


@dataclass(frozen=True)
class ModelChoice:
    """The model to train: a preset or a model folder, and fields of ModelConfig that override it."""

    preset: str = setting("auto", "preset name, model folder or file to continue from, or auto")
    overrides: Mapping[str, Any] = setting({}, "model config fields that override the preset")


@dataclass(frozen=True)
class TokenizerConfig:
    """An existing tokenizer, or how to train one."""

    path: str = setting("", "existing tokenizer (file or folder); empty: train one on the corpus")
    model_type: Literal["bpe", "unigram", "char"] = setting("bpe", "bpe, unigram, or char (one token per character)")
    vocab_size: int = setting(
        0, "vocabulary size with special and byte tokens; 0: 2,048 to 32,768 depending on the amount of text"
    )
    n_sentinels: int = setting(0, "sentinel tokens <extra_id_i> (span corruption)")
    character_coverage: float = setting(
        0.9995, "fraction of the characters covered by the vocabulary; the rest becomes bytes"
    )
    max_train_bytes: int = setting(50_000_000, "maximum bytes of text to train on; a larger corpus is sampled evenly")


@dataclass(frozen=True)
class DataConfig:
    """Data sources, train/validation split and masking."""

    paths: tuple[str, ...] = setting((), "files, folders, globs or `-` (stdin); empty: the built-in corpus")
    text_key: str = setting("text", "text field of jsonl, csv and parquet rows")
    source_key: str = setting("source", "input field of a pair (seq2seq)")
    target_key: str = setting("target", "target field of a pair (seq2seq)")
    split: Literal["file", "line", "blank"] = setting(
        "file", "document boundary in .txt files: file, line, or blank line"
    )
    val_paths: tuple[str, ...] = setting((), "validation data; empty: split off val_frac of the data")
    val_frac: float = setting(0.05, "fraction of the documents held out for validation")
    val_tail: bool = setting(False, "hold out the end of the text instead of random documents")
    isolate: bool = setting(True, "prevent attention across documents packed into one row")
    mask_frac: float = setting(0.15, "fraction of the tokens to predict (mlm) or remove (span)")
    whole_word: bool = setting(False, "mask whole words instead of single tokens (mlm)")
    mean_span_tokens: float = setting(3.0, "mean length of a removed span in tokens (span)")
    workers: int = setting(0, "tokenizer processes; 0: one per core")


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: str = choice("muon", "optimizer; muon: adamw for what is no hidden matrix", OPTIMIZERS)
    lr: float = setting(3e-3, "peak learning rate of adamw")
    muon_lr: float = setting(0.02, "peak learning rate of muon")
    weight_decay: float = setting(0.1, "decoupled weight decay of the weight matrices")
    beta1: float = setting(0.9, "adamw: decay of the first moment")
    beta2: float = setting(0.95, "adamw: decay of the second moment")
    eps: float = setting(1e-8, "adamw: epsilon")
    momentum: float = setting(0.95, "muon: momentum")
    schedule: str = choice("wsd", "learning-rate schedule; wsd: warmup, stable, decay", SCHEDULES)
    warmup_frac: float = setting(0.02, "fraction of the steps with linear warmup")
    decay_frac: float = setting(0.5, "fraction of the steps with decay (wsd)")
    min_lr_frac: float = setting(0.0, "final learning rate as a fraction of the peak")
    layer_decay: float = setting(1.0, "layer-wise decay: learning rate of a layer relative to the layer above it")
    clip_norm: float = setting(1.0, "maximum gradient norm; 0: no clipping")


@dataclass(frozen=True)
class TrainConfig:
    """The training loop: budget, batch size, precision, intervals, and handling of divergence."""

    steps: int = setting(0, "budget in optimizer steps; 0: none")
    tokens: int = setting(0, "budget in training tokens; 0: none")
    epochs: float = setting(0.0, "budget in passes over the training rows; 0: none")
    minutes: float = setting(0.0, "budget in minutes of wall time; 0: none")
    limit_minutes: float = setting(
        0.0,
        "save and exit with code 75 before this many minutes (batch jobs); 0: the Slurm limit, if any",
    )
    batch_size: int = setting(8, "rows per optimizer step, over all processes")
    micro_batch_size: int = setting(0, "rows per forward pass; 0: the whole batch, -1: as many as fit in memory")
    seq_len: int = setting(256, "tokens per row")
    seed: int = setting(0, "seed for weights, data order and masking")
    dtype: str = choice(
        "auto",
        "compute precision; auto: bfloat16 where the hardware is fast at it, else float32",
        ("auto", "float32", "bfloat16", "float64"),
    )
    master_weights: bool = setting(
        True, "keep float32 master weights next to bfloat16 weights (bfloat16 in one process on a CPU)"
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "device to train on; auto: cuda if available")
    threads: int = setting(0, "CPU threads per process; 0: the cores divided by the processes on this machine")
    return_memory: bool = setting(
        False,
        "return freed memory to the system at once; peak memory then matches --dry-run, but steps are slower (CPU)",
    )
    compile: bool = setting(False, "compile the model with torch.compile")
    loss_chunk_tokens: int = setting(512, "tokens per chunk of logits; less saves memory")
    eval_every: int = setting(0, "steps between evaluations; 0: a tenth of the steps")
    eval_tokens: int = setting(65536, "validation tokens per evaluation; the final evaluation uses all")
    save_every: int = setting(0, "steps between checkpoints; 0: at every evaluation")
    save_minutes: float = setting(15.0, "maximum minutes between checkpoints; 0: no maximum")
    keep_checkpoints: int = setting(2, "number of newest checkpoints to keep in addition to the best")
    log_every: int = setting(10, "steps between entries in metrics.jsonl")
    track: tuple[str, ...] = listed((), "experiment trackers: tensorboard, trackio, wandb, ...")
    max_bad_steps: int = setting(20, "consecutive steps with a non-finite loss or gradient that count as divergence")
    on_divergence: Literal["stop", "rollback"] = setting(
        "stop",
        "stop: exit with code 6; rollback: return to the last checkpoint with a lower learning rate and other data",
    )
    rollback_lr_frac: float = setting(0.5, "factor on the learning rate after a rollback")
    max_rollbacks: int = setting(3, "rollbacks before the run stops")
    patience: int = setting(0, "early stopping: evaluations without improvement before training ends; 0: off")
    metric: str = setting(
        "", "validation metric that selects the best checkpoint, such as loss, accuracy, bleu; empty: the task's own"
    )
    ema: float = setting(
        0.0, "decay of a moving average of the weights, evaluated at the end and kept if it is better; 0: none"
    )
    average_frac: float = setting(
        0.0, "last fraction of the steps whose weights are averaged, evaluated at the end and kept if better; 0: none"
    )
    label_smoothing: float = setting(0.0, "probability mass spread evenly over all labels (arXiv:1512.00567)")
    freeze: tuple[str, ...] = listed(
        (), "parameters to freeze: embeddings, layers.0-3, or name patterns such as model.encoder.*"
    )
    skip_spikes: bool = setting(False, "skip steps whose loss or gradient norm is 6 standard deviations above the mean")
    sample_prompts: tuple[str, ...] = setting(
        (), "prompts to generate samples from at every evaluation; empty: the objective's own"
    )


@dataclass(frozen=True)
class ParallelConfig:
    """Training one model in several processes."""

    strategy: Literal["ddp", "fsdp"] = setting(
        "ddp", "ddp: a full replica per process; fsdp: shard weights, gradients and optimizer state"
    )
    deterministic: bool = setting(
        False, "bit-identical weights for any number of processes that divides gradient_chunks"
    )
    gradient_chunks: int = setting(4, "chunks of a batch whose gradients are summed as a binary tree (deterministic)")
    timeout_seconds: int = setting(600, "timeout in seconds when waiting for another process")
    activation_checkpointing: bool = setting(False, "recompute activations in the backward pass to save memory")
    cpu_offload: bool = setting(False, "keep sharded weights and optimizer state in CPU memory (fsdp)")


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of `llmctl pretrain`."""

    objective: str = choice("clm", "pretraining objective", OBJECTIVES)
    model: ModelChoice = section(ModelChoice, "model")
    tokenizer: TokenizerConfig = section(TokenizerConfig, "tokenizer")
    data: DataConfig = section(DataConfig, "data")
    optim: OptimConfig = section(OptimConfig, "optimizer")
    train: TrainConfig = section(TrainConfig, "training loop")
    parallel: ParallelConfig = section(ParallelConfig, "multi-process training")


@dataclass(frozen=True)
class ColumnsConfig:
    """Columns of a table by role; an empty name tries the usual ones (`text`, `sentence`, `label`, ...)."""

    names: tuple[str, ...] = listed((), "column names, in order, for a table without a header")
    text: str = setting("", "text column (classify, text, mask, lastword)")
    pair: str = setting("", "column of the second text in a pair (classify, similarity)")
    label: str = setting("", "label or score column (classify, similarity)")
    source: str = setting("", "input column (translate, summarize)")
    target: str = setting("", "target column (translate, summarize)")
    question: str = setting("", "question column (qa)")
    context: str = setting("", "column of the passage that contains the answer (qa)")
    answer: str = setting("", "answer column (qa)")
    tokens: str = setting("", "column with the list of words (tokens)")
    tags: str = setting("", "column with the list of their tags (tokens)")
    messages: str = setting("", "column with the list of messages (chat)")


@dataclass(frozen=True)
class AdapterConfig:
    """A low-rank adapter on frozen weights (LoRA, arXiv:2106.09685; DoRA, arXiv:2402.09353)."""

    rank: int = setting(16, "rank of the adapter")
    alpha: float = setting(32.0, "scaling: the low-rank product is multiplied by alpha / rank")
    dropout: float = setting(0.0, "dropout on the adapter input")
    targets: tuple[str, ...] = listed(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "linear layers to adapt; names the model does not have are ignored",
    )


@dataclass(frozen=True)
class FinetuneDataConfig(DataConfig):
    """Examples and how they are packed; the raw-text keys apply to `task: text` only."""

    pack: Literal["auto", "always", "never"] = setting(
        "auto", "pack several isolated examples into a row (decoders); auto: if enough rows remain"
    )
    too_long: Literal["cut", "drop", "refuse"] = setting(
        "cut", "examples longer than train.seq_len: cut, drop, or refuse; every case is reported"
    )
    strict: bool = setting(
        False, "fail if the data has problems (duplicates, leaks, ...) instead of only reporting them"
    )
    logprobs: bool = setting(
        True, "chat: learn the probabilities of rows that have `logprobs` of a server, not only their text"
    )


@dataclass(frozen=True)
class FinetuneOptimConfig(OptimConfig):
    """Optimizer and learning-rate schedule for fine-tuning."""

    name: str = choice("adamw", "optimizer; muon: adamw for what is no hidden matrix", OPTIMIZERS)
    lr: float = setting(0.0, "peak learning rate of adamw; 0: chosen by method and model size")
    weight_decay: float = setting(0.01, "decoupled weight decay of the weight matrices")
    beta2: float = setting(0.999, "adamw: decay of the second moment")
    schedule: str = choice("linear", "learning-rate schedule; wsd: warmup, stable, decay", SCHEDULES)
    warmup_frac: float = setting(0.06, "fraction of the steps with linear warmup")


@dataclass(frozen=True)
class FinetuneTrainConfig(TrainConfig):
    """The training loop with the defaults of fine-tuning."""

    batch_size: int = setting(16, "rows per optimizer step, over all processes")
    seq_len: int = setting(512, "maximum tokens per row; capped at the context length of the model")


@dataclass(frozen=True)
class TaskConfig:
    """The task an existing model is trained on, and how its examples are read."""

    task: str = choice("chat", "task", trained_tasks)
    model: str = setting("", "model to fine-tune: a folder, a file or a run")
    problem: Literal["auto", "single", "multi", "regression"] = setting(
        "auto", "classify: single (one label), multi (several labels), or regression; auto: inferred from the data"
    )
    labels: tuple[str, ...] = listed(
        (), "classify: labels in output order, or a file with one label per line; empty: those in the data"
    )
    template: str = setting("", "prompt template with {column} placeholders; empty: the task's own")
    system: str = setting("", "chat: system message for conversations without one")
    answers: Literal["all", "last"] = setting("all", "chat: answers of a conversation to train: all, or the last one")
    columns: ColumnsConfig = section(ColumnsConfig, "columns of the data")
    data: FinetuneDataConfig = section(FinetuneDataConfig, "examples")
    optim: FinetuneOptimConfig = section(FinetuneOptimConfig, "optimizer")
    train: FinetuneTrainConfig = section(FinetuneTrainConfig, "training loop")
    parallel: ParallelConfig = section(ParallelConfig, "multi-process training")


@dataclass(frozen=True)
class PreferenceConfig:
    """The loss of `task: prefer`."""

    loss: str = choice("dpo", "loss", PREFERENCES)
    beta: float = setting(0.0, "strength of the preference against the reference; 0: 0.1, or 2 for simpo")
    label_smoothing: float = setting(0.0, "probability that a preference is wrong (dpo, simpo)")
    sft_weight: float = setting(
        0.0, "weight of the cross-entropy of the chosen answer per token, added to the loss (dpo, ipo, simpo)"
    )
    gamma: float = setting(1.0, "margin between the mean log probabilities, times beta (simpo)")
    desirable_weight: float = setting(1.0, "weight of desirable answers (kto)")
    undesirable_weight: float = setting(1.0, "weight of undesirable answers (kto)")


@dataclass(frozen=True)
class FinetuneConfig(TaskConfig):
    """Settings of `llmctl finetune`."""

    method: Literal["full", "lora", "dora", "qlora", "qdora"] = setting(
        "full",
        "full: train all weights; lora, dora: train an adapter (a quantized base stays quantized); qlora, qdora: quantize "
        "the base to 4 bits first",
    )
    pooling: Literal["auto", "first", "mean", "last"] = setting(
        "auto", "classify: hidden state to classify; auto: as in the published classifier of the model family"
    )
    qat: str = choice(
        "", "quantization-aware training with this scheme's rounding; writes a quantized model", ("",), weight_schemes
    )
    merge: bool = setting(False, "merge the adapter into the weights and write the full model")
    adapter: AdapterConfig = section(AdapterConfig, "adapter (lora, dora, qlora, qdora)")
    preference: PreferenceConfig = section(PreferenceConfig, "loss on preferences (prefer)")


@dataclass(frozen=True)
class StudentConfig:
    """The architecture and the initial weights of the student."""

    shape: str = setting(
        "50%", "percentage of the teacher's parameters, layers=6,dim=512,heads=8,ffn=1408, or an existing model"
    )
    init: Literal["auto", "prune", "random"] = setting(
        "auto", "prune: from the pruned teacher; random: random weights; auto: prune"
    )
    tokenizer: str = setting(
        "",
        "tokenizer of a new student: a file, a folder, or a model; empty: the teacher's (with prune: its rows are combined)",
    )
    pick: Literal["auto", "greedy", "influence", "uniform"] = setting(
        "auto", "layers to keep: greedy (by measured loss), influence (by block influence), or uniform (evenly spaced)"
    )
    calibration_rows: int = setting(32, "training rows used to rank layers, heads and units")
    refit_tokens: int = setting(
        32_768,
        "training tokens used to refit the output projections after pruning; 0: skip the refit",
    )


@dataclass(frozen=True)
class DistillLossConfig:
    """What the student learns from the teacher."""

    name: str = choice(
        "auto",
        "divergence between student and teacher; seq: train on texts generated by the teacher; none: only loss.match; "
        "auto: fkl, or none if the teacher has no prediction head (sentence encoders)",
        ("auto",),
        DIVERGENCES,
        OTHER_LOSSES,
    )
    across: str = choice(
        "project",
        "loss from a teacher with another tokenizer: project (loss.name over the student's tokens), alm (likelihoods of "
        "chunks), or uld (sorted probabilities)",
        ACROSS,
    )
    temperature: float = setting(0.0, "temperature of student and teacher; 0: 1, or 2 for mlm and labels")
    weight: float = setting(1.0, "weight of the divergence; the rest is cross-entropy on the data")
    beta: float = setting(0.5, "weight of the teacher in the mixture (jsd)")
    skew: float = setting(0.1, "weight of the other distribution in the mixture (skl, srkl)")
    head_mass: float = setting(0.5, "cumulative teacher probability that counts as the head (akl)")
    taid_start: float = setting(0.4, "weight of the teacher in the target at the first step (taid)")
    match: Literal["auto", "none", "hidden", "relation"] = setting(
        "auto",
        "additional loss on hidden (last hidden states) or relation (attention relations of a layer); auto: relation for encoders",
    )
    match_weight: float = setting(1.0, "weight of the match loss")
    match_layer: int = setting(0, "teacher layer whose relations are matched, from 1; 0: the last")
    relation_heads: int = setting(0, "heads the relations are split into; 0: the teacher's")
    on_policy: float = setting(0.0, "fraction of the batches generated by the student (decoders; arXiv:2306.13649)")
    on_policy_tokens: int = setting(64, "maximum tokens the student generates per row")


@dataclass(frozen=True)
class TeacherConfig:
    """How the teacher is run, or the cache of its outputs."""

    more: tuple[str, ...] = listed((), "further teachers with the same vocabulary; probabilities are averaged")
    dtype: str = choice(
        "auto", "precision of the teacher's weights; auto: train.dtype", ("auto", "float32", "bfloat16", "int8")
    )
    backend: str = choice(
        "auto",
        "what runs the teacher: native, transformers (any of its language models), or auto: transformers for "
        "architectures that llmctl does not read",
        BACKENDS,
    )
    cache: str = setting("", "folder written by `llmctl distill cache`, used instead of the teacher")
    kind: Literal["sampled", "topk", "hidden"] = setting(
        "sampled", "what a cache stores: sampled tokens, top-k tokens and the remaining mass, or hidden states"
    )
    draws: int = setting(32, "samples per token (sampled)")
    top_k: int = setting(64, "most likely tokens stored per token (topk)")
    beams: int = setting(4, "beam width of an encoder-decoder teacher (seq); 1: greedy")
    max_tokens: int = setting(128, "maximum tokens per generated text (seq)")


@dataclass(frozen=True)
class ServerConfig:
    """A teacher behind a server with OpenAI's protocol, and which of its answers are kept."""

    model: str = setting("", "name of the model at the server; the teacher is then its address, http://HOST/v1")
    api: Literal["auto", "chat", "completions"] = setting(
        "auto", "chat or completions; auto: chat, and completions for rows with `text`"
    )
    answers: int = setting(1, "answers per prompt")
    keep: Literal["all", "best", "pairs"] = setting(
        "all",
        "answers to keep of a prompt: all, the one with the best mean logprob, or pairs: the best and the worst one as a "
        "preference (task prefer)",
    )
    temperature: float = setting(1.0, "sampling temperature")
    top_p: float = setting(1.0, "nucleus sampling; 1: off")
    max_tokens: int = setting(512, "maximum tokens per answer")
    seed: int = setting(0, "seed of the first answer to a prompt")
    keep_thinking: bool = setting(False, "keep what a model thinks before it answers, as <think>...</think>")
    keep_truncated: bool = setting(False, "keep answers that end at max_tokens")
    min_chars: int = setting(1, "shortest answer to keep, in characters")
    pattern: str = setting("", "regular expression that an answer must contain")
    top_logprobs: int = setting(
        0, "alternatives per token to ask for, up to 20: the student learns their probabilities"
    )
    concurrency: int = setting(8, "requests at a time")
    requests_per_minute: float = setting(0.0, "rate limit; 0: none")
    timeout_seconds: float = setting(60.0, "longest time for one request")
    retries: int = setting(6, "further attempts of a request that failed")
    backoff_seconds: float = setting(0.5, "wait before the second attempt, doubled each time")
    max_tokens_total: int = setting(
        0, "tokens, as counted by the server, after which nothing more is asked; 0: no limit"
    )
    max_failed_frac: float = setting(0.05, "fraction of failed requests that ends the run")
    cache: str = setting("", "folder of responses that several runs share; empty: with the answers")


@dataclass(frozen=True)
class DistillOptimConfig(OptimConfig):
    """Optimizer and learning-rate schedule for distillation."""

    name: str = choice("adamw", "optimizer; muon: adamw for what is no hidden matrix", OPTIMIZERS)
    lr: float = setting(0.0, "peak learning rate of adamw; 0: chosen by student size")
    schedule: str = choice("cosine", "learning-rate schedule; wsd: warmup, stable, decay", SCHEDULES)
    warmup_frac: float = setting(0.05, "fraction of the steps with linear warmup")


@dataclass(frozen=True)
class DistillTrainConfig(FinetuneTrainConfig):
    """The training loop with the defaults of distillation."""

    seq_len: int = setting(256, "maximum tokens per row; capped at the context length of the models")
    loss_chunk_tokens: int = setting(256, "tokens per chunk of logits; less saves memory")


@dataclass(frozen=True)
class BaselineConfig:
    """The same architecture trained from scratch on the same data, for comparison."""

    enabled: bool = setting(False, "also train the baseline")
    lr_factors: tuple[float, ...] = setting(
        (0.2, 0.6, 2.0), "learning rates to try, as multiples of the student's; the best result is reported"
    )
    compute: bool = setting(True, "also train one for more steps, to the same compute as student plus teacher")


@dataclass(frozen=True)
class TaughtConfig(TaskConfig):
    """Settings shared by the commands that derive a model from another (distill, quantize)."""

    task: str = choice("auto", "task; auto: the task the teacher was trained for", ("auto",), taught_tasks)
    model: str = setting("", "teacher: a folder, a file or a run")
    loss: DistillLossConfig = section(DistillLossConfig, "loss between student and teacher")
    teacher: TeacherConfig = section(TeacherConfig, "teacher")
    max_drop: str = setting(
        "", "gate: maximum loss of quality against the teacher, 0.05 or 5%; exceeding it exits with code 10"
    )
    optim: DistillOptimConfig = section(DistillOptimConfig, "optimizer")  # type: ignore[assignment]
    train: DistillTrainConfig = section(DistillTrainConfig, "training loop")


@dataclass(frozen=True)
class DistillConfig(TaughtConfig):
    """Settings of `llmctl distill`."""

    student: StudentConfig = section(StudentConfig, "student")
    stages: int = setting(0, "pruning stages; 0: two if less than 45% of the teacher remains, else one")
    baseline: BaselineConfig = section(BaselineConfig, "the same architecture trained from scratch")
    server: ServerConfig = section(ServerConfig, "teacher behind a server")


EMBEDDINGS = ("int8", "int6", "int5", "int4", "int3", "float")
"""Schemes of embedding and output head."""

MIXED = "mixed"
"""The GGUF type of a file whose types are chosen tensor by tensor."""


@dataclass(frozen=True)
class WeightsConfig:
    """The quantization scheme and the method that chooses codes and scales."""

    scheme: str = choice("int8", "quantization scheme; w8a8: 8-bit activations too; int4-sym: no zero points", SCHEMES)
    group: int = setting(
        -1,
        "group size: inputs that share a scale; 0: the whole row; -1: the scheme's, or the next smaller size that divides a layer's inputs",
    )
    scale_bits: int = setting(
        0, "bits per scale: 16 (readable by other tools), or 8 (multiples of a power of two per row); 0: the scheme's"
    )
    method: str = choice(
        "auto",
        "quantization method; auto: nearest for int8, else guided (gptq with Fisher-weighted errors and refit scales); "
        "learned: trained to reproduce the original model's outputs",
        ("auto",),
        METHODS,
        (LEARNED,),
    )
    learn: Literal["scales", "weights"] = setting(
        "scales",
        "what `learned` trains: scales (codes stay fixed), or weights (codes and scales)",
    )
    embedding: str = choice("int8", "scheme of embedding and output head; float: 16 bits", EMBEDDINGS)
    gguf: str = setting(
        "",
        "GGUF type, such as q4_K: write a GGUF file whose blocks are chosen by `method`; mixed: types chosen by target_size",
    )
    target_bpw: float = setting(
        0.0, "mean bits per weight of the blocks, scales included, to allocate over the layers; 0: off"
    )
    target_size: str = setting("", "model size, such as 60MB, within which bits are allocated over the layers")
    keep: tuple[str, ...] = listed((), "modules to leave unquantized, by name patterns such as model.layers.0.*")
    calibration_rows: int = setting(128, "training rows used for calibration")
    report_tokens: int = setting(
        4096, "validation tokens, in evenly spaced rows, of the report before and after; 0, and for learned: all"
    )


@dataclass(frozen=True)
class QuantizeTrainConfig(DistillTrainConfig):
    """Calibration rows, and the training loop of `weights.method: learned`."""

    batch_size: int = setting(8, "rows per optimizer step, over all processes (learned)")
    steps: int = setting(0, "budget in optimizer steps; 0: none (learned)")


@dataclass(frozen=True)
class QuantizeOptimConfig(DistillOptimConfig):
    """Optimizer and learning-rate schedule of `weights.method: learned`."""

    lr: float = setting(0.0, "peak learning rate of adamw; 0: chosen by what is trained and by model size")
    weight_decay: float = setting(0.0, "decoupled weight decay of the weight matrices")


@dataclass(frozen=True)
class QuantizeConfig(TaughtConfig):
    """Settings of `llmctl quantize`."""

    model: str = setting("", "model to quantize: a folder, a file or a run")
    weights: WeightsConfig = section(WeightsConfig, "quantization scheme and method")
    optim: QuantizeOptimConfig = section(QuantizeOptimConfig, "optimizer (learned)")
    train: QuantizeTrainConfig = section(QuantizeTrainConfig, "calibration rows, and the training loop (learned)")


LEVERS = ("vocabulary", "depth", "width", "bits")
"""What a compression can reduce."""


@dataclass(frozen=True)
class PlanConfig:
    """How the plan of a compression is found."""

    trials: int = setting(3, "plans that are pruned, refit and quantized without training, to choose the one to train")
    measure_tokens: int = setting(4096, "validation tokens on which plans are compared")
    calibration_rows: int = setting(16, "training rows on which sensitivities are measured and trials are quantized")
    refit_tokens: int = setting(4096, "training tokens used to refit output projections in measurements and trials")
    written_tokens: int = setting(65_536, "tokens that a decoder generates if no data is given")
    train_frac: float = setting(0.6, "fraction of the training budget for a pruned model before it is quantized")


@dataclass(frozen=True)
class CompressConfig(TaughtConfig):
    """Settings of `llmctl compress`."""

    model: str = setting("", "model to compress: a folder, a file or a run")
    size: str = setting("", "size of the file, such as 30MB")
    format: Literal["single", "gguf", "hf", "onnx"] = setting(
        "single",
        "single: a quantized model.safetensors; gguf: a GGUF file; hf: 16-bit weights, not quantized; onnx: an 8-bit ONNX "
        "file of an encoder",
    )
    keep: tuple[str, ...] = listed((), "what stays as it is: vocabulary, depth, width, bits")
    plan: PlanConfig = section(PlanConfig, "search of the plan")
    student: StudentConfig = section(StudentConfig, "pruning; the plan sets `shape`")
    weights: WeightsConfig = section(WeightsConfig, "quantization; the plan sets scheme, embedding and target_size")


TRAINING: dict[str, type] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "distill": DistillConfig,
    "quantize": QuantizeConfig,
    "compress": CompressConfig,
}
"""The config class of each command that makes a model."""


@dataclass(frozen=True)
class GenerateConfig:
    """Sampling and decoding."""

    max_tokens: int = setting(128, "maximum new tokens")
    temperature: float = setting(0.8, "sampling temperature; 0: greedy")
    top_k: int = setting(0, "sample from the k most likely tokens; 0: off")
    top_p: float = setting(1.0, "sample from the smallest set of tokens with this cumulative probability; 1: off")
    min_p: float = setting(0.0, "drop tokens below this fraction of the top token's probability; 0: off")
    repetition_penalty: float = setting(1.0, "penalize tokens that occurred before (CTRL, arXiv:1909.05858); 1: off")
    stop: tuple[str, ...] = setting((), "strings that end generation; not part of the output")
    seed: int = setting(0, "sampling seed; every prompt has its own random stream")
    beams: int = setting(1, "beam width of an encoder_decoder; 1: off")
    length_penalty: float = setting(1.0, "exponent: beam scores are divided by length ** length_penalty")
    batch_size: int = setting(16, "prompts decoded together")
    kv: str = setting("float", "KV cache: float (the model's precision) or int8")


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of `llmctl evaluate`."""

    task: str = choice("auto", "task to measure; auto: the task of the first model", ("auto",), measured_tasks)
    data: tuple[str, ...] = setting((), "files, folders or globs; empty: the built-in corpus (text, mask)")
    columns: ColumnsConfig = section(ColumnsConfig, "columns of tables")
    labels: str = setting("", "file with one label per line; empty: the model's labels (classify)")
    split: Literal["file", "line", "blank"] = setting(
        "file", "document boundary in .txt files: file, line, or blank line (text, mask)"
    )
    limit: int = setting(0, "maximum rows or text windows; 0: all")
    metric: str = setting("", "metric that --max-drop compares and the table shows first; empty: the task's own")
    batch_size: int = setting(16, "rows per forward pass; does not change the metrics")
    seq_len: int = setting(0, "maximum tokens per row or text window; 0: the model's context length")
    stride: int = setting(0, "tokens between the starts of text windows; 0: the window length (text)")
    seed: int = setting(0, "seed for masking (mask)")
    mask_frac: float = setting(0.15, "fraction of masked tokens (mask)")
    pooling: Literal["auto", "mean", "first", "last"] = setting(
        "auto", "hidden state that represents a text; auto: the model's own, else mean (similarity)"
    )
    template: str = setting(
        "", "prompt template with {source}, {question}, ...; empty: the model's own, else the task's"
    )
    beams: int = setting(1, "beam width; 1: greedy (translate, summarize, qa)")
    max_tokens: int = setting(128, "maximum tokens per answer (translate, summarize, qa)")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "device; auto: cuda if available")
    dtype: str = choice(
        "auto", "precision; auto: float32 on a CPU, bfloat16 on a GPU", ("auto", "float32", "bfloat16", "float16")
    )
    backend: str = choice(
        "auto",
        "what runs the models: native, transformers (any of its language models), or auto: transformers for "
        "architectures that llmctl does not read",
        BACKENDS,
    )
