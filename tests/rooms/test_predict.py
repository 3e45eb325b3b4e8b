"""Predicted memory: the tracer counts what lives, and a dry run's peak is the run's, without reading weights."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from luthier.errors import LuthierError
from luthier.training.predict import Alive, predict_peak

MB = 1 << 20
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_storages_are_counted_once_and_until_they_die() -> None:
    with Alive() as alive:
        a = torch.ones(MB)
        view = a[: MB // 2].view(2, -1)
        b = a + a
        assert alive.now == alive.peak == 8 * MB
        del a, view, b
        gc.collect()
        assert (alive.now, alive.peak) == (0, 8 * MB)


def test_a_matrix_product_costs_what_arithmetic_says() -> None:
    w = torch.ones(256, 512, requires_grad=True)
    x = torch.ones(64, 512)
    found = predict_peak(lambda: (x @ w.T).sum().backward(), [w, x])
    assert found.held == 4 * (256 * 512 + 64 * 512)
    assert found.after - found.held == 4 * 256 * 512
    assert found.flops == 2 * 2 * 64 * 256 * 512


def base(folder: Path, hidden: int = 256, layers: int = 4, vocabulary: int = 2048) -> Path:
    """A random base on disk whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    tokens = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*special, *alphabet])}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<|pad|>", eos_token="<|end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("predict")
    base(place / "base")
    with (place / "records.jsonl").open("w") as f:
        for i in range(24):
            f.write(json.dumps({"prompt": "count " * 8 + str(i), "completion": "one two three " * (14 + i % 5)}) + "\n")
    return place


def plan(folder: Path, **sections: object) -> dict:
    return {
        "base": str(folder / "base"),
        "data": {"train": {"path": str(folder / "records.jsonl")}, "max_length": 512, "cache": False},
        "delta": [{"form": "lora", "rank": 8}],
        "train": {"steps": 2, "batch_size": 8, "precision": "fp32", "tokens_at_once": 4096},
        "audit": {"enabled": False},
        **sections,
    }


RUN = """
import json, sys
from luthier.verbs.dry_run import dry_run
from luthier.verbs.tune import tune
plan = json.loads(sys.argv[1])
if sys.argv[2] == "dry":
    found = dry_run(plan)
    assert found.tensors > found.weights > 0
    sys.stdout.write(json.dumps([found.peak_memory, found.moved, found.tensors]))
else:
    cost = tune(plan, out=sys.argv[3], progress=False).report["cost"]
    sys.stdout.write(json.dumps([cost["peak_memory_bytes"], cost["parameters_moved"]]))
"""


def one(kind: str, plan: dict, out: Path) -> list[int]:
    """In a process of its own: memory is a process's."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(plan), kind, str(out)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


ARMS = {
    "lora": {},
    "full": {"delta": [{"choice": "full"}]},
    "lora bf16": {"train": {"steps": 4, "batch_size": 8, "precision": "bf16", "tokens_at_once": 4096}},
    "full bf16": {
        "delta": [{"choice": "full"}],
        "train": {"steps": 4, "batch_size": 8, "precision": "bf16", "tokens_at_once": 4096},
    },
    "hft and a prompt": {"delta": [{"choice": "hft"}, {"form": "prompt", "length": 4}]},
    "checkpointing": {"train": {"steps": 2, "batch_size": 8, "precision": "fp32", "checkpointing": True}},
}


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["lora", "full", "lora bf16", "full bf16"])
def test_the_predicted_peak_is_the_runs_within_a_fifth(arm: str, folder: Path, tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("resident memory is read from /proc")
    stated = plan(folder, **ARMS[arm])
    (predicted, moved, tensors), (measured, really) = one("dry", stated, tmp_path), one("run", stated, tmp_path / "out")
    assert moved == really
    assert tensors > 60 * MB  # or the libraries' own memory would hide an error
    assert abs(predicted / measured - 1) < 0.2, (predicted, measured)


def test_arms_are_ordered_as_they_must_be(folder: Path) -> None:
    from luthier.verbs.dry_run import dry_run

    found = {arm: dry_run(plan(folder, **sections)) for arm, sections in ARMS.items()}
    peak = {arm: f.tensors for arm, f in found.items()}
    assert peak["checkpointing"] < peak["lora"] < peak["full"]
    assert peak["hft and a prompt"] < peak["full"]
    assert found["full"].moved == found["full"].base_parameters
    assert set(found["hft and a prompt"].moving) == {"hft", "prompt"}
    assert found["lora"].moving["lora"]["attn.q"] == 4 * 8 * (256 + 256)
    assert found["lora"].sites["lora"]["ffn.down"] == 4


def test_a_dry_run_reads_no_weights(folder: Path) -> None:
    from luthier.verbs.dry_run import dry_run

    weights = folder / "base" / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    try:
        assert dry_run(plan(folder)).moved > 0
    finally:
        weights.write_bytes(content)


def test_a_dry_run_finds_what_would_stop_the_run(folder: Path) -> None:
    from luthier.verbs.dry_run import dry_run

    with pytest.raises(LuthierError, match="nowhere.jsonl"):
        dry_run(plan(folder, data={"train": str(folder / "nowhere.jsonl")}))
