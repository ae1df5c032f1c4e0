"""What a training command refuses before torch is imported, which takes seconds: missing files and wrong settings.

The job checks the same again, since it is also run without a command line; nothing here decides anything.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def refuse_missing(paths: Sequence[str]) -> None:
    """Refuse data that does not exist.

    Raises: NotFoundError, UsageError.
    """
    from llmctl.data.pairs import two_files
    from llmctl.data.shards import is_shard_folder
    from llmctl.data.sources import expand

    for path in paths:
        pair = two_files(path) or ()
        if not is_shard_folder(Path(path)):
            expand(pair if any(Path(name).exists() for name in pair) else [path])


def refuse_early(command: str, config: Any) -> None:
    """Refuse the config of a new run.

    Raises: NotFoundError for data, UsageError for settings, and whatever reading the model's header raises.
    """
    from llmctl.distributed.ranks import LAUNCHED

    if LAUNCHED in os.environ:  # the launcher has checked
        return
    refuse_missing([*config.data.paths, *config.data.val_paths])
    if command in CHECKS:  # settings of `quantize` need torch
        CHECKS[command](config)


def check_pretrain(config: Any) -> None:
    """Check the settings of `pretrain`."""
    from llmctl.training.settings import check, with_budget

    check(with_budget(config))


def check_finetune(config: Any) -> None:
    """Check the settings of `finetune`."""
    from llmctl.training.finetune_settings import check, settle

    check(settle(config))


def check_distill(config: Any) -> None:
    """Check the settings of `distill`."""
    from llmctl.distilling.settings import check_distill, settle, student_shape

    settled = settle(config)
    check_distill(settled, student_shape(settled))


CHECKS: dict[str, Callable[[Any], None]] = {
    "pretrain": check_pretrain,
    "finetune": check_finetune,
    "distill": check_distill,
}
