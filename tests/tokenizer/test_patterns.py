"""Expressions of published models pass, expressions that can take forever do not."""

import pytest

from llmctl.errors import ArtifactError
from llmctl.tokenizer.patterns import EndlessPatternError, check_pattern
from llmctl.tokenizer.pre_tokenizers import PRE_TOKENIZERS

O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CL100K = (
    r"(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
)


@pytest.mark.parametrize(
    "pattern",
    [
        *(O200K, CL100K, DEEPSEEK),
        r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))",
        r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
        r" ?[^(\s|[.,!?…。，、।۔،])]+",
        r".*\.layers\.\d+\.(q|k|v|o)_proj.*",
        "[一-龥぀-ゟ゠-ヿ]+",
        *("", "a{,3}b{", "[]a]", "[^]a]", "[[:alpha:]&&[^b]]+", r"(?i)x(?<name>y)(?P<n>z)", r"\x{41}\u{1F600}"),
    ],
)
def test_patterns_of_published_models_pass(pattern: str):
    check_pattern(pattern, "it")


def test_pre_tokenizers_of_gguf_pass():
    def walk(part: object):
        if isinstance(part, dict):
            for key, value in part.items():
                yield from [value] if key == "Regex" else walk(value)
        elif isinstance(part, list):
            for value in part:
                yield from walk(value)

    patterns = [pattern for row in PRE_TOKENIZERS.values() for pattern in walk([row.steps, row.normalizer])]
    assert patterns
    for pattern in patterns:
        check_pattern(pattern, "it")


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+b", "(a+)+$", "(a|a)*b", "(a|ab)*c", "(a*)*", "(?:)*", "((a{1,3}){1,30})", "(.*,){20}x"),
        *("a*a*a*a*a*b", "(?:a?){30}a{30}", "([[:alpha:]]+)+", "(?=(a+)+b)", "(?i:(a+)+)b", "((((a+)+)+)+)+x"),
        "(x+x+)+y",
    ],
)
def test_endless_patterns_are_refused(pattern: str):
    with pytest.raises(EndlessPatternError, match="forever"):
        check_pattern(pattern, "it")


@pytest.mark.parametrize(
    "pattern",
    [
        *("(", ")", "[", "[a", "a\\", "(?", "(?<", "a**", "*", "(?(1)a|b)", r"\g<0>", r"(a)\1", r"\k<n>", "(*FAIL)"),
        *("(" * 1000 + ")" * 1000, "[" * 1000, "a" * 20_000, "a{99999999}", "a{3,2}", r"\p{L", "(?R)"),
    ],
)
def test_what_is_not_understood_is_refused(pattern: str):
    with pytest.raises(ArtifactError, match="regular expression"):
        check_pattern(pattern, "it")


def test_the_shortest_match():
    shortest = {"": 0, "a": 1, "a*": 0, "ab?c": 2, "(ab|c)d": 2, "a{3}": 3, r"\bab\b": 2, "(?=abc)": 0, "[abc]+": 1}
    assert {pattern: check_pattern(pattern, "it") for pattern in shortest} == shortest
