"""Run files and searches for the planner's tests."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from counted import count

from megadpo.config import Config
from megadpo.config.decode import load_config
from megadpo.observe.gpus import GPUS, Gpu
from megadpo.plan.grids import Candidate, Space
from megadpo.plan.search import Search
from megadpo.plan.workload import Assumed, assumed
from megadpo.train.inputs import read_shapes

SHAPES = Path(__file__).resolve().parents[2] / "launch" / "recipes" / "shapes"


def run_file(folder: Path, model: str | Path = "llama3.1-8b", **sections: dict[str, Any]) -> Path:
    """A run file whose data is not there; `model` is one of launch/recipes/shapes or a folder."""
    settings: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(SHAPES / model)},
        "data": {"train": str(folder / "none.jsonl"), "max_length": 2048},
        "batch": {"global_batch_size": 64},
    }
    for name, section in sections.items():
        settings[name] = settings.get(name, {}) | section
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def config(folder: Path, model: str | Path = "llama3.1-8b", **sections: dict[str, Any]) -> Config:
    return load_config(run_file(folder, model, **sections), [])


def search(given: Config, gpus: int, gpu: str | Gpu = "h100-80gb", spread: float = 0.5) -> Search:
    shapes, share = read_shapes(given, 1), given.batch.share_prompt
    lengths = assumed(Assumed(10_000, 2, 200, 300, spread), given.data.max_length, share, shapes.policy)
    device = GPUS[gpu] if isinstance(gpu, str) else gpu
    return Search(Space(given, shapes, device, gpus, lengths.longest), lengths, count)


BASE = Candidate(1, 1, None, 8, 1, False, 8192, "none", "precomputed")


def candidate(**fields: Any) -> Candidate:
    return replace(BASE, **fields)


def with_experts(folder: Path) -> Path:
    """config.json of a small Mixtral."""
    model = folder / "mixtral"
    model.mkdir()
    settings = json.loads((SHAPES / "llama3.1-8b" / "config.json").read_text())
    settings |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 8}
    settings |= {"num_experts_per_tok": 2, "num_hidden_layers": 4, "sliding_window": None, "rope_scaling": None}
    (model / "config.json").write_text(json.dumps(settings))
    return model
