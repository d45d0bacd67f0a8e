"""Side information on its way from the training loop to the routers."""

import copy

import pytest
import torch

from gmoe_ltdr import TokenContext, moe_layers, preset
from gmoe_ltdr.image_info import set_image_info
from gmoe_ltdr.routing import Modality
from tests.models import tiny_moe_vit


def watched(model):
    """All contexts that the routers of a model are given, in order."""
    contexts: list[TokenContext] = []
    for layer in moe_layers(model).values():
        layer.router.register_forward_pre_hook(lambda _router, inputs: contexts.append(inputs[1]))
    return contexts


def test_every_layer_is_told_until_it_is_told_anew():
    model = tiny_moe_vit(preset("ltdr"))
    contexts = watched(model)
    images, domains = torch.randn(3, 3, 16, 16), torch.tensor([0, 2, 1])
    set_image_info(model, domain_B=domains, embedding_BD=torch.ones(3, 4, requires_grad=True))
    model(images)
    model(images)
    assert len(contexts) == 4  # two layers, twice
    for context in contexts:
        assert torch.equal(context.domain_B, domains)
        assert context.embedding_BD.shape == (3, 4)
        assert not context.embedding_BD.requires_grad
        assert (context.modality_BL == Modality.VISION).all()
    contexts.clear()
    set_image_info(model)
    model(images)
    assert all(c.domain_B is None and c.embedding_BD is None for c in contexts)


def test_it_is_there_when_checkpointing_runs_the_layer_again():
    model = tiny_moe_vit(preset("ltdr")).train()
    model.set_grad_checkpointing()
    contexts = watched(model)
    set_image_info(model, domain_B=torch.tensor([1, 0]))
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert len(contexts) == 4  # two layers, forward and recomputed
    assert all(torch.equal(c.domain_B, torch.tensor([1, 0])) for c in contexts)


def test_copies_are_told_apart():
    model = tiny_moe_vit(preset("ltdr"))
    set_image_info(model, domain_B=torch.tensor([0, 1]))
    twin = copy.deepcopy(model)
    set_image_info(twin)
    contexts = watched(model)
    model(torch.randn(2, 3, 16, 16))
    assert torch.equal(contexts[0].domain_B, torch.tensor([0, 1]))


def test_another_batch_than_described_is_refused():
    model = tiny_moe_vit(preset("ltdr"))
    set_image_info(model, domain_B=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="domain_B describes 2 images, but this forward has 3"):
        model(torch.randn(3, 3, 16, 16))


def test_a_layer_with_another_source_of_context_is_named():
    model = tiny_moe_vit(preset("ltdr"))
    name, layer = next(iter(moe_layers(model).items()))
    layer.context_of = lambda x: TokenContext.all_vision(x.shape[0], x.shape[1])
    with pytest.raises(TypeError, match=f"layer '{name}' gets its context from a function"):
        set_image_info(model)
