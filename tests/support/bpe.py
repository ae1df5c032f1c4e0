"""A small byte-level BPE tokenizer with any known pre-tokenizer, trained on the spot."""

import json

import pytest

from llmctl.tokenizer.pre_tokenizers import BYTE_LEVEL, PRE_TOKENIZERS

TEXTS = ["the cat sat on the mat, 0123456789 times.\n  猫坐在垫子上，看着窗外的雨。\n"] * 30


def byte_level(pre="gpt-2", **changes):
    """Return a byte-level BPE tokenizer.json with a special token, one that is text, and a hole."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    content = json.loads(tokenizer.to_str())
    row = PRE_TOKENIZERS[pre]
    content |= {"pre_tokenizer": row.steps, "normalizer": row.normalizer, "decoder": BYTE_LEVEL}
    content["model"]["ignore_merges"] = row.ignore_merges
    plain = content["added_tokens"][0]
    content["model"]["vocab"]["<think>"] = 302
    content["added_tokens"].append(plain | {"id": 302, "content": "<think>", "special": False})
    return {"tokenizer.json": json.dumps(content | changes).encode()}
