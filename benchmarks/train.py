"""Fine-tuning speed and memory beside TRL's SFTTrainer with PEFT, paired in one run.

    python benchmarks/train.py [--records 512] [--what lora full] [--types fp32 bf16] [--repeats 1] [--data FILE]

CPU: a random 29 M Llama on GSM8K, batch 8, maximum length 512, loss on completions, AdamW, LoRA r = 16 on every
linear layer. GPU: a random 1.1 B Llama on the same records filled up to 2,048 tokens with others before the question,
bf16, TRL with Liger kernels (pip install liger-kernel), the first of several GPUs. Every arm is a process of its own;
arms alternate. Three comparisons: TRL's defaults; TRL grouping by length; and both on identical batches in identical
order, where the losses must agree within 1 % at every step. Neither learning rate is tuned. A fourth arm is the plain
loop of benchmarks/plain.py, which says what these cores give without either. TRL recomputes activations by default,
luthier does not: --checkpointing has it do so too.
bf16 means: luthier, LoRA: base held in bfloat16, trained numbers float32, no autocast; luthier, full: float32 masters
under bfloat16 autocast; TRL: bf16=True, which is a float32 model under bfloat16 autocast, on a GPU for LoRA a bfloat16
one.
Memory is the peak of the resident set while training less what the imports took. Each side has the allocator as it comes:
luthier sets two of glibc's limits for its process (luthier.bases.hardware.set_malloc), TRL none. On a processor without bfloat16 arithmetic the bf16 arms take the first 16 records only:
TRL computes in bfloat16 all the same, luthier in float32 (docs/precision.md). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ARMS = ("luthier", "trl", "trl-grouped", "luthier-same", "trl-same", "plain")
CPU = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1536,
}
GPU = {
    "hidden_size": 2048,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 5632,
}
LENGTH = {True: 2048, False: 512}
"""Longest row in tokens, on a GPU and on a CPU."""
RANK = 16
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def prepare(folder: Path, data: Path, records: int, gpu: bool) -> None:
    """The base (random weights, tokenizer trained on the text) and the records of a run."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rows = [json.loads(line) for line in data.open(encoding="utf-8")]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((r["question"] + "\n" + r["answer"] for r in rows), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
    vocabulary = 32000 if gpu else len(tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, max_position_embeddings=2048, tie_word_embeddings=not gpu, pad_token_id=0, eos_token_id=1,
        bos_token_id=None, **(GPU if gpu else CPU),
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16 if gpu else torch.float32).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    with (folder / "records.jsonl").open("w", encoding="utf-8") as f:
        for k in range(records):
            prompt, answer = rows[k % len(rows)]["question"] + "\n", rows[k % len(rows)]["answer"]
            room = LENGTH[True] - 8 - len(core.encode(prompt + answer).ids)  # 8: the end, and where texts meet
            for j in itertools.count(1) if gpu else ():
                other = rows[(k + j * 997) % len(rows)]
                text = other["question"] + "\n" + other["answer"] + "\n"
                if (room := room - len(core.encode(text).ids)) < 0:
                    break
                prompt = text + prompt
            f.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")


def plan_of(folder: Path, what: str, kind: str, length: int, checkpointing: bool) -> dict[str, Any]:
    """The run as a luthier plan."""
    delta = {"form": "lora", "rank": RANK, "alpha": RANK, "sites": ["linear"]} if what == "lora" else {"choice": "full"}
    return {
        "base": str(folder / "base"),
        "data": {"train": str(folder / "records.jsonl"), "max_length": length, "cache": False, "stream": False},
        "delta": [delta],
        "train": {
            "epochs": 1, "batch_size": 8, "lr": 2e-4, "schedule": "linear", "warmup": 0, "precision": kind, "clip": 1.0,
            "checkpointing": checkpointing,
        },
        "audit": {"enabled": False},
    }  # fmt: skip


def import_the_model() -> None:
    """What both sides import only when they load the model, so that it counts as imports on both."""
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    assert LlamaForCausalLM and PreTrainedTokenizerFast


def luthier_arm(folder: Path, what: str, kind: str, same: bool, length: int, checkpointing: bool) -> dict[str, Any]:
    import torch

    from luthier.bases.hardware import peak_memory, reset_peak, resident_memory, synchronise
    from luthier.plan.load import load_plan
    from luthier.training.run import build

    import_the_model()
    imported = resident_memory()
    plan = load_plan(plan_of(folder, what, kind, length, checkpointing))
    training = build(plan, folder / f"out-{os.getpid()}", progress=False)
    device = training.machine.device
    batches: list[Any] = []
    if same:  # the batches this arm draws are what the peer is given, and so is the start of A
        feed: Any = training.events.batches
        whole = feed.parts
        feed.parts = lambda batch: batches.append(batch) or whole(batch)
        start = (
            {n: p.detach().clone().cpu() for n, p in training.loop.optimiser.names.items()} if what == "lora" else {}
        )
    synchronise(device)
    reset_peak(device)
    started = time.perf_counter()
    progress = training.train()
    synchronise(device)
    seconds = time.perf_counter() - started
    if same:
        keep = ("input_ids", "attention_mask", "weights")
        torch.save({"batches": [{k: b[k] for k in keep} for b in batches], "start": start}, folder / "same.pt")
    peak = peak_memory(device) - (imported if device.type == "cpu" else 0)
    return {
        "seconds": seconds,
        "tokens": progress.tokens,
        "peak": peak,
        "losses": [row["loss"] for row in progress.curve],
    }


def trl_arm(folder: Path, what: str, kind: str, how: str, length: int, gpu: bool) -> dict[str, Any]:
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from luthier.bases.hardware import peak_memory, reset_peak, resident_memory, synchronise

    import_the_model()
    imported = resident_memory()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    held = torch.bfloat16 if gpu and what == "lora" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=held)
    config = SFTConfig(
        output_dir=str(folder / f"trl-{os.getpid()}"), per_device_train_batch_size=8, max_length=length, num_train_epochs=1,
        learning_rate=2e-4, bf16=kind == "bf16", completion_only_loss=True, report_to="none", logging_steps=1, save_strategy="no",
        disable_tqdm=True, use_cpu=not gpu, use_liger_kernel=gpu, seed=0, warmup_steps=0,
        **({"train_sampling_strategy": "group_by_length"} if how == "grouped" else {}),
    )  # fmt: skip
    data = load_dataset("json", data_files=str(folder / "records.jsonl"), split="train", cache_dir=str(folder / "hf"))
    lora = (
        LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEAR, lora_dropout=0.0, task_type="CAUSAL_LM")
        if what == "lora"
        else None
    )
    times: dict[str, float] = {}

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            reset_peak("cuda" if gpu else "cpu")
            times["start"] = time.perf_counter()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            synchronise("cuda" if gpu else "cpu")
            times["end"] = time.perf_counter()

    trainer = SFTTrainer(
        model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora, callbacks=[Clock()]
    )
    if how == "same":
        given = torch.load(folder / "same.pt")
        batches = []
        for b in given["batches"]:
            labels = torch.where(b["weights"] > 0, b["input_ids"], -100)
            batches.append({"input_ids": b["input_ids"], "attention_mask": b["attention_mask"], "labels": labels})
        trainer.get_train_dataloader = lambda: trainer.accelerator.prepare(
            torch.utils.data.DataLoader(batches, batch_size=None)
        )
        for name, value in given["start"].items():  # piece/module/A -> module.lora_A.default.weight
            _, module, letter = name.split("/")
            target = trainer.model.get_submodule(f"base_model.model.{module}.lora_{letter}.default").weight
            target.data.copy_(value)
    trainer.train()
    tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    peak = peak_memory("cuda" if gpu else "cpu") - (0 if gpu else imported)
    return {"seconds": times["end"] - times["start"], "tokens": tokens, "peak": peak, "losses": losses}


def needed_flops(folder: Path, what: str, gpu: bool, length: int) -> float:
    """Floating-point operations that one pass over the records cannot do without, for this model and loss.

    Products of the linear layers: forward and input gradients, for full tuning the weight gradients too; the head at
    supervised tokens; attention scores; of low-rank tuning its own products, forward and both gradients. Everything
    elementwise is left out.
    """
    from transformers import AutoTokenizer

    c = GPU if gpu else CPU
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    d, f, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    kv = d * c["num_key_value_heads"] // c["num_attention_heads"]
    block = layers * (2 * d * d + 2 * d * kv + 3 * d * f)
    vocabulary = 32000 if gpu else len(tokenizer)
    sides = 2 * (d + d) + 2 * (d + kv) + 3 * (d + f)
    low_rank = 3 * layers * RANK * sides if what == "lora" else 0
    total = 0.0
    for line in (folder / "records.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        n, m = (len(tokenizer(row[k])["input_ids"]) for k in ("prompt", "completion"))
        t = min(n + m + 1, length)
        passes = 4 if what == "lora" else 6
        total += passes * (t * block + max(t - n, 0) * vocabulary * d) + 6 * layers * t * t * d + 2 * t * low_rank
    return total


def run_arm(arm: str, folder: Path, what: str, kind: str, gpu: bool, checkpointing: bool) -> dict[str, Any]:
    """One arm in a process of its own, which sees one GPU at most."""
    command = [
        sys.executable,
        __file__,
        "--arm",
        arm,
        "--folder",
        str(folder),
        "--what",
        what,
        "--types",
        kind,
        *(["--gpu"] if gpu else []),
        *(["--checkpointing"] if checkpointing else []),
    ]
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": first})
    if done.returncode:
        raise SystemExit(f"{arm} {what} {kind} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--what", nargs="+", default=["lora", "full"])
    parser.add_argument("--types", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("LUTHIER_DATA", "../shared/data")) / "gsm8k/train.jsonl"
    )
    parser.add_argument("--arm")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--checkpointing", action="store_true", help="luthier recomputes activations, as TRL does")
    args = parser.parse_args()
    length = LENGTH[args.gpu]
    if args.arm:
        tool, _, how = args.arm.partition("-")
        what, kind = args.what[0], args.types[0]
        if tool == "plain":
            from plain import plain_arm

            out = plain_arm(args.folder, what, kind, length, LINEAR, RANK, args.gpu)
        elif tool == "luthier":
            out = luthier_arm(args.folder, what, kind, how == "same", length, args.checkpointing)
        else:
            out = trl_arm(args.folder, what, kind, how, length, args.gpu)
        print(json.dumps(out))
        return
    import torch

    from luthier.bases.hardware import has_bf16, peak_flops

    gpu = torch.cuda.is_available()
    if gpu and any(arm.startswith("trl") for arm in args.arms) and find_spec("liger_kernel") is None:
        raise SystemExit(
            "TRL's arms on a GPU need Liger kernels: pip install liger-kernel, or leave them out of --arms"
        )
    slow_bf16 = not gpu and not has_bf16("cpu")
    summary: dict[str, Any] = {}
    for what in args.what:
        for kind in args.types if not gpu else ["bf16"]:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                few = kind == "bf16" and slow_bf16
                prepare(folder, args.data, min(args.records, 16) if few else args.records, gpu)
                found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in args.arms}
                for _ in range(args.repeats):
                    for arm in args.arms:
                        found[arm].append(run_arm(arm, folder, what, kind, gpu, args.checkpointing))
                rate = peak_flops(
                    "cuda" if gpu else "cpu",
                    torch.bfloat16 if kind == "bf16" and not few else torch.float32,
                    seconds=2.0,
                )
                summary.setdefault(what, {})[kind] = table(
                    what, kind, found, needed_flops(folder, what, gpu, length) / rate
                )
    print(json.dumps(summary))


def table(what: str, kind: str, found: dict[str, list[dict[str, Any]]], ideal_seconds: float) -> dict[str, Any]:
    """Prints one comparison and gives its figures."""
    speed = {arm: statistics.median(r["tokens"] / r["seconds"] for r in rows) for arm, rows in found.items()}
    peak = {arm: statistics.median(r["peak"] for r in rows) for arm, rows in found.items()}
    print(f"\n{what} {kind}")
    for arm in found:
        print(f"  {arm:14s} {speed[arm]:10,.0f} tokens/s   {peak[arm] / 2**20:8,.0f} MiB")
    out: dict[str, Any] = {}
    if "luthier" in found:
        for name, arm in (("", "luthier"), ("_plain", "plain")):
            if arm in found:
                out["of_peak" + name] = share = ideal_seconds / statistics.median(r["seconds"] for r in found[arm])
                print(f"  {arm} reaches {share:.0%} of a bare matrix product's rate")
    for name, ours, theirs in (
        ("", "luthier", "trl"),
        ("_grouped", "luthier", "trl-grouped"),
        ("_same", "luthier-same", "trl-same"),
        ("_plain", "luthier", "plain"),
    ):
        if ours in found and theirs in found:
            out["speed" + name], out["memory" + name] = speed[ours] / speed[theirs], peak[ours] / peak[theirs]
            print(f"  {ours} / {theirs}: speed {out['speed' + name]:.2f}×, memory {out['memory' + name]:.2f}×")
    if "luthier-same" in found and "trl-same" in found:
        a, b = found["luthier-same"][0]["losses"], found["trl-same"][0]["losses"]
        out["loss_difference"] = max(abs(x - y) / y for x, y in zip(a, b, strict=True))
        print(
            f"  largest difference of the losses at a step, identical batches: {out['loss_difference']:.3%} over {len(a)} steps"
        )
    return out


if __name__ == "__main__":
    main()
