"""A wrong command line is refused before torch is imported."""

import subprocess
import sys

import pytest

from llmctl.commands.before_torch import CHECKS
from llmctl.config import TRAINING

SCRIPT = "import sys; from llmctl.cli import run; code = run(sys.argv[1:]); print(code, 'torch' in sys.modules)"


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("pretrain nowhere.txt", 3, "`nowhere.txt` does not exist"),
        ("pretrain a.txt --val nowhere.txt", 3, "`nowhere.txt` does not exist"),
        ("pretrain --objective seq2seq a.txt:nowhere.txt", 3, "`nowhere.txt` does not exist"),
        ("pretrain a.txt --lr -1", 2, "`--lr` is -1"),
        ("finetune MODEL nowhere.txt", 3, "`nowhere.txt` does not exist"),
        ("finetune MODEL a.txt --task none", 2, "`--task` is `none`"),
        ("finetune MODEL a.txt --task text --batch-size 0", 2, "`--batch-size` is 0"),
        ("finetune MODEL a.txt --task text --resume nowhere", 3, "`nowhere` does not exist"),
        ("distill MODEL -d nowhere.txt", 3, "`nowhere.txt` does not exist"),
        ("distill MODEL -d a.txt --set loss.weight=2", 2, "`loss.weight` is 2"),
        ("quantize MODEL --calib nowhere.txt", 3, "`nowhere.txt` does not exist"),
        ("quantize MODEL --method none", 2, "`--method` is `none`"),
        ("evaluate MODEL -d nowhere.txt", 3, "`nowhere.txt` does not exist"),
        ("generate x -m MODEL -t -1", 2, "`--temperature` is -1"),
        ("chat -m MODEL --script a.txt --top-p 2", 2, "`--top-p` is 2"),
    ],
)
def test_a_wrong_command_line_needs_no_torch(models, tmp_path, line, code, said):
    (tmp_path / "a.txt").write_text("a b c\n" * 99)
    words = [str(models["decoder"]) if word == "MODEL" else word for word in line.split()]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert said in done.stderr
    assert done.stdout == f"{code} False\n"


def test_the_checks_are_of_commands_that_train():
    assert set(CHECKS) <= set(TRAINING)
