from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_sparse.core.blocks import expand_mask, grid_shape, to_blocks
from hf_sparse.core.stored.packing import FormatError, LayerFormat
from hf_sparse.inference.kernels import get_backend
from hf_sparse.inference.layers.linear import BlockSparseLinear

BACKENDS = ("reference", "dense", "torch")
O, I = 24, 12


def pair(
    block: tuple[int, int] = (4, 1), density: float = 0.4, bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[nn.Linear, BlockSparseLinear]:
    """A pruned nn.Linear and the same layer compressed, in eval mode, with parameters of their own."""
    generator = torch.Generator().manual_seed(3)
    dense = nn.Linear(I, O, bias=bias, dtype=dtype).eval()
    mask = torch.rand(grid_shape((O, I), block), generator=generator) < density
    with torch.no_grad():
        dense.weight.masked_fill_(~expand_mask(mask, block), 0)
    own_bias = nn.Parameter(dense.bias.detach().clone()) if bias else None
    return dense, BlockSparseLinear.from_dense(dense.weight, mask, block, bias=own_bias).eval()


@pytest.fixture(params=BACKENDS)
def backend(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_SPARSE_BACKEND", request.param)
    return request.param


def test_attributes_and_format() -> None:
    dense, layer = pair((4, 2))
    assert (layer.in_features, layer.out_features, layer.block_shape, layer.transposed) == (I, O, (4, 2), False)
    assert layer.weight.shape == (int(layer.block_mask().sum()), 4, 2)
    assert layer.weight_block_mask.dtype == torch.uint8
    assert layer.layer_format() == LayerFormat(block_shape=(4, 2), kept=layer.weight.shape[0], dense_shape=(O, I))
    assert torch.equal(layer.dense_weight(), dense.weight)
    assert torch.equal(layer.block_mask(), (to_blocks(dense.weight, (4, 2)) != 0).any(3).any(2))
    assert list(layer.state_dict()) == ["weight", "bias", "weight_block_mask"]
    assert f"kept={layer.weight.shape[0]}/36" in repr(layer)


@pytest.mark.parametrize("block", [(4, 1), (1, 4), (24, 12), (1, 1), (8, 4)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_equals_the_dense_layer(backend: str, block: tuple[int, int], bias: bool) -> None:
    dense, layer = pair(block, bias=bias)
    for x in (torch.randn(5, I), torch.randn(I), torch.randn(2, 3, I), torch.randn(0, I), torch.randn(I, 4).t()):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(layer(x), dense(x))


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_nothing_kept_and_all_kept(backend: str, density: float) -> None:
    dense, layer = pair(density=density)
    assert layer.weight.shape[0] == (0 if density == 0 else layer.layer_format().num_blocks)
    x = torch.randn(3, I)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), dense(x))
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.shape == layer.weight.shape


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_equal_the_dense_layer_on_kept_blocks(backend: str, training: bool, bias: bool) -> None:
    dense, layer = pair(bias=bias, dtype=torch.float64)
    dense.train(training)
    layer.train(training)
    x = torch.randn(2, 5, I, dtype=torch.float64)
    grad_y = torch.randn(2, 5, O, dtype=torch.float64)
    results = []
    for module in (dense, layer):
        own = x.clone().requires_grad_()
        module(own).backward(grad_y)
        results.append(own.grad)
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(layer.weight.grad, to_blocks(dense.weight.grad, (4, 1))[layer.block_mask()])
    if bias:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_only_the_gradients_asked_for(backend: str, wanted: str) -> None:
    _, layer = pair()
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name == wanted)
    x = torch.randn(3, I, requires_grad=wanted == "x")
    layer(x).sum().backward()
    grads = {"x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
    assert {name for name, grad in grads.items() if grad is not None} == {wanted}


def test_second_derivatives(backend: str) -> None:
    _, layer = pair(dtype=torch.float64)
    x = torch.randn(3, I, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_a_training_step_leaves_pruned_blocks_absent(backend: str) -> None:
    _, layer = pair()
    layer.train()
    before, mask = layer.weight.detach().clone(), layer.block_mask()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(4, I)).square().sum().backward()
        optimizer.step()
    assert (layer.weight - before).abs().min() > 0
    assert torch.equal((to_blocks(layer.dense_weight(), (4, 1)) != 0).any(3).any(2), mask)


def changed(layer: BlockSparseLinear, x: Tensor) -> None:
    """Check that the layer answers with what its weight says now."""
    with torch.no_grad():
        expected = nn.functional.linear(x, layer.dense_weight(), layer.bias)
        torch.testing.assert_close(layer(x), expected)


def test_what_was_prepared_follows_the_weight(backend: str) -> None:
    _, layer = pair()
    x = torch.randn(3, I)
    with torch.no_grad():
        first = layer(x)
        layer.weight.mul_(2)
        assert not torch.allclose(layer(x), first)
        changed(layer, x)
        layer.weight = nn.Parameter(torch.randn_like(layer.weight))
        changed(layer, x)
        layer.weight.data = torch.randn_like(layer.weight)
        changed(layer, x)
        layer.weight.data.mul_(3)
        layer.eval()
        changed(layer, x)


def test_what_was_prepared_follows_the_mask(backend: str) -> None:
    _, layer = pair()
    x = torch.randn(3, I)
    with torch.no_grad():
        layer(x)
        # The same number of blocks in other places.
        moved = layer.weight_block_mask.flip(0)
        layer.weight_block_mask.copy_(moved)
        changed(layer, x)
        other = BlockSparseLinear(layer.layer_format()).eval()
        other.load_state_dict(layer.state_dict())
        torch.testing.assert_close(other(x), layer(x))
        layer.load_state_dict(pair()[1].state_dict())
        changed(layer, x)
        layer.load_state_dict(other.state_dict(), assign=True)
        changed(layer, x)


def test_it_is_prepared_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    chosen = get_backend(backend)
    prepare = chosen.prepare
    monkeypatch.setattr(chosen, "prepare", lambda *args: calls.append(1) or prepare(*args))
    _, layer = pair()
    with torch.no_grad():
        for _ in range(3):
            layer(torch.randn(2, I))
    assert len(calls) == 1


def test_dtype_and_device_changes(backend: str) -> None:
    _, layer = pair()
    x = torch.randn(3, I)
    with torch.no_grad():
        layer(x)
        layer.to(torch.bfloat16)
        assert layer.weight_block_mask.dtype == torch.uint8
        assert layer(x.bfloat16()).dtype == torch.bfloat16
        layer.double()
        assert layer(x.double()).dtype == torch.float64
        layer.to("meta")
        assert layer.weight_block_mask.is_meta


def test_wrong_input_names_what_was_expected() -> None:
    _, layer = pair()
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"x must be \[\.\.\., 12\], found shape \[2, 24\]"):
            layer(torch.randn(2, 24))
        with pytest.raises(TypeError, match=r"x is torch.float64, but the layer is torch.float32"):
            layer(torch.randn(2, I, dtype=torch.float64))


def test_a_damaged_mask_never_computes() -> None:
    _, layer = pair()
    layer.weight_block_mask.zero_()
    with pytest.raises(FormatError, match="keeps 0 blocks"):
        layer(torch.randn(2, I))


def test_copies_are_independent(backend: str) -> None:
    _, layer = pair()
    x = torch.randn(3, I)
    with torch.no_grad():
        expected = layer(x)
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        copies = [
            copy.deepcopy(layer),
            pickle.loads(pickle.dumps(layer)),
            torch.load(buffer, weights_only=False),
        ]
        for made in copies:
            assert torch.equal(made(x), expected)
            made.weight.zero_()
        assert torch.equal(layer(x), expected)


def test_pickles_hold_no_prepared_copy() -> None:
    _, layer = pair((1, 1), density=0.05)
    before = len(pickle.dumps(layer))
    with torch.no_grad():
        layer(torch.randn(1, I))
    assert len(pickle.dumps(layer)) == before


def test_inference_mode(backend: str) -> None:
    dense, layer = pair()
    x = torch.randn(3, I)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), dense(x))
        made_inside = copy.deepcopy(layer)
        torch.testing.assert_close(made_inside(x), dense(x))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), dense(x))


@pytest.mark.parametrize("grad", [True, False])
def test_autocast(backend: str, grad: bool) -> None:
    dense, layer = pair()
    x = torch.randn(3, I, requires_grad=grad)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        expected, found = dense(x), layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
    if grad:
        found.sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == torch.float32


def test_autocast_prepares_once_and_lets_go(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    chosen = get_backend(backend)
    prepare = chosen.prepare
    monkeypatch.setattr(chosen, "prepare", lambda values, *args: calls.append(values.dtype) or prepare(values, *args))
    dense, layer = pair()
    x = torch.randn(3, I)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(3):
                torch.testing.assert_close(layer(x), dense(x))
            with torch.autocast("cpu", enabled=False):
                torch.testing.assert_close(layer(x), dense(x))
        torch.testing.assert_close(layer(x), dense(x))
    assert calls == [torch.bfloat16, torch.float32]


def test_autocast_leaves_float64_alone() -> None:
    dense, layer = pair(dtype=torch.float64)
    x = torch.randn(3, I, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert layer(x).dtype == dense(x).dtype == torch.float64


@pytest.mark.parametrize("bias", [True, False])
def test_replicas_of_data_parallel(backend: str, bias: bool) -> None:
    # nn.DataParallel needs several GPUs; this is what it does to a module.
    dense, layer = pair(bias=bias)
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer._parameters.items():
        if parameter is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, parameter.detach().clone().requires_grad_())
    replica.weight_block_mask = layer.weight_block_mask.clone()
    x = torch.randn(3, I)
    for training in (True, False):
        replica.training = training
        torch.testing.assert_close(replica(x), dense(x))
        with torch.no_grad():
            torch.testing.assert_close(replica(x), dense(x))


@pytest.mark.parametrize(("grad", "warm"), [(False, False), (False, True), (True, False)])
def test_compile(grad: bool, warm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SPARSE_BACKEND", "torch")
    torch._dynamo.reset()
    dense, layer = pair()
    with torch.set_grad_enabled(grad):
        if warm:
            layer(torch.randn(1, I))
        compiled = torch.compile(layer, backend="aot_eager")
        for tokens in (3, 5, 200):
            x = torch.randn(tokens, I)
            torch.testing.assert_close(compiled(x), dense(x))
        if grad:
            compiled(x).sum().backward()
            assert layer.weight.grad is not None


@pytest.mark.parametrize("name", ["dense", "torch"])
def test_a_warm_layer_compiles_into_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SPARSE_BACKEND", name)
    torch._dynamo.reset()
    dense, layer = pair()
    x = torch.randn(3, I)
    with torch.no_grad():
        layer(x)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), dense(x))


def test_compiled_layers_follow_new_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SPARSE_BACKEND", "torch")
    torch._dynamo.reset()
    _, layer = pair()
    x = torch.randn(3, I)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="aot_eager")
        compiled(x)
        layer.load_state_dict({k: v * 2 if v.is_floating_point() else v for k, v in layer.state_dict().items()})
        torch.testing.assert_close(compiled(x), nn.functional.linear(x, layer.dense_weight(), layer.bias))
        layer.train()
        layer.weight.mul_(2)
        layer.eval()
        torch.testing.assert_close(compiled(x), nn.functional.linear(x, layer.dense_weight(), layer.bias))


def test_export() -> None:
    dense, layer = pair()
    x = torch.randn(3, I)
    with torch.no_grad():
        layer(x)
        exported = torch.export.export(layer, (x,))
        torch.testing.assert_close(exported.module()(x), dense(x))


def test_activation_checkpointing_and_hooks() -> None:
    dense, layer = pair()
    layer.train()
    x = torch.randn(3, I, requires_grad=True)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert layer.weight.grad is not None
    seen = []
    layer.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    layer(x)
    assert seen == [(3, O)]


def test_from_dense_keeps_what_can_train() -> None:
    weight, mask = nn.Parameter(torch.randn(4, 4), requires_grad=False), torch.eye(2).bool()
    bias = nn.Parameter(torch.zeros(4))
    layer = BlockSparseLinear.from_dense(weight, mask, (2, 2), bias=bias)
    assert not layer.weight.requires_grad
    assert layer.bias is bias
    assert BlockSparseLinear.from_dense(weight, mask, (2, 2)).bias is None
    with pytest.raises(ValueError, match="the mask must be bool"):
        BlockSparseLinear.from_dense(weight, torch.eye(3).bool(), (2, 2))


def test_the_backend_is_named(backend: str) -> None:
    _, layer = pair()
    assert layer.backend() == backend
