"""What every network of the package owes, so that a population of it can be stacked and initialised anew."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mtl_lightning.networks import (
    MLP,
    ConvEncoder,
    DenseHead,
    EncoderDecoder,
    LeNetEncoder,
    MultiHeadNetwork,
    VisionTransformerEncoder,
)

ENCODERS: list[Callable[[], nn.Module]] = [
    lambda: MLP(400, (8, 6)),
    lambda: LeNetEncoder(image_size=20),
    lambda: VisionTransformerEncoder(image_size=20, patch_size=5, width=16, depth=2),
    lambda: ConvEncoder((4, 6)),
    lambda: EncoderDecoder((4, 6), in_channels=1),
    lambda: MultiHeadNetwork(ConvEncoder((4,)), {"left": nn.Linear(4, 3), "right": nn.Linear(4, 1)}),
    lambda: MultiHeadNetwork(
        EncoderDecoder((4, 6, 8), in_channels=1, stride=2),
        {"left": DenseHead(6, 2, scale_factor=2), "right": DenseHead(6, 2, hidden=4, scale_factor=2)},
    ),
]
networks = pytest.mark.parametrize(
    "make", ENCODERS, ids=["MLP", "LeNet", "ViT", "Conv", "EncoderDecoder", "MultiHead", "DenseMultiHead"]
)
training = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def _flat(outputs: Tensor | dict[str, Tensor]) -> Tensor:
    return torch.cat(list(outputs.values()), dim=-1) if isinstance(outputs, dict) else outputs


@networks
@training
def test_stacked_networks_equal_a_loop(make: Callable[[], nn.Module], training: bool) -> None:
    models = [make().double().train(training) for _ in range(3)]
    images = torch.randn(4, 1, 20, 20, dtype=torch.float64)
    parameters, buffers = torch.func.stack_module_state(models)

    def forward(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return _flat(torch.func.functional_call(models[0], (parameters, buffers), (images,)))

    stacked = torch.vmap(forward)(parameters, buffers)
    torch.testing.assert_close(stacked, torch.stack([_flat(model(images)) for model in models]))


@networks
def test_stacked_gradients_equal_a_loop(make: Callable[[], nn.Module]) -> None:
    models = [make().double() for _ in range(3)]
    images = torch.randn(4, 1, 20, 20, dtype=torch.float64)
    parameters, buffers = torch.func.stack_module_state(models)

    def objective(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return _flat(torch.func.functional_call(models[0], (parameters, buffers), (images,))).square().sum()

    stacked = torch.vmap(torch.func.grad(objective))(parameters, buffers)
    for model in models:
        _flat(model(images)).square().sum().backward()  # type: ignore[no-untyped-call]
    loop = {name: torch.stack([dict(model.named_parameters())[name].grad for model in models]) for name in stacked}  # type: ignore[misc]
    torch.testing.assert_close(stacked, loop)


def test_stacked_batch_statistics_equal_a_loop() -> None:
    models, images = [ConvEncoder((4, 6)).double() for _ in range(3)], torch.randn(4, 1, 8, 8, dtype=torch.float64)
    parameters, buffers = torch.func.stack_module_state(models)
    torch.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (images,)))(parameters, buffers)
    for model in models:
        model(images)
    loop = {name: torch.stack([dict(model.named_buffers())[name] for model in models]) for name in buffers}
    torch.testing.assert_close(buffers, loop)


def test_stacked_dropout_differs_between_models() -> None:
    model = VisionTransformerEncoder(image_size=20, patch_size=5, width=16, depth=1, dropout=0.5)
    images = torch.randn(2, 1, 20, 20)
    parameters, buffers = torch.func.stack_module_state([model, model])
    first, second = torch.vmap(
        lambda p, b: torch.func.functional_call(model, (p, b), (images,)), randomness="different"
    )(parameters, buffers)
    assert not torch.equal(first, second)


@networks
def test_every_trainable_tensor_is_reset(make: Callable[[], nn.Module]) -> None:
    model = make()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 7.0)
    for module in model.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    assert [name for name, parameter in model.named_parameters() if bool((parameter == 7.0).any())] == []


@networks
def test_leaves_its_inputs(make: Callable[[], nn.Module]) -> None:
    images = torch.randn(2, 1, 20, 20)
    before = images.clone()
    make()(images)
    assert torch.equal(images, before)


@networks
def test_survives_a_state_dict(make: Callable[[], nn.Module]) -> None:
    source, copy, images = make().eval(), make().eval(), torch.randn(2, 1, 20, 20)
    copy.load_state_dict(source.state_dict())
    assert torch.equal(_flat(copy(images)), _flat(source(images)))
