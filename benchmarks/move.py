"""What moving costs: an assembly beside its large model alone, with and without drafts, and a port. Prints JSON last.

    python benchmarks/move.py [--layers 16] [--hidden 512] [--tokens 48] [--out /tmp/move.json]

The bases are random and made on the spot. The small one is the first two layers of the large one, whose other layers are
nearly silent, by --noise: 0 makes both models one function, so that every drafted token stays (the most that drafting can
bring); more noise lets fewer stay. Times are CPU seconds of this process on one thread, unless OMP_NUM_THREADS says
otherwise, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.attach import attached
from luthier.attach.sites import parameter_items, sites_for
from luthier.bases.locate import locate
from luthier.bridge.proof import prove
from luthier.bridge.target import target
from luthier.delta import FORMS
from luthier.delta.artefact import Delta
from luthier.plan.schema import BaseSpec
from luthier.sampling.generate import generate
from luthier.sampling.speculative import speculate
from luthier.verbs.assemble import assemble
from luthier.verbs.port import port


def base(folder: Path, layers: int, hidden: int, noise: float, of: Path | None = None) -> Path:
    """A random Llama, of whose layers only the first two write much into the residual stream; or the first layers `of`
    another."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=8, intermediate_size=hidden * 11 // 4,
        vocab_size=8192, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=None, bos_token_id=1,
        initializer_range=0.05,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if of is not None:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(of).state_dict(), strict=False)
    for layer in model.model.layers[2:]:
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):  # pyright: ignore
            part.weight.data.mul_(noise)
    model.save_pretrained(folder)
    for path in locate(BaseSpec.model_validate({"name": "practice"}), weights=False).glob("*token*"):
        shutil.copy(path, folder)
    return folder


def delta(place: Path, form: str | None, size: float = 0.02) -> Delta:
    """LoRA of rank 8 everywhere, or every parameter moved."""
    on = target(str(place))
    handle, g = attached(on.model), torch.Generator().manual_seed(1)
    if form:
        kind = FORMS.make(form, {"rank": 8})
        piece = handle.build(form, kind, sites_for(on.roles, kind))
        for numbers in piece.p.values():
            numbers["B"] = size * torch.randn(numbers["B"].shape, generator=g)
        handle.detach()
        return prove(Delta([piece]), on)
    items = parameter_items(on.roles, on.model)
    for edit in handle.move("full", dict.fromkeys(items)):
        edit.parameter.data.add_(size * torch.randn(edit.parameter.shape, generator=g) * edit.parameter.data.std())
    made = handle.delta(items)
    handle.detach()
    return prove(made, on)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """(CPU seconds, what it gave), after one run to warm up."""
    run()
    begin = time.process_time()
    found = run()
    return time.process_time() - begin, found


def weights(model: Any, more: list[Any] | None = None) -> int:
    """Bytes of all tensors of a model, each storage once."""
    tensors = [*model.parameters(), *(v for voice in more or [] for v in voice.moved.values())]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def decoding(folder: Path, tokens: int, batch: int, noise: float) -> list[dict[str, Any]]:
    """Tokens a CPU second of the large model alone and of assemblies, at one batch size."""
    prompts = torch.randint(3, 8192, (batch, 16), generator=torch.Generator().manual_seed(2)).tolist()
    rows: list[dict[str, Any]] = []

    def row(name: str, seconds: float, size: int, **more: Any) -> None:
        rows.append({"arm": name, "batch": batch, "noise": noise, "tokens_per_second": batch * tokens / seconds,
                     "mebibytes": size / 2**20, **more})  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)

    for expert in ("lora", "full"):
        plan = {"large": str(folder / "large"), "expert": str(folder / expert), "base": str(folder / "small")}
        for method in ("proxy", "emulated-fine-tuning", "dynamic-fusion") if expert == "lora" else ("proxy",):
            made = assemble({**plan, "method": method})
            size = weights(made.model, made.model.voices)
            if expert == "lora" and method == "proxy":
                with made.model.off():
                    spent, _ = timed(lambda m=made: generate(m.model, None, prompts, tokens, stop=()))
                row("large alone", spent, weights(made.model.large.model))
            spent, plain = timed(lambda m=made: generate(m.model, None, prompts, tokens, stop=()))
            row(f"{method}, {expert}", spent, size)
            if batch == 1 and method == "proxy":
                for width in (4, 8):
                    spent, found = timed(
                        lambda m=made, w=width: speculate(m.model, None, prompts, tokens, width=w, stop=())
                    )
                    same = found.answers == plain
                    row(
                        f"{method}, {expert}, drafts of {width}",
                        spent,
                        size,
                        kept=found.share,
                        passes=found.passes,
                        same=same,
                    )
    return rows


def ports(folder: Path) -> list[dict[str, Any]]:
    """CPU seconds of a port by what is carried, and the peak of the resident set so far."""
    rows = []
    for name in ("lora-large", "full-large"):
        begin = time.process_time()
        done = port(Delta.load(folder / name), folder / "newer")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rows.append({"arm": f"port {name.split('-')[0]}", "cpu_seconds": time.process_time() - begin,
                     "delta_mebibytes": done.delta.nbytes() / 2**20, "peak_rss_mebibytes": peak / 2**10})  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Makes the models, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--out", type=Path)
    stated = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rows: list[dict[str, Any]] = []
    for noise in stated.noise:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            base(folder / "large", stated.layers, stated.hidden, noise)
            base(folder / "small", 2, stated.hidden, noise, of=folder / "large")
            delta(folder / "small", "lora").save(folder / "lora")
            delta(folder / "small", None, 0.1).save(folder / "full")
            for batch in (1, 8) if noise == stated.noise[0] else (1,):
                rows += decoding(folder, stated.tokens, batch, noise)
            if noise == stated.noise[0]:
                delta(folder / "large", "lora").save(folder / "lora-large")
                delta(folder / "large", None, 0.1).save(folder / "full-large")
                base(folder / "newer", stated.layers, stated.hidden, 0.2)
                rows += ports(folder)
    told = {
        "layers": stated.layers,
        "hidden": stated.hidden,
        "tokens": stated.tokens,
        "torch": torch.__version__,
        "rows": rows,
    }
    if stated.out:
        stated.out.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
