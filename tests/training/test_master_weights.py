"""bfloat16 weights with a float32 master: no update is lost, a resumed run is the same bits, the loss is float32's."""

import signal

import pytest
import torch

from llmctl.config import OptimConfig
from llmctl.errors import InterruptedRunError
from llmctl.runs import checkpoint
from llmctl.training.loop import fit
from llmctl.training.master_weights import Masters
from tests.training.test_loop import Stopping, assert_same, training, weights


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, name: str):
    settings = {"optim": OptimConfig(name=name), "dtype": "bfloat16", "micro_batch_size": 4}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    straight = training(tmp_path / "a", **settings)
    expected = fit(straight)
    stopped = training(tmp_path / "b", **settings)
    stopped.progress = Stopping(6, signal.SIGTERM)
    with pytest.raises(InterruptedRunError):
        fit(stopped)
    saved, _ = checkpoint.Store(tmp_path / "b" / "checkpoints").load_newest()
    assert {tensor.dtype for tensor in saved.tensors("model").values()} == {torch.float32}
    resumed = training(tmp_path / "b", **settings)
    got = fit(resumed, saved)
    assert got.after == expected.after
    assert {tensor.dtype for tensor in weights(resumed).values()} == {torch.float32}
    assert_same(weights(straight), weights(resumed))


def test_the_loss_is_close_to_float32s(tmp_path):
    losses = {}
    for dtype, masters in (("float32", True), ("bfloat16", True), ("bfloat16", False)):
        folder = tmp_path / f"{dtype}-{masters}"
        folder.mkdir()
        job = training(folder, dtype=dtype, master_weights=masters, steps=150, eval_every=150, dropout=0.0)
        losses[dtype, masters] = fit(job).after["loss"]
    assert losses["bfloat16", True] == pytest.approx(losses["float32", True], rel=0.02)
    assert losses["bfloat16", False] == pytest.approx(losses["float32", True], rel=0.02)


def test_updates_too_small_for_bfloat16_are_kept(tmp_path):
    job = training(tmp_path)
    before = weights(job)
    masters = Masters(job.model)
    assert masters.master.lm_head.weight is masters.master.model.embed_tokens.weight
    assert job.model.lm_head.weight is job.model.model.embed_tokens.weight
    with torch.no_grad():
        for _ in range(8):
            for _, master in masters.pairs:
                master.mul_(1 + 2**-10)  # bfloat16 has 8 bits
            masters.push()
    masters.restore()
    for name, tensor in weights(job).items():
        torch.testing.assert_close(tensor, before[name] * (1 + 2**-10) ** 8)
