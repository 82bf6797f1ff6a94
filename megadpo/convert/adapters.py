"""LoRA adapters: PEFT's folders, PEFT's and Megatron's names for the same matrices, and merging.

The update of a linear layer is scale * B A, with A [r, in] and B [out, r] (Hu et al. 2021, section 4.1, arXiv
2106.09685); scale is lora_alpha / r, or lora_alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski 2023, arXiv
2312.03732).

| | A | B |
|---|---|---|
| PEFT | base_model.model.MODULE.lora_A.weight | base_model.model.MODULE.lora_B.weight |
| Megatron | MODULE.adapter.linear_in.weight | MODULE.adapter.linear_out.weight |

MODULE is the name in the Hugging Face model, and the one in Megatron's. Which Hugging Face modules make up which
Megatron module is read off the family's table. Where Megatron fuses several (q, k and v; gate and up), its A is theirs
one below the other and its B is block form: a module's rows are zero outside the columns of its own A. So the fused
product is exactly the modules' products, and taking the blocks apart gives back the same bits.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from megadpo.convert.config_json import ConfigJson, positive
from megadpo.convert.families import megatron_tensors
from megadpo.convert.hf_files import HFFiles, all_finite, by, read_header, some
from megadpo.convert.shape import ModelShape
from megadpo.convert.tables import MegatronTensor, Rows, hf_shapes
from megadpo.errors import ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
GATE_UP = re.compile(r"\.weight_[wv]$")
HARMLESS = (
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
    ),
    *("alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_dropout", "r", "rank_pattern", "use_rslora"),
    *("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules", "qalora_group_size"),
    *("corda_config", "eva_config", "loftq_config", "megatron_config", "megatron_core", "runtime_config"),
)
"""Fields that are read, or that say nothing about what the matrices mean. Any other, when set (use_dora,
modules_to_save, fan_in_fan_out, lora_bias, target_parameters ...), may make the adapter other than scale * B A, and is
refused."""
PLAIN_INIT = (None, True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base weights alone; pissa, olora, corda and loftq change them."""


@dataclass(frozen=True)
class Pair:
    """One module's update: scale * B @ A."""

    A: Tensor
    B: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True)
class Peft:
    """A PEFT LoRA folder: its pairs by the Hugging Face module's name, and its adapter_config.json."""

    folder: Path
    pairs: dict[str, Pair]
    config: dict[str, Any]


@dataclass(frozen=True)
class Fused:
    """One Megatron module's adapter.

    linear_in: A, [sum of the ranks, in]. linear_out: B, [rows of the Megatron weight, sum of the ranks]. blocks: the
    Hugging Face module, rank and scale of each run of columns of B. The update is the sum over blocks of
    scale * B[:, columns] @ A[columns].
    """

    linear_in: Tensor
    linear_out: Tensor
    blocks: tuple[tuple[str, int, float], ...]

    def update(self) -> Tensor:
        """The whole update in float64, [rows, in]."""
        scale = [scale for _, rank, scale in self.blocks for _ in range(rank)]
        columns = torch.tensor(scale, dtype=torch.float64)
        return (self.linear_out.double() * columns) @ self.linear_in.double()


def read_peft(folder: str | Path) -> Peft:
    """A folder that PEFT's save_pretrained wrote. ModelError names the field or tensor that cannot be carried."""
    folder = Path(folder).expanduser()
    config = ConfigJson(folder, CONFIG)
    config.require("peft_type", "LORA")
    config.require("bias", "none")
    if config.get("init_lora_weights") not in PLAIN_INIT:
        raise config.wrong(
            "init_lora_weights", "true, false, gaussian, eva, orthogonal: others change the base weights"
        )
    for field in sorted(config.values.keys() - set(HARMLESS)):
        if config.get(field):
            raise config.wrong(field, "only adapters without it (plain LoRA on linear layers)")
    halves = _read_halves(folder)
    pairs: dict[str, Pair] = {}
    for name in sorted(halves):
        if set(halves[name]) != {"A", "B"}:
            raise ModelError(f"{folder / WEIGHTS}: {name} has lora_{''.join(halves[name])} without the other half")
        A, B = halves[name]["A"], halves[name]["B"]
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or not A.numel() or not B.numel():
            raise ModelError(
                f"{folder / WEIGHTS}: {name} has A {by(tuple(A.shape))} and B {by(tuple(B.shape))}; must be rank x in "
                "and out x rank"
            )
        pairs[name] = Pair(A, B, _scale(config, name, A.shape[0]))
    return Peft(folder, pairs, config.values)


def _read_halves(folder: Path) -> dict[str, dict[str, Tensor]]:
    """module -> "A", "B" -> values."""
    path = folder / WEIGHTS
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise ModelError(f"{folder}: has only adapter_model.bin, a pickle; save the adapter again as {WEIGHTS}")
    header = read_header(path)
    files = OneFile(folder, WEIGHTS)
    halves: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name in header.tensors:
        found = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", name)
        if found is None:
            unknown.append(name)
            continue
        files.dtype(name)
        values = files.slice(name)[:]
        if not all_finite(values):
            raise ModelError(f"{path}: {name} has NaN or Inf: the adapter is damaged")
        halves.setdefault(found[1], {})[found[2]] = values
    if unknown or not halves:
        wrong = some("not a LoRA matrix of a linear layer: ", sorted(unknown)) or "holds no tensors"
        raise ModelError(f"{path}: {wrong}; supported: {PREFIX}MODULE.lora_A.weight and lora_B.weight")
    return halves


class OneFile(HFFiles):
    """The tensors of one safetensors file of any name."""

    def __init__(self, folder: Path, file: str) -> None:
        super().__init__(folder)
        self.source = file
        self.located = dict.fromkeys(self.header(file).tensors, file)


def _scale(config: ConfigJson, module: str, rank: int) -> float:
    expected = _by_pattern(config, "rank_pattern", module, "r")
    if expected != rank:
        raise config.wrong("r", f"{rank}, the rank of {module} in {WEIGHTS}")
    alpha = _by_pattern(config, "alpha_pattern", module, "lora_alpha")
    return alpha / (math.sqrt(rank) if config.flag("use_rslora", default=False) else rank)


def _by_pattern(config: ConfigJson, patterns: str, module: str, default: str) -> float:
    """The number for a module: of the first entry of `patterns` that names it or its end, else the field `default`."""
    table = config.get(patterns) or {}
    if not isinstance(table, dict) or any(re.fullmatch(r"\^?[\w.]+", key) is None for key in table):
        raise config.wrong(patterns, "an object whose keys are names of modules, or the ends of such names")
    value = next((x for key, x in table.items() if _named(module, key)), config.get(default))
    if not positive(value):
        raise config.wrong(default if value is config.get(default) else patterns, "positive numbers")
    return float(value)


def _named(module: str, key: str) -> bool:
    return module == key.removeprefix("^") or (not key.startswith("^") and module.endswith("." + key))


def check_fits(peft: Peft, shape: ModelShape) -> None:
    """ModelError lists the modules that the model has not, and those of another shape."""
    known = _linear_modules(*megatron_tensors(shape).values())
    unknown = sorted(peft.pairs.keys() - known.keys())
    misshapen = [
        f"{name} ({by((pair.B.shape[0], pair.A.shape[1]))}, not {by(known[name])})"
        for name, pair in peft.pairs.items()
        if name in known and known[name] != (pair.B.shape[0], pair.A.shape[1])
    ]
    problems = some("not linear layers of the model: ", unknown), some("wrong shape: ", misshapen)
    if any(problems):
        raise ModelError(f"{peft.folder} does not fit the model: {'; '.join(x for x in problems if x)}")


def _linear_modules(*tensors: MegatronTensor) -> dict[str, tuple[int, ...]]:
    """The Hugging Face linear layers that Megatron tensors are the weights of; the embedding's B A is transposed."""
    matrices = (x for x in tensors if len(x.shape) == 2 and not x.key.startswith("embedding."))
    shapes = hf_shapes(*matrices)
    return {name.removesuffix(".weight"): dims for name, dims in shapes.items() if name.endswith(".weight")}


# ---- Megatron's names


def to_megatron(peft: Peft, shape: ModelShape) -> dict[str, Fused]:
    """The adapter by Megatron module (decoder.layers.0.self_attention.linear_qkv ...), block form where it is fused.

    ModelError as `check_fits`.
    """
    check_fits(peft, shape)
    return {
        module: fused for module, (rows, _) in _modules(shape).items() if (fused := _fuse(peft.pairs, rows)) is not None
    }


def _modules(shape: ModelShape) -> dict[str, tuple[tuple[Rows, ...], tuple[str, ...]]]:
    """Megatron's linear modules: the rows of each, and the Hugging Face modules they come from, in order. Gate and up,
    two tensors in the table, are one module."""
    found: dict[str, tuple[Rows, ...]] = {}
    for tensor in megatron_tensors(shape).values():
        if _linear_modules(tensor):
            module = GATE_UP.sub("", tensor.key).removesuffix(".weight")
            found[module] = (*found.get(module, ()), *tensor.rows)
    return {module: (rows, tuple(dict.fromkeys(x.name for x in rows))) for module, rows in found.items()}


def _fuse(pairs: Mapping[str, Pair], rows: tuple[Rows, ...]) -> Fused | None:
    parts = [(name, pairs.get(name.removesuffix(".weight"))) for name in dict.fromkeys(x.name for x in rows)]
    present = {name: pair for name, pair in parts if pair is not None}
    if not present:
        return None
    height, width = sum(x.count for x in rows), sum(pair.rank for pair in present.values())
    dtype = next(iter(present.values())).B.dtype
    linear_out, column = torch.zeros(height, width, dtype=dtype), 0
    for name, pair in present.items():
        at = 0
        for part in rows:
            if part.name == name:
                block = pair.B[part.start : part.start + part.count]
                linear_out[at : at + part.count, column : column + pair.rank] = block
            at += part.count
        column += pair.rank
    blocks = tuple((name.removesuffix(".weight"), pair.rank, pair.scale) for name, pair in present.items())
    return Fused(torch.cat([pair.A for pair in present.values()]), linear_out, blocks)


def from_megatron(adapters: Mapping[str, Fused], shape: ModelShape) -> dict[str, Pair]:
    """The pairs by Hugging Face module: `to_megatron` backwards.

    A fused adapter with a single block serves all its modules (what Megatron trains when q, k and v share one A); each
    of them then gets A, and its own rows of B.
    """
    modules = _modules(shape)
    pairs: dict[str, Pair] = {}
    for module, fused in adapters.items():
        rows, names = modules[module]
        shared = len(fused.blocks) == 1 and len(names) > 1 and fused.blocks[0][0] == ""
        targets = [name.removesuffix(".weight") for name in names] if shared else [x[0] for x in fused.blocks]
        column = 0
        for number, target in enumerate(targets):
            _, rank, scale = fused.blocks[0 if shared else number]
            columns = slice(column, column + rank)
            pairs[target] = Pair(
                fused.linear_in[columns].clone(), _rows_of(fused.linear_out, rows, target, columns), scale
            )
            column += 0 if shared else rank
    return pairs


def _rows_of(linear_out: Tensor, rows: tuple[Rows, ...], module: str, columns: slice) -> Tensor:
    """A Hugging Face module's own rows of a fused B, in its own order."""
    mine, at = {}, 0
    for part in rows:
        if part.name.removesuffix(".weight") == module:
            mine[part.start] = linear_out[at : at + part.count, columns]
        at += part.count
    return torch.cat([mine[start] for start in sorted(mine)]).contiguous()


def write_peft(folder: str | Path, pairs: Mapping[str, Pair], base_model: str | None, rslora: bool = False) -> None:
    """Write adapter_config.json and adapter_model.safetensors as PEFT reads them.

    base_model: name or path for base_model_name_or_path. rslora: scales are lora_alpha / sqrt(r).
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    ranks = {name: pair.rank for name, pair in pairs.items()}
    alphas = {
        name: _whole(pair.scale * (math.sqrt(pair.rank) if rslora else pair.rank)) for name, pair in pairs.items()
    }
    rank, alpha = _commonest(ranks), _commonest(alphas)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: x for name, x in ranks.items() if x != rank},
        "alpha_pattern": {name: x for name, x in alphas.items() if x != alpha},
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in pairs}),
        "use_rslora": rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    # Only the modules that have an adapter, where a name's end alone would take in others.
    config["target_modules"] = sorted(pairs) if _ambiguous(pairs) else config["target_modules"]
    tensors = {f"{PREFIX}{name}.lora_{x}.weight": getattr(pair, x) for name, pair in pairs.items() for x in "AB"}
    (folder / WEIGHTS).write_bytes(save({k: v.contiguous() for k, v in tensors.items()}, metadata={"format": "pt"}))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _ambiguous(pairs: Mapping[str, Pair]) -> bool:
    """Whether some layers have an adapter on a kind of module and others have none."""
    ends: dict[str, set[str]] = {}
    for name in pairs:
        ends.setdefault(name.rsplit(".", 1)[-1], set()).add(name)
    return len({len(names) for names in ends.values()}) > 1


def _whole(value: float) -> float | int:
    return round(value) if abs(value - round(value)) < 1e-9 else value


def _commonest(values: Mapping[str, Any]) -> Any:
    counted = list(values.values())
    return max(dict.fromkeys(counted), key=counted.count)


# ---- merging


class MergedFiles(HFFiles):
    """A folder's weights with an adapter merged in: W + scale * B A, summed in float64 and rounded to float32 once."""

    def __init__(self, folder: Path, peft: Peft, shape: ModelShape) -> None:
        super().__init__(folder)
        check_fits(peft, shape)
        self._pairs = {f"{module}.weight": pair for module, pair in peft.pairs.items()}

    def slice(self, name: str) -> Any:
        stored = super().slice(name)
        return MergedSlice(stored, self._pairs[name]) if name in self._pairs else stored


@dataclass(frozen=True)
class MergedSlice:
    """Index it to read part of W + scale * B A, as float32."""

    weight: Any
    pair: Pair

    def __getitem__(self, part: tuple[slice, slice]) -> Tensor:
        rows, columns = part if isinstance(part, tuple) else (part, slice(None))
        update = self.pair.B[rows].double() @ self.pair.A[:, columns].double()
        return (self.weight[part].double() + update * self.pair.scale).float()
