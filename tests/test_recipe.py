"""Config resolution: precedence, strict keys, typed values, and a dump that reads back to the same config."""

import io

import pytest

from llmctl.config import PretrainConfig
from llmctl.errors import NotFoundError, UsageError
from llmctl.recipe import Resolved, dump, keys_of, load


def test_flags_beat_environment_beats_recipe_beats_defaults(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train: {steps: 1, batch_size: 1, seq_len: 8}\nmodel: tiny\n")
    resolved = load(
        PretrainConfig,
        recipe=str(recipe),
        environment={"LLMCTL_TRAIN_BATCH_SIZE": "2", "LLMCTL_TRAIN_SEQ_LEN": "16"},
        settings=["train.seq_len=32"],
        flags={"objective": "mlm", "train.seed": None},
    )
    config = resolved.config
    assert (config.train.steps, config.train.batch_size, config.train.seq_len) == (1, 2, 32)
    assert (config.objective, config.model.preset, config.train.seed) == ("mlm", "tiny", 0)
    assert resolved.origins["train.batch_size"] == "environment LLMCTL_TRAIN_BATCH_SIZE"


def test_a_dump_reads_back_to_the_same_config(tmp_path):
    settings = [
        "train.steps=1e3",
        "optim.lr=1e-3",
        "model.n_layers=6",
        "model.attention_windows=[0, 64]",
        "data.paths=[a b.txt, 'c: d', 诗.txt]",
        "train.sample_prompts=['yes', 'a # b']",
    ]
    first = load(PretrainConfig, settings=settings, environment={})
    path = tmp_path / "r.yaml"
    path.write_text(dump(first), encoding="utf-8")
    assert load(PretrainConfig, recipe=str(path), environment={}).config == first.config


def test_every_key_is_dumped_with_its_meaning():
    text = dump(Resolved(PretrainConfig(), {}))
    for key, info in keys_of(PretrainConfig).items():
        if not key.startswith("model.") or key == "model.preset":
            assert f"{key.rsplit('.', 1)[-1]}: " in text
            assert info.meaning in text


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("train.lr=1", ("`train.lr`", "did you mean `optim.lr`")),
        ("train.stepz=1", ("`train.stepz`", "did you mean `train.steps`")),
        ("train.steps=many", ("`train.steps`", "`many`", "integer")),
        ("train.steps=1.5", ("`train.steps`", "`1.5`")),
        ("objective=gpt", ("`objective`", "`gpt`", "`clm`")),
        ("optim.lr=", ("`optim.lr`",)),
        ("nonsense", ("`--set nonsense` has no `=`",)),
        ("model.depth=3", ("`model.depth`",)),
    ],
)
def test_mistakes_name_the_key_and_the_value(setting: str, parts: tuple[str, ...]):
    with pytest.raises(UsageError) as caught:
        load(PretrainConfig, settings=[setting], environment={})
    for part in parts:
        assert part in str(caught.value)


def test_all_problems_are_reported_together():
    with pytest.raises(UsageError) as caught:
        load(PretrainConfig, settings=["optim.lr=x", "train.seq_len=y"], environment={})
    assert "optim.lr" in str(caught.value)
    assert "train.seq_len" in str(caught.value)


def test_a_recipe_can_come_from_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("train: {steps: 3}"))
    assert load(PretrainConfig, recipe="-", environment={}).config.train.steps == 3


@pytest.mark.parametrize("text", ["- a\n- b\n", "train: [", "just words"])
def test_a_broken_recipe_is_one_clear_error(tmp_path, text: str):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"r\.yaml"):
        load(PretrainConfig, recipe=str(path), environment={})


def test_a_missing_recipe_is_not_found():
    with pytest.raises(NotFoundError, match=r"nowhere\.yaml"):
        load(PretrainConfig, recipe="nowhere.yaml", environment={})


def test_an_empty_recipe_is_the_defaults(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("# nothing\n")
    assert load(PretrainConfig, recipe=str(path), environment={}).config == PretrainConfig()


LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 10))


@pytest.mark.parametrize(
    "text",
    [
        *(LAUGHS, MERGES, LAUGHS + "train: {seed: *a9}", "model: &a {x: *a}", "&a [*a]", "train: {steps: 0b_}"),
        *(
            "[" * 50_000,
            "- " * 50_000,
            "x: " * 200_000,
            "a: [" + "1, " * 200_000 + "]",
            "{a: " * 50_000,
            "a: 2024-99-99",
            "a: !!int x",
            "a: !!float x",
            "a: !!timestamp x",
            "a: !!binary 1",
        ),
        *("? [a]\n: b", "? {a: b}\n: c", "a: \x07", "a: 0x_", "- &a\n- *b", "!!python/object:os.system x", "a: 0o_"),
        *(
            "a: 1:_:2",
            "!!set [a]",
            "!!omap {a: b}",
            "!!pairs [a]",
            "a: " + "9" * 5000,
            "<<: 3",
            "a: {<<: [1]}",
            "a: =\n=",
        ),
    ],
)
def test_yaml_that_its_library_cannot_bear_is_one_clear_error(tmp_path, text: str):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UsageError):
        load(PretrainConfig, recipe=str(path))
    with pytest.raises(UsageError):
        load(PretrainConfig, settings=[f"train.steps={text}"])


def test_aliases_that_stay_small_are_fine(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("train: &t {steps: 7}\noptim: {lr: 0.1}\n")
    assert load(PretrainConfig, recipe=str(path)).config.train.steps == 7
    path.write_text("x: &s 7\ntrain: {steps: *s, seed: *s}\n".replace("x: &s 7\n", "").replace("*s,", "&s 7,"))
    assert load(PretrainConfig, recipe=str(path)).config.train.seed == 7
