"""Folders in 8 and 4 bits, against decoders of their own, written for the test number by number."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_ranks
from families_table import write
from safetensors.torch import load_file, save_file
from test_round_trip import every_token, forward, tokens

from megadpo.config import ModelConfig, ParallelConfig
from megadpo.convert.exporter import export_hf
from megadpo.convert.families import read_shape
from megadpo.convert.importer import check_hf, load_hf
from megadpo.convert.quantised import open_folder
from megadpo.convert.to_checkpoint import import_hf
from megadpo.errors import ModelError

BLOCK = (16, 24)
"""Neither divides the sides of the small model: the last blocks are cut off."""
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def e4m3(byte: int) -> float:
    """Sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7F is NaN."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return math.nan
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if byte & 128 else size


def e2m1(bits: int) -> float:
    """Sign, 2 bits of exponent (bias 1), 1 of mantissa."""
    exponent, mantissa = bits >> 1 & 3, bits & 1
    size = mantissa / 2 if exponent == 0 else (2 + mantissa) * 2.0 ** (exponent - 2)
    return -size if bits & 8 else size


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], **fields: Any) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


def in_fp8(folder: Path) -> dict[str, torch.Tensor]:
    """Turn a DeepSeek-V3 folder into one in FP8; returns what it means."""
    generator, meaning, stored = torch.Generator().manual_seed(0), {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        meaning[name] = stored[name] = weight
        if weight.dim() == 2 and "gate." not in name and "embed" not in name and "lm_head" not in name:
            rows, columns = weight.shape
            bytes_ = torch.randint(0, 256, weight.shape, generator=generator, dtype=torch.uint8)
            bytes_[(bytes_ & 127) == 127] = 3
            sides = [-(-n // b) for n, b in zip(weight.shape, BLOCK, strict=True)]
            factors = torch.rand(*sides, generator=generator) * 0.004
            stored[name] = bytes_.view(torch.float8_e4m3fn)
            stored[name + "_scale_inv"] = factors
            values = [
                [
                    np.float32(e4m3(int(bytes_[i, j]))) * factors[i // BLOCK[0], j // BLOCK[1]].numpy()
                    for j in range(columns)
                ]
                for i in range(rows)
            ]
            meaning[name] = torch.from_numpy(np.array(values, dtype=np.float32))
    rewrite(folder, stored, quantization_config=FP8)
    return meaning


def in_mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """Turn a gpt-oss folder into one whose experts are MXFP4; returns what it means."""
    generator, meaning, stored = torch.Generator().manual_seed(0), {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        meaning[name] = stored[name] = weight
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = weight.shape
            assert columns % 32 == 0
            blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(120, 126, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
            del stored[name]
            stored[name + "_blocks"], stored[name + "_scales"] = blocks, scales
            found = np.zeros((experts, columns, rows), dtype=np.float32)
            for e, r, g, b in np.ndindex(*blocks.shape):
                power = 2.0 ** (int(scales[e, r, g]) - 127)
                byte = int(blocks[e, r, g, b])
                found[e, 32 * g + 2 * b, r] = e2m1(byte & 15) * power
                found[e, 32 * g + 2 * b + 1, r] = e2m1(byte >> 4) * power
            meaning[name] = torch.from_numpy(found)
    rewrite(folder, stored, quantization_config=MXFP4)
    return meaning


CASES = {
    "deepseek_v3": (in_fp8, {"num_hidden_layers": 2}),
    "gpt_oss": (in_mxfp4, {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 32}),
}


@torch.no_grad()
def logprobs(
    device: torch.device, folders: list[Path], parallel: ParallelConfig, out: Path | None
) -> list[torch.Tensor]:
    from megatron.core import dist_checkpointing

    from megadpo.checkpoint import METADATA
    from megadpo.model.build import build_chunks
    from megadpo.parallel.context import grid

    found = []
    for folder in folders:
        shape = read_shape(folder)
        with grid(parallel, device, 0) as context:
            chunks = build_chunks(shape, parallel, context, ModelConfig("", "float32"))
            load_hf(chunks, shape, folder)
            found.append(
                forward(chunks, context, every_token(tokens(shape.vocab_size), shape.vocab_size), shape.vocab_size)
            )
            if out is not None:
                state = {"model": chunks[0].sharded_state_dict(metadata=dict(METADATA))}
                dist_checkpointing.save(state, str(out), content_metadata=dict(METADATA))
    return found


@pytest.mark.parametrize("name", CASES)
def test_decoded_like_number_by_number(name: str, tmp_path: Path) -> None:
    """As tensors, as slices, in the model on two grids, imported; the export is plain float32 and not marked."""
    quantise, changes = CASES[name]
    folder, plain = (write(name, tmp_path / which, **changes) for which in ("quantised", "plain"))
    meaning = quantise(folder)
    rewrite(plain, meaning)
    check_hf(read_shape(folder), folder)
    files = open_folder(folder)
    assert files.where.keys() == meaning.keys()
    for tensor, values in meaning.items():
        assert files.stored(tensor).shape == tuple(values.shape)
        whole = tuple(slice(0, n) for n in values.shape)
        assert torch.equal(files.slice(tensor)[whole], values)
        inside = tuple(slice(n // 3, n - n // 4) for n in values.shape)
        assert torch.equal(files.slice(tensor)[inside], values[inside])
    (tmp_path / "checkpoint").mkdir()
    [[got]] = run_ranks(1, logprobs, [folder], ParallelConfig(), tmp_path / "checkpoint")
    import_hf(folder, tmp_path / "in")
    [[want, imported]] = run_ranks(1, logprobs, [plain, tmp_path / "in"], ParallelConfig(), None)
    assert torch.equal(got, want)
    assert torch.equal(imported, want)
    for ranks in run_ranks(
        2, logprobs, [folder], ParallelConfig(2, expert_model_parallel_size=2, sequence_parallel=True), None
    ):
        assert (ranks[0] - want).abs().max() < 1e-4
    export_hf(tmp_path / "checkpoint", folder, tmp_path / "out", dtype="float32")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == meaning.keys()
    assert all(torch.equal(after[x], meaning[x]) for x in after)
    before = json.loads((folder / "config.json").read_text())
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {key: value for key, value in before.items() if key != "quantization_config"}


def broken(folder: Path, change: Any) -> str:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as error:
        check_hf(read_shape(folder), folder)
    assert "\n" not in str(error.value)
    return str(error.value)


UP = "model.layers.1.mlp.experts.2.up_proj.weight"


def test_fp8_with_missing_and_misshapen_factors(tmp_path: Path) -> None:
    folder = write("deepseek_v3", tmp_path, **CASES["deepseek_v3"][1])
    in_fp8(folder)
    line = broken(folder, lambda t: t.update({UP + "_scale_inv": torch.ones(3, 3)}))
    assert f"{UP}_scale_inv is 3 x 3 of F32; for {UP} (24 x 48) it must be 2 x 2 of F32" in line
    line = broken(folder, lambda t: t.pop(UP + "_scale_inv"))
    assert f"dtype other than F32, F16, BF16 (convert to bfloat16 first): {UP} (F8_E4M3)" in line


def test_mxfp4_with_missing_and_misshapen_scales(tmp_path: Path) -> None:
    folder = write("gpt_oss", tmp_path, **CASES["gpt_oss"][1])
    in_mxfp4(folder)
    down = "model.layers.0.mlp.experts.down_proj"
    line = broken(folder, lambda t: t.update({down + "_scales": torch.ones(4, 64, 2, dtype=torch.uint8)}))
    assert f"{down}_blocks is 4 x 64 x 1 x 16 of U8 and {down}_scales 4 x 64 x 2 of U8; must be experts" in line
    line = broken(folder, lambda t: t.pop(down + "_scales"))
    assert f"missing: {down}; not part of the model that config.json describes: {down}_blocks" in line


def test_a_group_that_is_no_number(tmp_path: Path) -> None:
    folder = write("gpt_oss", tmp_path, **CASES["gpt_oss"][1])
    in_mxfp4(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.experts.down_proj_scales"][1, 2, 0] = 255
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = open_folder(folder).slice("model.layers.0.mlp.experts.down_proj")[slice(0, 4), slice(0, 32), slice(0, 64)]
    assert int(values.isnan().sum()) == 32


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("deepseek_v3", {"quant_method": "awq"}, "supported: quant_method fp8, or none"),
        ("deepseek_v3", MXFP4, "supported: quant_method fp8, or none"),
        ("deepseek_v3", FP8 | {"fmt": "e5m2"}, "supported: fmt e4m3"),
        ("deepseek_v3", FP8 | {"weight_block_size": [128]}, "weight_block_size as two positive whole numbers"),
        ("deepseek_v3", FP8 | {"weight_block_size": None}, "weight_block_size as two positive whole numbers"),
        ("gpt_oss", FP8, "supported: quant_method mxfp4, or none"),
        ("gpt_oss", "mxfp4", "supported: quant_method mxfp4, or none"),
        ("deepseek_v2", FP8, "quantization_config is"),
        ("mixtral", {"quant_method": "gptq"}, "quantization_config is"),
    ],
)
def test_other_quantisation_is_refused(name: str, value: Any, message: str, tmp_path: Path) -> None:
    folder = write(name, tmp_path)
    rewrite(folder, {}, quantization_config=value)
    with pytest.raises(ModelError, match="quantization_config") as error:
        read_shape(folder)
    assert message in str(error.value)
