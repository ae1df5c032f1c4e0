"""Names of dtypes: the long ones of PyTorch, and short ones that are understood wherever a dtype is named."""

SHORT_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64", "half": "float16"}


def full_name(name: str) -> str:
    """Return PyTorch's name of a dtype that may be given by its short one."""
    return SHORT_NAMES.get(name, name)
