"""The option that is meant: where an error names a config key that an option set, and where an option does not exist."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llmctl.tables.names import closest

SYNONYMS: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("preset", "model-name", "model-name-or-path", "model-path", "base-model", "checkpoint", "ckpt"): ("--model",),
    ("learning-rate", "max-lr", "peak-lr"): ("--lr",),
    ("bs", "train-batch-size", "per-device-train-batch-size", "per-device-batch-size"): ("--batch-size",),
    ("num-epochs", "num-train-epochs", "n-epochs", "max-epochs"): ("--epochs",),
    ("max-steps", "num-steps", "train-steps", "max-iters", "iters", "iterations"): ("--steps",),
    ("max-tokens", "max-new-tokens", "num-tokens", "n-predict", "num-predict"): ("--max-tokens", "--tokens"),
    ("max-length", "max-seq-length", "max-seq-len", "seq-length", "block-size", "context-length", "ctx-size"): (
        "--seq-len",
        "--max-tokens",
    ),
    ("temp",): ("--temperature",),
    ("repeat-penalty",): ("--repetition-penalty",),
    ("num-beams", "beam-size"): ("--beams",),
    ("stop-sequence", "stop-sequences", "stop-token"): ("--stop",),
    ("system-prompt",): ("--system",),
    ("prompt", "input", "text"): ("PROMPT", "TEXT"),
    ("output", "output-dir", "output-path", "outfile", "out-dir", "save-dir", "save-path"): ("--out",),
    ("overwrite", "overwrite-output-dir"): ("--force",),
    ("data", "dataset", "dataset-name", "data-path", "data-dir", "train-file", "train-data", "input", "corpus"): (
        "--data",
        "DATA",
    ),
    ("validation-file", "val-data", "eval-data", "eval-file", "valid"): ("--val",),
    ("calibration-data", "calib-data"): ("--calib",),
    ("random-seed",): ("--seed",),
    ("precision", "torch-dtype"): ("--dtype",),
    ("lora-r", "lora-rank", "r"): ("--rank",),
    ("lora-path", "adapter-path"): ("--adapter",),
    ("load-in-4bit", "w-bit", "wbits", "quant"): ("--bits",),
    ("q-group-size", "group-size", "groupsize"): ("--group",),
    ("tokenizer-path", "tokenizer-name"): ("--tokenizer",),
    ("config", "config-file"): ("--recipe",),
    ("resume-from-checkpoint",): ("--resume",),
    ("report-to",): ("--track",),
    ("nproc-per-node", "num-processes"): ("--nproc",),
}
"""Names that other tools give an option, and ours; a command that has the first has not the others (DATA: an argument)."""


def meant(name: str, options: Collection[str], keys: Collection[str] = ()) -> str:
    """Return what is meant by an option that a command does not have, empty if nothing is close.

    options: those of the command, and its arguments in capitals; keys: the config keys that `--set` sets.
    """
    plain = name.lstrip("-").replace("_", "-").lower()
    if f"--{plain}" in options:
        return f"--{plain}"
    ours = [option for names, found in SYNONYMS.items() if plain in names for option in found if option in options]
    if ours:
        return ours[0]
    setting = next((key for key in keys if key.rpartition(".")[2].replace("_", "-") == plain), "")
    return f"--set {setting}=VALUE" if setting else closest(name, [o for o in options if o.startswith("--")])


def unknown_option(error: Any) -> tuple[str, str]:
    """Return the message and the hint for Click's error about an option that does not exist."""
    context = error.ctx
    command = context.command
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    options |= {p.metavar or p.name.upper() for p in command.params if p.param_type_name == "argument"}
    found = meant(error.option_name, options, getattr(command, "settings", ()))
    what = f"the argument `{found}`" if found.isupper() else f"`{found}`"
    hint = f"did you mean {what}?" if found else f"`{context.command_path} --help` shows the options"
    return f"unknown option `{error.option_name}`", hint


def name_as_typed(text: str, keys: Mapping[str, str], parameters: Sequence[Any], arguments: Sequence[str]) -> str:
    """Name options instead of the config keys that they have set, in the text of an error.

    keys: config keys by parameter; parameters: those of Click that the command line gives; arguments: the command line.
    """
    for parameter in parameters:
        key = keys.get(parameter.name, "")
        # A key without a section is a common word: in backticks it may be the user's value, such as a folder `data`.
        if not key or parameter.param_type_name != "option" or ("." not in key and key in arguments):
            continue
        typed = [option for option in parameter.opts if any(is_given(option, argument) for argument in arguments)]
        option = typed[0] if typed else max(parameter.opts, key=len)
        text = re.sub(rf"`{re.escape(key)}`", f"`{option}`", text)
    return text


def is_given(option: str, argument: str) -> bool:
    """Tell whether an argument is an option: alone, or with its value."""
    if option.startswith("--"):
        return argument == option or argument.startswith(f"{option}=")
    return argument.startswith(option) and not argument.startswith("--")
