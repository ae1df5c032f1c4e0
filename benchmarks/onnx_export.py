"""Compare ONNX files on a CPU: ours in float32 and 8 bits, and what ONNX Runtime's dynamic quantization makes of ours.

    python benchmarks/onnx_export.py --encoder MINILM --stsb DIR --classifiers SST2-LORA SST2-FULL
        --sst2 dev.tsv train.tsv --work WORK [--peers DIR] [--sentences 1000] [--rounds 5]

The classifiers are made by recipes/finetune/sst2-lora.yaml and sst2-full.yaml.

STS-B: Spearman correlation of cosines on dev and test, in batches of 32 texts of similar length, as sentence-transformers
makes them. SST-2: accuracy, and how many of the predictions are others than in float32. Speed: the first sentences of STS-B
dev in such batches, per CPU-second of one thread of ONNX Runtime; the files take turns, the fastest round counts. `--peers`
is a folder with optimum, which then quantizes by its own configuration for AVX-512 VNNI, as sentence-transformers'
`export_dynamic_quantized_onnx_model` does. Not named onnx.py: it would be imported as the package.
"""

import argparse
import csv
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.quantization import QuantType, quantize_dynamic
from tokenizers import Tokenizer

from llmctl.metrics.scores import spearman

BATCH, LONGEST = 32, 256
BY_OPTIMUM = """
import sys
from optimum.onnxruntime import AutoQuantizationConfig, ORTQuantizer
quantizer = ORTQuantizer.from_pretrained(sys.argv[1], file_name="model.onnx")
quantizer.quantize(save_dir=sys.argv[2], quantization_config=AutoQuantizationConfig.avx512_vnni(is_static=False))
"""


def export(model: Path, out: Path, *flags: str) -> None:
    command = [sys.executable, "-m", "llmctl", "export", str(model), "--to", "onnx", "-f", "-o", str(out), *flags]
    print("$", " ".join(["llmctl", *command[3:]]), file=sys.stderr)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def files_of(model: Path, folder: Path, peers: Path | None) -> dict[str, Path]:
    """Write all kinds of a model and return their files."""
    export(model, folder)
    export(model, folder, "--int8")
    ours = folder / "onnx"
    files = {"float32": ours / "model.onnx", "int8, ours": ours / "model_quantized.onnx"}
    for name, per_channel in (("per tensor", False), ("per channel", True)):
        there = folder / f"dynamic {name}.onnx"
        quantize_dynamic(files["float32"], there, weight_type=QuantType.QInt8, per_channel=per_channel)
        files[f"quantize_dynamic, {name}"] = there
    if peers:
        there = folder / "optimum"
        environment = os.environ | {"PYTHONPATH": str(peers), "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, "-c", BY_OPTIMUM, str(ours), str(there)], check=True, env=environment)
        files["optimum, avx512_vnni"] = there / "model_quantized.onnx"
    return files


class Model:
    def __init__(self, file: Path, folder: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(LONGEST)

    def batches(self, texts: Sequence[str]):
        """Yield the places of texts of similar length, and their inputs."""
        encoded = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        order = sorted(range(len(texts)), key=lambda index: -len(encoded[index]))
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            ids = np.zeros((len(rows), max(len(encoded[row]) for row in rows)), np.int64)
            mask = np.zeros_like(ids)
            for place, row in enumerate(rows):
                ids[place, : len(encoded[row])], mask[place, : len(encoded[row])] = encoded[row], 1
            feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
            yield rows, {name: feed[name] for name in self.inputs}

    def outputs(self, texts: Sequence[str]) -> np.ndarray:
        """Return one output per text: logits, or the normalized mean of the states."""
        out: list[np.ndarray] = [np.empty(0)] * len(texts)
        for rows, feed in self.batches(texts):
            values = self.session.run(None, feed)[0]
            if values.ndim == 3:
                mask = feed["attention_mask"][..., None]
                values = (values * mask).sum(1) / mask.sum(1)
                values /= np.linalg.norm(values, axis=1, keepdims=True)
            for row, value in zip(rows, values, strict=True):
                out[row] = value
        return np.stack(out)


def sts(model: Model, file: Path) -> float:
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.reader(lines))
    vectors = model.outputs([row[0] for row in rows] + [row[1] for row in rows])
    cosines = (vectors[: len(rows)] * vectors[len(rows) :]).sum(1)
    return 100 * spearman(cosines.tolist(), [float(row[2]) for row in rows])


def labels(model: Model, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the predictions and the labels."""
    rows = [line.rsplit("\t", 1) for line in file.read_text(encoding="utf-8").splitlines()]
    return model.outputs([row[0] for row in rows]).argmax(1), np.array([int(row[1]) for row in rows])


def speeds(models: dict[str, Model], texts: Sequence[str], rounds: int) -> dict[str, float]:
    """Return sentences per CPU-second."""
    fed = {name: [feed for _, feed in model.batches(texts)] for name, model in models.items()}
    best = dict.fromkeys(models, float("inf"))
    for _ in range(rounds):
        for name, model in models.items():
            start = time.process_time()
            for feed in fed[name]:
                model.session.run(None, feed)
            best[name] = min(best[name], time.process_time() - start)
    return {name: len(texts) / seconds for name, seconds in best.items()}


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    flags = next(line for line in lines if line.startswith("flags")).split()
    return name + "".join(f", {flag}" for flag in ("avx2", "avx512f", "avx512_vnni", "amx_int8") if flag in flags)


def shown(values: Sequence[float], whole: Sequence[float]) -> str:
    return "".join(f"{value:>11.3f} ({value - before:+.3f})" for value, before in zip(values, whole, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("encoder", "stsb", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("classifiers", "sst2"):
        parser.add_argument(f"--{name}", type=Path, nargs="+", required=True)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--sentences", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{processor()}; onnxruntime {onnxruntime.__version__}")
    with (options.stsb / "stsb-en-dev.csv").open(newline="", encoding="utf-8") as lines:
        texts = [row[0] for row in csv.reader(lines)][: options.sentences]
    for source in (options.encoder, *options.classifiers):
        is_encoder, folder = source == options.encoder, options.work / source.name
        files = files_of(source, folder, options.peers)
        models = {name: Model(file, folder) for name, file in files.items()}
        speed = speeds(models, texts, options.rounds)
        columns = ["STS-B dev", "STS-B test"]
        if not is_encoder:
            columns = [column for file in options.sst2 for column in (f"SST-2 {file.stem}", "other labels")]
        print(f"{source.name:34}{'bytes':>12}{'sentences/CPU-s':>18}" + "".join(f"{name:>20}" for name in columns))
        whole: list[float] = []
        before: list[np.ndarray] = []
        for name, model in models.items():
            line = f"{name:34}{files[name].stat().st_size:>12,}{speed[name]:>18.1f}"
            if is_encoder:
                values = [sts(model, options.stsb / f"stsb-en-{part}.csv") for part in ("dev", "test")]
                whole = whole or values
                print(line + shown(values, whole), flush=True)
                continue
            for number, file in enumerate(options.sst2):
                predicted, right = labels(model, file)
                if name == "float32":
                    before.append(predicted)
                    whole.append(100 * float((predicted == right).mean()))
                n_others = int((predicted != before[number]).sum())
                line += shown([100 * float((predicted == right).mean())], [whole[number]])
                line += f"{n_others:>11} of {len(right):>5}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
