"""The newest valid checkpoint wins; a damaged one is named and passed over; rotation keeps what it must."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from llmctl.distributed.sharding import whole
from llmctl.errors import ArtifactError, NotFoundError
from llmctl.runs import checkpoint


def save(folder, step: int) -> None:
    model = {"a": torch.full((3,), float(step)), "b": torch.arange(4, dtype=torch.bfloat16)}
    optimizer = {"adamw/a/exp_avg": torch.ones(3) * step, "adamw/a/step": torch.tensor(float(step))}
    state = {"step": step, "before": {}}
    checkpoint.Store(folder).save(step, whole(model), whole(optimizer), state)


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path):
    save(tmp_path, 7)
    loaded, skipped = checkpoint.Store(tmp_path).load_newest()
    assert skipped == []
    assert loaded.state == {"step": 7, "before": {}}
    assert torch.equal(loaded.read("model", "a"), torch.full((3,), 7.0))
    assert loaded.read("model", "b").dtype == torch.bfloat16
    assert torch.equal(loaded.read("optimizer", "adamw/a/exp_avg"), torch.full((3,), 7.0))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["cut", "flip", "delete"])
def test_the_newest_valid_one_wins_whatever_happened_to_a_newer_one(tmp_path, name: str, harm: str):
    save(tmp_path, 1)
    save(tmp_path, 2)
    victim = tmp_path / "step-00000002" / name
    data = bytearray(victim.read_bytes())
    if harm == "delete":
        victim.unlink()
    elif harm == "cut":
        victim.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    loaded, skipped = checkpoint.Store(tmp_path).load_newest()
    assert loaded.state["step"] == 1
    assert len(skipped) == 1
    assert "step-00000002" in skipped[0]
    with pytest.raises(ArtifactError, match="step-00000002"):
        checkpoint.load(tmp_path / "step-00000002")


def test_a_folder_that_was_being_written_is_never_taken(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000002.abcd.tmp")
    assert checkpoint.Store(tmp_path).load_newest()[0].state["step"] == 1


def test_no_checkpoint_is_not_found(tmp_path):
    with pytest.raises(NotFoundError):
        checkpoint.Store(tmp_path / "none").load_newest()


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step)
    checkpoint.Store(tmp_path).rotate(2, tmp_path / "step-00000002")
    assert [path.name for path in checkpoint.published(tmp_path)] == [
        "step-00000006",
        "step-00000005",
        "step-00000002",
    ]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-00000001" / "state.json").write_text("{}")
    save(tmp_path, 1)
    assert checkpoint.defect(tmp_path / "step-00000001") == ""
    manifest = json.loads((tmp_path / "step-00000001" / "manifest.json").read_text())
    assert set(manifest["sha256"]) == {"model.safetensors", "optimizer.safetensors", "state.json"}


@pytest.mark.skipif(not Path("/proc/self/mem").is_file(), reason="no file here refuses to be read")
def test_a_file_that_the_disk_cannot_read_makes_one_checkpoint_bad_and_no_save(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    victim = tmp_path / "step-00000002" / "model.safetensors"
    victim.unlink()
    victim.symlink_to("/proc/self/mem")  # its first byte gives an input/output error
    loaded, skipped = checkpoint.Store(tmp_path).load_newest()
    assert loaded.state["step"] == 1
    assert "`model.safetensors` cannot be read" in skipped[0]
    save(tmp_path, 3)
    checkpoint.Store(tmp_path).rotate(2)
    assert [path.name for path in checkpoint.published(tmp_path)] == [
        "step-00000003",
        "step-00000002",
        "step-00000001",
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("index"),
        lambda state: state.update(index=7),
        lambda state: state["index"].pop("model"),
        lambda state: state["index"]["model"]["a"].pop("shape"),
        lambda state: state["index"]["model"]["a"].update(shape=[-3]),
        lambda state: state["index"]["model"]["a"].update(shape=["3"]),
        lambda state: state["index"]["model"]["a"].update(parts=[]),
        lambda state: state["index"]["model"]["a"].update(parts=[["model.safetensors", {}, 3]]),
        lambda state: state["index"]["model"]["a"].update(parts=[["../x", 0, 3]]),
        lambda state: state["index"]["model"]["a"].update(parts=[["model.safetensors", 0, 2]]),
        lambda state: state["index"]["model"]["a"].update(shape=[2**62]),
        lambda state: state["index"]["model"]["a"].update(shape=[3, 2]),
        lambda state: state["index"]["model"]["a"].update(shape=[]),
        lambda state: state["index"]["model"]["a"].update(parts=[["optimizer.safetensors", 0, 3]]),
    ],
)
def test_an_index_of_another_shape_is_damage(tmp_path, change):
    from llmctl.files import file_sha256

    save(tmp_path, 1)
    folder = tmp_path / "step-00000001"
    state = json.loads((folder / "state.json").read_text())
    change(state)
    (folder / "state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"]["state.json"] = file_sha256(folder / "state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError):
        checkpoint.load(folder).tensors("model")


def test_one_whose_state_is_of_another_shape_is_passed_over(tmp_path):
    from llmctl.files import file_sha256

    save(tmp_path, 1)
    save(tmp_path, 2)
    folder = tmp_path / "step-00000002"
    (folder / "state.json").write_text('{"step": 2, "index": {"model": {"a": {}}}}')
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"]["state.json"] = file_sha256(folder / "state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    loaded, skipped = checkpoint.Store(tmp_path).load_newest()
    assert loaded.state["step"] == 1
    assert "index" in skipped[0]


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "7", "{}", '{"sha256": {"a/../state.json": "0"}, "step": 1}'])
def test_a_manifest_that_is_none_is_a_defect(tmp_path, text: str):
    save(tmp_path, 1)
    (tmp_path / "step-00000001" / "manifest.json").write_text(text)
    assert checkpoint.defect(tmp_path / "step-00000001")
