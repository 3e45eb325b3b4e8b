"""A sparse mixture assembled from dense models: their feed-forward parts become experts, the rest is the base's."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from luthier.algebra.gates import alike, drawn, gates
from luthier.algebra.outcome import BESIDE, TOKENIZER, vocabulary_of
from luthier.algebra.sources import Source, Tuned
from luthier.algebra.writer import ShardedFile, Spec
from luthier.bases.load import RECOMPUTED
from luthier.errors import LuthierError, nearest
from luthier.parts.seeds import generator_of
from luthier.plan.moe import Expert, MoePlan

MATRICES = ("gate_proj", "up_proj", "down_proj")
BIASES = ("q_proj.bias", "k_proj.bias", "v_proj.bias")


@dataclass(frozen=True)
class Family:
    """An architecture of mixtures, and the dense ones it can be made of."""

    name: str
    config: str
    """transformers' config class."""
    model: str
    of: tuple[str, ...]
    """model_type of the dense models."""
    experts: str
    """Name of the experts' module inside a layer."""
    names: tuple[str, str, str]
    """Names of gate, up and down inside an expert."""
    shared: bool = False
    """Whether there must be one expert that every token passes."""
    biases: bool = False
    """Whether query, key and value carry a bias; zero where the dense models have none."""

    def settings(self, experts: int, per_token: int, inner: int) -> dict[str, Any]:
        """What the config says besides the dense model's own."""
        if self.name == "mixtral":
            return {"num_local_experts": experts, "num_experts_per_tok": per_token, "sliding_window": None}
        told = {
            "num_experts": experts,
            "num_experts_per_tok": per_token,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
        }
        told |= {"moe_intermediate_size": inner}
        if self.shared:
            told |= {"shared_expert_intermediate_size": inner, "sliding_window": None, "use_sliding_window": False}
        return told


FAMILIES = {
    f.name: f
    for f in (
        Family(
            "mixtral",
            "MixtralConfig",
            "MixtralForCausalLM",
            ("llama", "mistral"),
            "block_sparse_moe",
            ("w1", "w3", "w2"),
        ),
        Family(
            "qwen2_moe",
            "Qwen2MoeConfig",
            "Qwen2MoeForCausalLM",
            ("qwen2", "llama", "mistral"),
            "mlp",
            MATRICES,
            True,
            True,
        ),
        Family("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", ("qwen3",), "mlp", MATRICES),
    )
}


@dataclass
class Assembled:
    """What was written."""

    out: Path
    family: str
    experts: int
    tensors: int
    numbers: int
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Made:
    """A tensor of the result, and where its numbers come from, in pieces one after the other."""

    spec: Spec
    pieces: Callable[[], Iterator[Tensor]]


def family_of(plan: MoePlan, sources: Sequence[Source]) -> Family:
    """The architecture the models can be assembled to; the stated one, or the first that takes them."""
    kinds = sorted({str(s.config.get("model_type")) for s in sources})
    if len(kinds) > 1:
        raise LuthierError(f"the models are of types {' and '.join(kinds)}: assemble models of one architecture")
    found = list(FAMILIES.values())
    if plan.architecture is not None:
        wanted = plan.architecture.lower().replace(" ", "_").replace("-", "_")
        named = {n: n for n in FAMILIES} | {
            "qwen_moe": "qwen2_moe",
            "qwen_2_moe": "qwen2_moe",
            "qwen_3_moe": "qwen3_moe",
        }
        meant = {family for name, family in named.items() if name.startswith(wanted)}  # 'qwen' is the one that fits
        if not meant:
            raise LuthierError(f"architecture: no mixture is called '{plan.architecture}': {nearest(wanted, FAMILIES)}")
        found = [f for name, f in FAMILIES.items() if name in meant]
    able = [f for f in found if kinds[0] in f.of and f.shared == bool(plan.shared_experts)]
    if not able:
        shared = [f for f in found if kinds[0] in f.of]
        if shared:
            need = "needs exactly one of shared_experts" if shared[0].shared else "takes no shared_experts"
            raise LuthierError(f"{shared[0].name} {need}, the plan states {len(plan.shared_experts)}")
        made = "; ".join(f"{f.name} of {', '.join(f.of)}" for f in found)
        raise LuthierError(f"no mixture is made of {kinds[0]} models ({made}): state others")
    if able[0].shared and len(plan.shared_experts) != 1:
        raise LuthierError(
            f"{able[0].name} needs exactly one of shared_experts, the plan states {len(plan.shared_experts)}"
        )
    if able[0].shared and not drawn(plan) and not plan.shared_experts[0].positive_prompts:
        raise LuthierError(
            f"{able[0].name} gates its shared expert too: give it positive_prompts, or gate_mode: random"
        )
    return able[0]


def write_moe(
    plan: MoePlan, base: Source, experts: Sequence[Source], new: Path, shard: int, sync: bool = True
) -> Assembled:
    """Writes the mixture of `experts` (in the order of plan.every()) into the fresh folder `new`, tensor by tensor.

    Memory is that of one matrix, and of the base while it reads the prompts. Raises LuthierError where the models do not
    fit each other, one is not whole, or holds NaN.
    """
    family = family_of(plan, [base, *experts])
    if isinstance(base, Tuned) and not drawn(plan):
        raise LuthierError(
            f"{base.name} is a delta on a checkpoint, and the prompts are read by a checkpoint: 'luthier export' it first, or "
            "state gate_mode: random"
        )
    config = _config(plan, family, base)
    for source in experts:
        _fits(base, source, config)
    layers, hidden = config.num_hidden_layers, config.hidden_size
    dtype = getattr(torch, plan.dtype) if plan.dtype else _stored(base)
    notes = []
    sources = {e.source_model for e in plan.experts}
    if len(sources) == 1 and len(plan.experts) > 1:
        notes.append("all experts are the same model: this answers as it does, and is a start for training")
    asked = plan.every() if family.shared else plan.experts
    rows = gates(plan, asked, base, layers, hidden)
    if close := alike(rows):
        where = "all layers" if len(close) == layers else f"layers {', '.join(map(str, close))}"
        notes.append(
            f"the experts' gates are nearly dependent in {where}: prompts that differ more would use them better"
        )
    made = _tensors(plan, family, base, experts, rows.to(dtype), dtype, config)
    config.dtype = dtype
    config.save_pretrained(new)
    for name in (*BESIDE, *TOKENIZER):
        if (base.folder / name).is_file():
            shutil.copyfile(base.folder / name, new / name)
    table = {m.spec.name: m for m in made}
    file = ShardedFile(new, [m.spec for m in made], shard, sync)
    try:
        for name in file.order:
            for piece in table[name].pieces():
                if not torch.isfinite(piece).all():
                    raise LuthierError(
                        f"{name} is not finite in {str(dtype)[6:]}: a source holds NaN or infinity, or dtype is narrow"
                    )
                file.write(name, piece)
        file.close()
    finally:
        file.abandon()
    numbers = sum(m.spec.nbytes // m.spec.dtype.itemsize for m in made)
    _card(plan, family, new, notes)
    _loads(new)
    return Assembled(new, family.name, len(plan.experts), len(made), numbers, notes)


def _config(plan: MoePlan, family: Family, base: Source) -> Any:
    import transformers

    stated = {
        k: v
        for k, v in base.config.items()
        if k not in ("model_type", "architectures", "transformers_version", "auto_map")
    }
    if "rms_norm_eps" not in stated or "intermediate_size" not in stated:
        dense = transformers.AutoConfig.from_pretrained(str(base.folder), local_files_only=True).to_dict()
        stated = {
            k: v for k, v in dense.items() if k not in ("model_type", "architectures", "transformers_version")
        } | stated
    told = family.settings(len(plan.experts), plan.experts_per_token, stated["intermediate_size"])
    config = getattr(transformers, family.config)(**stated | told)
    for key, value in told.items():  # some are put aside by the class
        setattr(config, key, value)
    config.architectures = [family.model]
    return config


def _stored(base: Source) -> torch.dtype:
    stated = base.config.get("dtype") or base.config.get("torch_dtype")
    found = getattr(torch, stated, None) if isinstance(stated, str) else None
    if isinstance(found, torch.dtype):
        return found
    kinds = [base.dtype(n) for n in base.names() if len(base.shape(n)) == 2]
    return max(set(kinds), key=kinds.count)


def _fits(base: Source, source: Source, config: Any) -> None:
    for key in ("num_hidden_layers", "hidden_size", "intermediate_size"):
        ours, theirs = base.config.get(key), source.config.get(key)
        if ours != theirs:
            raise LuthierError(
                f"{key} is {ours} in {base.name} and {theirs} in {source.name}: experts must be of one shape"
            )
    for layer in range(config.num_hidden_layers):
        for matrix in MATRICES:
            name = f"model.layers.{layer}.mlp.{matrix}.weight"
            if name not in source:
                raise LuthierError(
                    f"{source.name} lacks {name}: the checkpoint is not whole, or no dense model of this family"
                )
            wanted = (config.hidden_size, config.intermediate_size)
            wanted = wanted if matrix == "down_proj" else wanted[::-1]
            if source.shape(name) != wanted:
                raise LuthierError(
                    f"{source.name}: {name} is {list(source.shape(name))}, the config says {list(wanted)}: fetch it again"
                )
    files = [s.folder / "tokenizer.json" for s in (base, source)]
    if all(f.is_file() for f in files) and files[0].read_bytes() != files[1].read_bytes():
        ours, theirs = map(vocabulary_of, files)
        if odd := next((t for t, i in theirs.items() if ours.get(t, i) != i), None):
            raise LuthierError(
                f"{source.name} has another tokenizer than {base.name}: {odd!r} is {theirs[odd]} in the one and {ours[odd]} in "
                "the other: experts must share the base's"
            )


def _tensors(
    plan: MoePlan,
    family: Family,
    base: Source,
    experts: Sequence[Source],
    rows: Tensor,
    dtype: torch.dtype,
    config: Any,
) -> list[_Made]:
    made = []

    def one(name: str, shape: Sequence[int], pieces: Callable[[], Iterator[Tensor]]) -> None:
        made.append(_Made(Spec(name, dtype, tuple(shape)), pieces))

    held = set(base.names())
    for name in sorted(held):
        if RECOMPUTED.search(name) or ".mlp." in name:
            continue
        if name.endswith(".bias") and not (family.biases and name.endswith(BIASES)):
            raise LuthierError(
                f"{base.name} has {name}, which {family.name} does not: assemble models without that bias"
            )
        one(name, base.shape(name), _copied(base, name, dtype))
    many = len(plan.experts)
    hidden, inner = config.hidden_size, config.intermediate_size
    for layer in range(config.num_hidden_layers):
        old, at = f"model.layers.{layer}.mlp", f"model.layers.{layer}"
        router = f"{at}.mlp.gate.weight" if plan.layout == "fused" else f"{at}.{family.experts}.gate.weight"
        one(router, (many, hidden), _given(rows[layer, :many]))
        if family.biases:
            for bias in BIASES:
                width = base.shape(f"{at}.self_attn.{bias.replace('bias', 'weight')}")[0]
                if f"{at}.self_attn.{bias}" not in held:
                    one(f"{at}.self_attn.{bias}", (width,), _given(torch.zeros(width, dtype=dtype)))
        pairs = list(zip(plan.every(), experts, strict=True))
        if family.shared:
            one(f"{at}.mlp.shared_expert_gate.weight", (1, hidden), _given(rows[layer, many:]))
            for matrix in MATRICES:
                name = f"{old}.{matrix}.weight"
                one(f"{old}.shared_expert.{matrix}.weight", base.shape(name), _taken(plan, pairs[many:], [name], dtype))
        if plan.layout == "fused":
            gate, up, down = (f"{old}.{m}.weight" for m in MATRICES)
            one(f"{old}.experts.gate_up_proj", (many, 2 * inner, hidden), _taken(plan, pairs[:many], [gate, up], dtype))
            one(f"{old}.experts.down_proj", (many, hidden, inner), _taken(plan, pairs[:many], [down], dtype))
            continue
        for e in range(many):
            for matrix, new in zip(MATRICES, family.names, strict=True):
                name = f"{old}.{matrix}.weight"
                target = f"{at}.{family.experts}.experts.{e}.{new}.weight"
                one(target, base.shape(name), _taken(plan, pairs[e : e + 1], [name], dtype, e))
    return made


def _copied(source: Source, name: str, dtype: torch.dtype) -> Callable[[], Iterator[Tensor]]:
    return lambda: iter([source.read(name).to(dtype)])


def _given(tensor: Tensor) -> Callable[[], Iterator[Tensor]]:
    return lambda: iter([tensor.contiguous()])


def _taken(
    plan: MoePlan, pairs: Sequence[tuple[Expert, Source]], names: Sequence[str], dtype: torch.dtype, first: int = 0
) -> Callable[[], Iterator[Tensor]]:
    """The experts' matrices of these names, expert by expert."""

    def pieces() -> Iterator[Tensor]:
        for k, (expert, source) in enumerate(pairs):
            for name in names:
                value = source.read(name)
                if expert.noise_scale:
                    g = generator_of(plan.seed, first + k, name)
                    value = value + torch.randn(value.shape, generator=g).to(value.dtype) * expert.noise_scale
                if expert.residual_scale is not None and "down_proj" in name:
                    value = value * expert.residual_scale
                yield value.to(dtype).contiguous()

    return pieces


def _card(plan: MoePlan, family: Family, new: Path, notes: Sequence[str]) -> None:
    stated = plan.model_dump(mode="json", exclude_defaults=True)
    for row in [stated, *stated["experts"], *stated.get("shared_experts", [])]:
        for key in ("base_model", "source_model"):
            if key in row:
                row[key] = "".join(
                    f"{mark}{row[key][k]}"
                    for mark, k in (("", "path"), ("@", "revision"), ("+", "lora"))
                    if row[key].get(k)
                )
    written = yaml.safe_dump(stated, sort_keys=False, allow_unicode=True, width=110)
    (new / "moe.yaml").write_text(written, encoding="utf-8")
    listed = "\n".join(f"- {e.source_model}" for e in plan.every())
    remarks = "".join(f"\n- {n}" for n in notes)
    (new / "README.md").write_text(
        f"---\nlibrary_name: transformers\ntags:\n- moe\n- luthier\n---\n\n# A mixture of {len(plan.experts)} experts ({family.name})\n\n"
        f"Assembled by luthier on `{plan.base_model}` from\n\n{listed}\n\nThe plan, `luthier merge moe.yaml --out FOLDER`:\n\n"
        f"```yaml\n{written}```\n{remarks}\n",
        encoding="utf-8",
    )


def _loads(new: Path) -> None:
    """Every parameter of the model that transformers makes of the folder is there."""
    from luthier.bridge.checkpoint import Checkpoint

    written = Checkpoint(new)
    if lost := [n for n in written.names if n not in written]:
        raise LuthierError(f"the mixture lacks {lost[0]} ({len(lost)} such): the base's checkpoint is not whole")
