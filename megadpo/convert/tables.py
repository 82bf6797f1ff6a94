"""What a model family's table is made of: one row per weight, read in both directions. No Megatron here.

Left stands the Megatron-Core checkpoint key, right the Hugging Face name. Nothing else needs saying, because
Megatron-Core resolves the rest itself: under `sharded_state_dict(metadata={"singleton_local_shards": True})`
every layer has its number in the key, gate and up projection come apart, the keys are those of Transformer
Engine layers whichever layers are used, and each piece says which rows and columns of the whole tensor it is.
The one operation left is the fused query-key-value matrix, whose rows are interleaved per query group. Families that
keep all experts of a layer in one tensor say so with `Stacked`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby, product

from megadpo.convert.config_json import ConfigJson
from megadpo.convert.shape import ModelShape


@dataclass(frozen=True)
class Stacked:
    """A Hugging Face tensor [experts, columns, rows * step] (biases [experts, rows * step]) that holds the Megatron
    tensor [rows, columns] of every expert, transposed, as each `step`-th row from `start`.
    """

    start: int = 0
    step: int = 1


@dataclass(frozen=True)
class Weight:
    """One row of a family's table.

    megatron: checkpoint key; {layer} is the layer's number, {expert} the expert's, both from 0. Gate is spelled
    weight_w, up weight_v (bias_*).
    hf: Hugging Face name; {qkv} stands for the three tensors q, k and v. Without it, a weight whose first axis is
    QKV is one tensor there, too: all queries, all keys, all values.
    axes: size of each axis of the Megatron tensor, as letters of `sizes`.
    when: whether a model of this shape has the weight.
    start: where its rows start in the Hugging Face tensor, as a letter of `sizes`; two weights may share one.
    of_layer: whether this layer (from 0) has it.
    stacked: how the experts lie in the Hugging Face tensor, where they share one.
    float32: a frozen buffer of the model, float32 there and in every export.
    """

    megatron: str
    hf: str
    axes: str
    when: Callable[[ModelShape], bool] = lambda shape: True
    start: str = ""
    of_layer: Callable[[ModelShape, int], bool] = lambda shape, layer: True
    stacked: Stacked | None = None
    float32: bool = False


@dataclass(frozen=True)
class Family:
    """A model family: how its config.json becomes a shape, and its table."""

    name: str
    architecture: str
    """Its entry in config.json's `architectures`."""
    read_shape: Callable[[ConfigJson], ModelShape]
    weights: tuple[Weight, ...]
    ignored: str = ""
    """Regular expression of names that a folder may hold and that carry nothing trained."""
    output: str = "lm_head.weight"
    """The output layer. A tied model is written without it, and where a folder has it, it must equal
    `embedding`.
    """
    embedding: str = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Rows:
    """`count` rows of the Hugging Face tensor `name`, from row `start`."""

    name: str
    start: int
    count: int


@dataclass(frozen=True)
class MegatronTensor:
    """A whole Megatron tensor: its rows, in order, as rows of Hugging Face tensors."""

    key: str
    shape: tuple[int, ...]
    """Without the padding of the vocabulary."""
    rows: tuple[Rows, ...]
    padded: bool
    """Whether more rows, all 0, may follow: the vocabulary is padded to a multiple of the tensor-parallel
    size.
    """
    stacked: Stacked | None = None
    expert: int = 0
    """Which part of a stacked tensor this is, of `experts`."""
    experts: int = 1
    float32: bool = False


def sizes(shape: ModelShape) -> dict[str, int]:
    """Letters of `Weight.axes`: V vocabulary, D hidden, F MLP, W one head, Q all query heads, K all key heads,
    QKV queries, keys and values. With experts: E experts, X MLP of one, S the shared MLP. Latent attention: LQ and LK
    the vectors that queries and keys come from, LKR the latter with the rotary key, QH the queries of all heads, KVH
    their keys without position and values.
    """
    heads = shape.num_attention_heads
    queries, keys = heads * shape.kv_channels, shape.num_query_groups * shape.kv_channels
    found = {
        "V": shape.vocab_size,
        "D": shape.hidden_size,
        "F": shape.ffn_hidden_size,
        "W": shape.kv_channels,
        "Q": queries,
        "K": keys,
        "QKV": queries + 2 * keys,
        "H": heads,
    }
    if experts := shape.experts:
        found |= {"E": experts.count, "X": experts.ffn_hidden_size, "S": experts.shared_ffn_hidden_size}
    if latent := shape.latent:
        found |= {
            "LQ": latent.query_rank or 0,
            "LK": latent.key_value_rank,
            "LKR": latent.key_value_rank + latent.rotary_width,
            "QH": heads * (latent.query_key_width + latent.rotary_width),
            "KVH": heads * (latent.query_key_width + latent.value_width),
        }
    return found


def expand(weights: tuple[Weight, ...], shape: ModelShape) -> dict[str, MegatronTensor]:
    """Every Megatron tensor of the model by its key: embedding, layer 0, 1, ..., final norm, output layer."""
    size = sizes(shape)
    tensors = {}
    present = (weight for weight in weights if weight.when(shape))
    for layered, block in groupby(present, key=lambda weight: "{layer}" in weight.megatron):
        for layer, weight in product(range(shape.num_layers if layered else 1), tuple(block)):
            if layered and not weight.of_layer(shape, layer):
                continue
            experts = size["E"] if "{expert}" in weight.megatron else 1
            for expert in range(experts):
                tensor = _tensor(weight, layer, expert, experts, shape, size)
                tensors[tensor.key] = tensor
    return tensors


def _tensor(
    weight: Weight, layer: int, expert: int, experts: int, shape: ModelShape, size: dict[str, int]
) -> MegatronTensor:
    """One row of the table for one layer and expert."""
    key, name = (
        x.replace("{layer}", str(layer)).replace("{expert}", str(expert)) for x in (weight.megatron, weight.hf)
    )
    axes = weight.axes.split()
    dims = tuple(size[axis] for axis in axes)
    start = size[weight.start] if weight.start else 0
    rows = _interleaved(name, shape) if axes[0] == "QKV" else (Rows(name, start, dims[0]),)
    return MegatronTensor(
        key, dims, rows, axes[0] == "V", weight.stacked, expert=expert, experts=experts, float32=weight.float32
    )


def _interleaved(name: str, shape: ModelShape) -> tuple[Rows, ...]:
    """Megatron's fused rows: per query group its query heads, then its key head, then its value head."""
    head = shape.kv_channels
    queries = shape.num_attention_heads // shape.num_query_groups * head
    q, k, v = (name.replace("{qkv}", x) for x in "qkv")
    all_queries, all_keys = shape.num_query_groups * queries, shape.num_query_groups * head
    k_start, v_start = (0, 0) if k != v else (all_queries, all_queries + all_keys)
    return tuple(
        rows
        for group in range(shape.num_query_groups)
        for rows in (
            Rows(q, group * queries, queries),
            Rows(k, k_start + group * head, head),
            Rows(v, v_start + group * head, head),
        )
    )


def hf_shapes(*tensors: MegatronTensor) -> dict[str, tuple[int, ...]]:
    """Shapes of the Hugging Face tensors that Megatron tensors are made of, or a part of where stacked."""
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        if tensor.stacked:
            height, *width = tensor.shape
            shapes[tensor.rows[0].name] = (tensor.experts, *width, height * tensor.stacked.step)
            continue
        for rows in tensor.rows:
            height = max(shapes.get(rows.name, (0,))[0], rows.start + rows.count)
            shapes[rows.name] = (height, *tensor.shape[1:])
    return shapes
