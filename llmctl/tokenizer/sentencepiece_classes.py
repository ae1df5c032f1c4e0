"""What the classes of published tokenizers add to their sentencepiece models.

`CLASSES` has a row for each: the names of the tokens before and behind the pieces, what stands around a text, and the
text as the model is to see it. Knows no model and no ids.
"""

import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmctl.errors import ArtifactError
from llmctl.tokenizer.languages import M2M, MBART, MBART_MORE, NLLB, WMT21

CONFIG, VOCABULARY, TARGET_VOCABULARY = "tokenizer_config.json", "vocab.json", "target_vocab.json"
SPIECE, FAIRSEQ, SPM, SOURCE, TARGET = (
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "source.spm",
    "target.spm",
)
MODEL_FILES = (SPIECE, FAIRSEQ, SPM, SOURCE)
"""The sentencepiece models by which a tokenizer is recognized."""

MOST_TOKENS = 10_000
"""Limit for the numbers of extra tokens that a config may ask for."""

Names = tuple[str, ...]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Class:
    """What a tokenizer class adds to a sentencepiece model.

    model: its file; target: the file of another model for targets. first, n_replaced: the names of the first ids, and the
    number of pieces in whose place they stand. last: the names of the tokens behind the pieces. vocabulary: `vocab.json`
    gives the ids of the pieces. roles: pad, unk, bos, eos and mask by name. frame: what stands before a text, between two
    and at the end, as roles, names, or `lang` for the language. language: its default, and the form of its token.
    prepare: the text as the model is to see it. codes: a source may begin with `>>code<<`.
    """

    model: str
    frame: Callable[[Settings], tuple[Names, Names, Names]]
    roles: Mapping[str, str]
    source: str
    first: Callable[[Settings], Names] = lambda _: ()
    n_replaced: int = 0
    last: Callable[[Settings], Names] = lambda _: ()
    vocabulary: bool = False
    target: str = ""
    language: tuple[str, str] | None = None
    prepare: Callable[[str, Settings], str] | None = None
    splits_numbers: bool = False
    codes: bool = False


def content_of(token: Any) -> Any:
    """Return the text of a token, which a config has as such or with its flags."""
    return token.get("content") if isinstance(token, Mapping) else token


def named(config: Settings) -> list[str]:
    """Return the special tokens that a config names beside those of the roles."""
    keys = ("cls_token", "sep_token", "mask_token", "pad_token", "bos_token", "eos_token", "unk_token")
    tokens = [content_of(config.get(key)) for key in keys]
    return [*(token for token in tokens if isinstance(token, str)), *additional_tokens(config)]


def additional_tokens(config: Settings) -> list[str]:
    """Return the special tokens without a role that a config names."""
    more = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    tokens = [content_of(token) for token in (more if isinstance(more, list) else [])]
    return [token for token in tokens if isinstance(token, str)]


def count(config: Settings, key: str, default: int) -> int:
    """Return one of the numbers of a config.

    Raises: ArtifactError if it is none.
    """
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 <= value <= MOST_TOKENS:
        raise ArtifactError(f"`{CONFIG}` has `{key}` {str(value)[:40]!r}", f"a whole number from 0 to {MOST_TOKENS}")
    return value


def sentinels(config: Settings) -> Names:
    """Return T5's tokens for what is left out, the first of which has the last id."""
    listed = [token for token in named(config) if token.startswith("<extra_id_")]
    number = count(config, "extra_ids", len(listed) or 100)
    return tuple(f"<extra_id_{index}>" for index in reversed(range(number)))


def pegasus_tokens(config: Settings) -> Names:
    """Return the tokens before the pieces of Pegasus, which are moved by `offset`.

    Source: Zhang et al. 2019, arXiv:1912.08777; the reference's `pretrain_parsing_ops`, whose ids 2 to 104 only
    pretraining uses.
    """
    offset = count(config, "offset", 103)
    sentence = content_of(config.get("mask_token_sent", "<mask_1>"))
    masks = [] if sentence is None else [str(sentence), str(content_of(config.get("mask_token")) or "<mask_2>")]
    names = ("<pad>", "</s>", *masks, *(f"<unk_{index}>" for index in range(2, offset)))
    if len(names) != offset + 2 and offset:
        raise ArtifactError(
            f"`{CONFIG}` has the `offset` {offset} for {len(names)} tokens before the pieces",
            "save the tokenizer as `tokenizer.json` with transformers",
        )
    return names[: offset + 2]


def prepare_albert(text: str, config: Settings) -> str:
    """Return a text as ALBERT's model was trained on it: in lower case and without accents, unless the config differs."""
    text = " ".join(text.split()).replace("``", '"').replace("''", '"')
    if not config.get("keep_accents", False):
        text = "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))
    return text.lower() if config.get("do_lower_case", True) else text


def prepare_deberta(text: str, config: Settings) -> str:
    """Return a text in lower case if the config says so.

    Raises: ArtifactError for words that are split at punctuation first.
    """
    if config.get("split_by_punct"):
        raise ArtifactError(f"`{CONFIG}` has `split_by_punct`, which llmctl does not read", "use another tokenizer")
    return text.lower() if config.get("do_lower_case") else text


def around(before: Names, between: Names, after: Names) -> Callable[[Settings], tuple[Names, Names, Names]]:
    """Return a frame that no setting changes."""
    return lambda _: (before, between, after)


def nllb_frame(config: Settings) -> tuple[Names, Names, Names]:
    """Return NLLB's frame, in which the language once stood at the end."""
    legacy = bool(config.get("legacy_behaviour"))
    return ((), (), ("eos", "lang")) if legacy else (("lang",), (), ("eos",))


def m2m_tokens(config: Settings) -> Names:
    """Return the languages of M2M, or of the WMT 21 models made of it."""
    codes = WMT21 if config.get("language_codes") == "wmt21" else M2M
    return tuple(f"__{code}__" for code in codes.split())


FIRST = ("<s>", "<pad>", "</s>", "<unk>")
BART_ROLES = {"pad": "<pad>", "unk": "<unk>", "bos": "<s>", "eos": "</s>", "mask": "<mask>"}
T5_ROLES = {"pad": "<pad>", "unk": "<unk>", "eos": "</s>"}
BERT_ROLES = {"pad": "<pad>", "unk": "<unk>", "bos": "[CLS]", "eos": "[SEP]", "mask": "[MASK]"}
ENDS = around((), ("eos",), ("eos",))
CLASSIFIER = around(("[CLS]",), ("[SEP]",), ("[SEP]",))
BART_ENDS = around(("bos",), ("eos", "eos"), ("eos",))
LANGUAGE_FIRST = around(("lang",), (), ("eos",))

CLASSES: dict[str, Class] = {
    "T5": Class(SPIECE, ENDS, T5_ROLES, "Raffel et al. 2020, arXiv:1910.10683", last=sentinels),
    "Pegasus": Class(
        SPIECE,
        around((), (), ("eos",)),
        T5_ROLES | {"mask": "<mask_2>"},
        "Zhang et al. 2019, arXiv:1912.08777",
        first=pegasus_tokens,
        n_replaced=2,
    ),
    "Albert": Class(
        SPIECE,
        CLASSIFIER,
        BERT_ROLES,
        "Lan et al. 2019, arXiv:1909.11942",
        prepare=prepare_albert,
        splits_numbers=True,
    ),
    "BigBird": Class(
        SPIECE,
        CLASSIFIER,
        BART_ROLES | {"mask": "[MASK]"},
        "Zaheer et al. 2020, arXiv:2007.14062",
    ),
    "DebertaV2": Class(
        SPM,
        CLASSIFIER,
        BERT_ROLES | {"pad": "[PAD]", "unk": "[UNK]"},
        "He et al. 2021, arXiv:2111.09543",
        last=lambda _: ("[MASK]",),
        prepare=prepare_deberta,
    ),
    "XLMRoberta": Class(
        FAIRSEQ,
        BART_ENDS,
        BART_ROLES,
        "Conneau et al. 2019, arXiv:1911.02116",
        first=lambda _: FIRST,
        n_replaced=3,
        last=lambda _: ("<mask>",),
    ),
    "Camembert": Class(
        FAIRSEQ,
        BART_ENDS,
        BART_ROLES,
        "Martin et al. 2019, arXiv:1911.03894",
        first=lambda _: ("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED"),
        n_replaced=1,
        last=lambda _: ("<mask>",),
    ),
    "MBart": Class(
        FAIRSEQ,
        around((), (), ("eos", "lang")),
        BART_ROLES,
        "Liu et al. 2020, arXiv:2001.08210",
        first=lambda _: FIRST,
        n_replaced=3,
        last=lambda _: (*MBART.split(), "<mask>"),
        language=("en_XX", "{}"),
    ),
    "MBart50": Class(
        FAIRSEQ,
        LANGUAGE_FIRST,
        BART_ROLES,
        "Tang et al. 2020, arXiv:2008.00401",
        first=lambda _: FIRST,
        n_replaced=3,
        last=lambda _: (*MBART.split(), *MBART_MORE.split(), "<mask>"),
        language=("en_XX", "{}"),
    ),
    "Nllb": Class(
        FAIRSEQ,
        nllb_frame,
        BART_ROLES,
        "NLLB team 2022, arXiv:2207.04672",
        first=lambda _: FIRST,
        n_replaced=3,
        last=lambda _: (*NLLB.split(), "<mask>"),
        language=("eng_Latn", "{}"),
    ),
    "M2M100": Class(
        FAIRSEQ,
        LANGUAGE_FIRST,
        {role: token for role, token in BART_ROLES.items() if role != "mask"},
        "Fan et al. 2020, arXiv:2010.11125",
        last=m2m_tokens,
        vocabulary=True,
        language=("en", "__{}__"),
    ),
    "XGLM": Class(
        FAIRSEQ,
        around(("eos",), ("eos", "eos"), ()),
        {role: token for role, token in BART_ROLES.items() if role != "mask"},
        "Lin et al. 2021, arXiv:2112.10668",
        first=lambda _: FIRST,
        n_replaced=3,
        last=lambda _: tuple(f"<madeupword{index}>" for index in range(7)),
    ),
    "Marian": Class(
        SOURCE,
        around((), (), ("eos",)),
        T5_ROLES,
        "Tiedemann and Thottingal 2020, OPUS-MT",
        vocabulary=True,
        target=TARGET,
        codes=True,
    ),
}
"""What is read, by the name of the class without `Tokenizer`; `source` is the paper or project of its models."""
