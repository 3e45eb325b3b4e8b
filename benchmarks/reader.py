"""A million records through the reader: resident memory growth, time to the first batch, records a second.

    python benchmarks/reader.py [--records 1000000] [--batches 2000]

The records are made in a temporary folder; the tokenizer is trained on them. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

WORDS = (
    "how many apples pears boxes trains miles are left after she gives two to him and then buys three more each".split()
)


def resident() -> float:
    """Resident memory of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise SystemExit("no /proc/self/status here")


def record(draw: random.Random) -> dict[str, list[dict[str, str]]]:
    """A question and a worked answer, about as long as a record of GSM8K."""
    asked = " ".join(draw.choices(WORDS, k=45)) + f" {draw.randrange(1000)}?"
    answer = " ".join(draw.choices(WORDS, k=50)) + f" #### {draw.randrange(1000)}"
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def tokenizer(texts: list[str]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=2048, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    out = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<|pad|>", eos_token="<|end|>")
    out.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
        "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--batches", type=int, default=2000, help="batches of 8 to draw; 0 for a whole epoch")
    asked = parser.parse_args()

    from luthier.data.prepare import prepare
    from luthier.plan.schema import DataSpec

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        draw = random.Random(0)
        some = [json.dumps(record(draw)) for _ in range(20_000)]
        with path.open("w") as f:
            for i in range(asked.records):
                f.write(some[i % len(some)] + "\n")
        tok = tokenizer([json.loads(s)["messages"][1]["content"] for s in some[:2000]])
        spec = DataSpec.model_validate({"train": str(path), "stream": True, "cache": False})
        import luthier.data.collate  # noqa: F401  (torch belongs to the process, not to the reader)

        before, start = resident(), time.perf_counter()
        data = prepare(spec, tok)
        batches = data.batches(8)
        next(batches)
        first = time.perf_counter() - start
        peak, drawn, resume = resident(), 1, 0.0
        for batch in batches:
            drawn += 1
            peak = max(peak, resident()) if drawn % 50 == 0 else peak
            if batch["last"] or drawn == asked.batches:
                break
        seconds = time.perf_counter() - start
        state = json.loads(json.dumps(batches.state_dict()))
        again, start = data.batches(8), time.perf_counter()
        again.load_state_dict(state)
        wanted, found = next(batches), next(again)
        resume = time.perf_counter() - start
        assert wanted["where"] == found["where"], "the resumed reader gave other records"
        result = {
            "records": asked.records,
            "file_mb": round(path.stat().st_size / 2**20),
            "first_batch_s": round(first, 2),
            "growth_mb": round(peak - before),
            "rows_per_s": round(drawn * 8 / seconds),
            "resume_s": round(resume, 2),
            "batches": drawn,
        }
        print(f"first batch after {first:.1f} s, memory grew by {peak - before:.0f} MB, resumed in {resume:.1f} s")
        print(json.dumps(result))


if __name__ == "__main__":
    main()
