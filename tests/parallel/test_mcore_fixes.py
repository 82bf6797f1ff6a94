"""Each fault of Megatron-Core that would give wrong numbers or hang: that it is there, and that the guard holds."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from tiny import random_groups, write_llama
from train.engine import Case, assemble, build, run, run_one, worst

from megadpo import checkpoint
from megadpo.data.packing import Budget
from megadpo.errors import ConfigError, MachineError
from megadpo.parallel import mcore_fixes
from megadpo.parallel.context import grid
from megadpo.train.optimizer import clip_and_update, set_learning_rate

VOCAB = 67


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(write_llama(tmp_path_factory.mktemp("llama"), layers=4, vocab=VOCAB), random_groups(12, vocab=VOCAB))


def batched_p2p(device: torch.device, case: Case) -> dict[str, Any]:
    """Interleaved pipeline with Megatron-Core's default of batched messages, and nobody to refuse it."""
    from megadpo.model import build as module

    configure = module.transformer_config

    def default_messages(*args: Any) -> Any:
        config = configure(*args)
        config.overlap_p2p_comm, config.batch_p2p_comm = False, True
        with pytest.raises(ConfigError, match="batched p2p"):
            mcore_fixes.refuse(config)
        return config

    module.transformer_config = default_messages
    return run_one(device, case)


def test_batched_messages_between_two_interleaved_stages(case: Case) -> None:
    """S1. The gradients are wrong, so `refuse` raises; the grid tests show that the project's own setting is exact."""
    one_by_one = replace(case, steps=1, budget=Budget(64, groups=1))  # 8 micro-batches: both directions are busy
    interleaved = replace(one_by_one, pipeline=2, virtual=2)
    [[single]] = run_ranks(1, run, [one_by_one])
    mixed_up = run_ranks(2, batched_p2p, interleaved)
    difference, _ = worst(assemble(mixed_up, "gradients", VOCAB), assemble([single], "gradients", VOCAB))
    assert difference > 1e-2, "the fault is gone from Megatron-Core: the guard can go too"


def moments(state: Any) -> dict[str, torch.Tensor]:
    """Optimizer state in the model's own shapes, as a checkpoint stores it."""
    sharded = state.optimizer.sharded_state_dict(
        {"model0": state.modules[0].sharded_state_dict(metadata=dict(checkpoint.METADATA))},
        metadata=dict(checkpoint.METADATA),
    )
    return {
        f"{index}.{name}": tensor.data.clone()
        for index, tensors in sharded["param_state"].items()
        for name, tensor in tensors.items()
    }


def bucketed_state(device: torch.device, case: Case, fixed: bool) -> dict[str, torch.Tensor]:
    """Moments after one update with many small gradient buckets, whose ends Megatron-Core pads."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if not fixed:
        guarded = DistributedOptimizer.sharded_param_state_fully_reshardable
        DistributedOptimizer.sharded_param_state_fully_reshardable = guarded.__closure__[0].cell_contents
    with grid(case.parallel, device, 0) as context:
        state, _ = build(case, context)
        for chunk in state.chunks:
            chunk.zero_grad_buffer()
            for number, parameter in enumerate(chunk.module.parameters()):
                ramp = torch.arange(parameter.numel(), dtype=torch.float32).view_as(parameter)
                parameter.main_grad.copy_(ramp + number)
            chunk.finish_grad_sync()
        set_learning_rate(state.optimizer, 1e-3)
        state.optimizer.prepare_grads()
        clip_and_update(state.optimizer, 0.0)
        return moments(state)


def test_padded_gradient_buckets(case: Case) -> None:
    """S2. With one bucket nothing is padded inside: that state is the truth."""
    many = replace(case, distributed=True, overlap=True, bucket_size=700)
    truth = run_ranks(2, bucketed_state, replace(many, bucket_size=None), True)[0]
    fixed = run_ranks(2, bucketed_state, many, True)[0]
    shifted = run_ranks(2, bucketed_state, many, False)[0]
    assert len(truth) > 20
    assert all(torch.equal(fixed[name], truth[name]) for name in truth)
    assert not all(torch.equal(shifted[name], truth[name]) for name in truth), "the fault is gone: so can the guard"


def step_of_ones(state: Any) -> None:
    """One update with every gradient 1."""
    for parameter in state.optimizer.get_parameters():
        parameter.grad = torch.ones_like(parameter)
    set_learning_rate(state.optimizer, 1e-3)
    state.optimizer.step_with_ready_grads()


def test_every_parameter_counts_its_own_steps(case: Case) -> None:
    """S3. Megatron-Core takes the guard's Adam, whose step count is the group's and cannot be shared by a load."""

    def look(device: torch.device) -> tuple[str, list[list[str]]]:
        with grid(case.parallel, device, 0) as context:
            state, _ = build(replace(case, distributed=True), context)
            step_of_ones(state)
            inner = state.optimizer.chained_optimizers[0].optimizer
            return type(inner).__name__, [sorted(x) for x in inner.state.values()]

    [(name, states)] = run_ranks(1, look)
    assert name == "StatelessStepAdam"
    assert states
    assert all(keys == ["exp_avg", "exp_avg_sq"] for keys in states)


def test_one_step_tensor_for_all_parameters(case: Case) -> None:
    """S3, the fault: with torch's own AdamW, a load gives all parameters one `step` tensor, which each then raises."""

    def look(device: torch.device) -> tuple[int, int]:
        import megatron.core.optimizer as optimizers
        import megatron.core.optimizer.distrib_optimizer as distributed

        optimizers.Adam, optimizers.USING_PYTORCH_OPTIMIZER = torch.optim.AdamW, True
        distributed.Adam, distributed.HAVE_APEX_OR_TE = torch.optim.Adam, False
        distributed.USING_TE_OPTIMIZER = False
        with grid(case.parallel, device, 0) as context:
            state, _ = build(replace(case, distributed=True), context)
            step_of_ones(state)
            state.optimizer.load_state_dict(state.optimizer.state_dict())
            states = state.optimizer.chained_optimizers[0].optimizer.state.values()
            return len(states), len({id(x["step"]) for x in states})

    [(parameters, steps)] = run_ranks(1, look)
    assert parameters > 1
    assert steps == 1, "the fault is gone from Megatron-Core: the guard can go too"


def test_adam_against_torch() -> None:
    torch.manual_seed(0)
    start = torch.randn(50)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = (
        mcore_fixes.StatelessStepAdam([ours], **settings),
        torch.optim.AdamW([theirs], **settings),
    )
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(50)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("setting", ["fp8", "fp8_param", "tp_comm_overlap"])
def test_what_would_be_ignored_without_transformer_engine(setting: str) -> None:
    """S4."""
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=2, hidden_size=16, num_attention_heads=2, cuda_graph_scope=[])
    mcore_fixes.refuse(config)
    setattr(config, setting, "hybrid" if setting == "fp8" else True)
    if mcore_fixes.have_te():
        mcore_fixes.refuse(config)
    else:
        with pytest.raises(MachineError, match=f"{setting} needs Transformer Engine"):
            mcore_fixes.refuse(config)


def test_named_random_states_are_applied() -> None:
    """S5. Tensor-parallel ranks draw different numbers inside the named state, equal ones outside."""

    def draw(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        parallel = Case(Path(), None, tensor=2).parallel
        with grid(parallel, device, 5):
            outside = torch.rand(4)
            with get_cuda_rng_tracker().fork():
                return outside, torch.rand(4)

    (out0, in0), (out1, in1) = run_ranks(2, draw)
    assert torch.equal(out0, out1)
    assert not torch.equal(in0, in1)


def test_the_default_checkpoint_format_cannot_be_saved(case: Case, tmp_path: Path) -> None:
    """S6. checkpoint.METADATA names the one that can."""

    def save(device: torch.device) -> str:
        from megatron.core import dist_checkpointing

        with grid(case.parallel, device, 0) as context:
            state, _ = build(replace(case, distributed=True), context)
            step_of_ones(state)
            checkpoint.save(state, tmp_path, 1, 1, context)
            model = state.modules[0].sharded_state_dict()
            (tmp_path / "default").mkdir()
            try:
                dist_checkpointing.save(
                    {"model": model, "optimizer": state.optimizer.sharded_state_dict(model)}, str(tmp_path / "default")
                )
            except Exception as error:
                return type(error).__name__
            return "saved"

    assert run_ranks(1, save) == ["CheckpointingException"]
    assert checkpoint.latest(tmp_path) is not None


def test_no_psutil_is_an_error_and_not_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """S7."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    mcore_fixes.require_psutil()
    monkeypatch.setattr(filesystem_async, "HAVE_PSUTIL", False)
    with pytest.raises(MachineError, match="pip install psutil"):
        mcore_fixes.require_psutil()


def test_split_weights_count_in_the_gradient_norm(case: Case) -> None:
    """Megatron-Core marks split weights only while it initialises them. With all gradients 1 the norm is
    sqrt(parameters)."""

    def norm(device: torch.device, tensor: int) -> float:
        with grid(replace(case, tensor=tensor).parallel, device, 0) as context:
            state, _ = build(replace(case, tensor=tensor), context)
            for parameter in state.modules[0].parameters():
                parameter.main_grad.fill_(1.0)
            state.optimizer.prepare_grads()
            return float(state.optimizer.get_grad_norm())

    parameters = sum(p.numel() for p in _hugging_face_tensors(case.folder))
    assert run_ranks(1, norm, 1)[0] ** 2 == pytest.approx(parameters, rel=1e-6)
    padding = 2 * 32  # the vocabulary of 67 is padded to 68, in the embedding and in the head
    assert run_ranks(2, norm, 2)[0] ** 2 == pytest.approx(parameters + padding, rel=1e-6)


def _hugging_face_tensors(folder: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return list(load_file(folder / "model.safetensors").values())


def test_routers_and_latent_attention_without_transformer_engine() -> None:
    """The names that Megatron-Core binds only with it: moe_utils lacks one, multi_latent_attention says it has all."""
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    mcore_fixes.route_without_te()
    mcore_fixes.latent_without_te()
    assert hasattr(moe_utils, "te_general_gemm")
    if mcore_fixes.have_te():
        return
    logits = moe_utils.router_gating_linear(torch.ones(3, 2), torch.ones(4, 2), None, torch.float32)
    assert torch.equal(logits, torch.full((3, 4), 2.0))
    assert not multi_latent_attention.HAVE_TE
    source = inspect.getsource(multi_latent_attention)
    assert "HAVE_TE = True" in source.split("except ImportError")[1], "the fault may be gone: look at the guard"


def test_token_counts_on_the_host_are_plain_numbers() -> None:
    """cpu_host: what a collective takes as sizes, as Megatron-Core brings it from a GPU."""

    def sizes(device: torch.device) -> tuple[bool, bool]:
        from megatron.core.transformer.moe import moe_utils, token_dispatcher

        counts = torch.tensor([2, 3])
        theirs = moe_utils.maybe_move_tensor_to_cpu(counts, as_numpy=True)
        ours = token_dispatcher.maybe_move_tensor_to_cpu(counts, as_numpy=True)
        return torch.is_tensor(theirs), torch.is_tensor(ours)

    if not torch.cuda.is_available():
        assert run_ranks(1, sizes) == [(True, False)]


def test_wrapping_again_does_not_wrap_twice() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    mcore_fixes.install()
    first = DistributedOptimizer.sharded_param_state_fully_reshardable
    mcore_fixes.install()
    assert DistributedOptimizer.sharded_param_state_fully_reshardable is first
