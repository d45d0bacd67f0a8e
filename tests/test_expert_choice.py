"""Experts that choose their tokens: hand-worked choices, equal loads, and whose tokens compete."""

import pytest
import torch

from gmoe_ltdr import Modality, TokenContext, preset
from gmoe_ltdr.routers import create_router
from gmoe_ltdr.routers.expert_choice import chosen_by_experts
from tests.vectors import logits

# four tokens, three experts
PROBS = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]])
EVERY = torch.ones(1, 4, dtype=torch.bool)


def chosen(experts_per_token, *, probs=PROBS, real=EVERY):
    return chosen_by_experts(probs.view(*real.shape, -1), real, experts_per_token).int().tolist()


def test_each_expert_takes_its_best():
    # ceil(1.5 * 4 / 3) = 2 each: expert 0 the first two, expert 1 the last and the first,
    # expert 2 the third and the second
    assert chosen(1.5) == [[[1, 1, 0], [1, 0, 1], [0, 0, 1], [0, 1, 0]]]
    # ceil(1 * 4 / 3) = 2 too; ceil(.75 * 4 / 3) = 1: the second token is nobody's
    assert chosen(1.0) == chosen(1.5)
    assert chosen(0.75) == [[[1, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0]]]
    # three of three: all of them, and no more than there are
    assert chosen(3) == chosen(5) == [[[1, 1, 1]] * 4]


def test_within_images():
    real = torch.ones(2, 2, dtype=torch.bool)
    # ceil(1.5 * 2 / 3) = 1 of each image and expert
    assert chosen(1.5, real=real) == [[[1, 1, 0], [0, 0, 1]], [[1, 0, 1], [0, 1, 0]]]


def test_padding_is_not_to_be_had_and_not_counted():
    real = torch.tensor([[True, False, True, True]])
    # ceil(1.5 * 3 / 3) = 2 of the others; to expert 2 the first and the last are equal
    assert chosen(1.5, real=real) == [[[1, 1, 1], [0, 0, 0], [1, 0, 1], [0, 1, 0]]]
    assert chosen(1.5, real=torch.zeros(1, 4, dtype=torch.bool)) == [[[0, 0, 0]] * 4]


def test_of_equal_tokens_the_first_are_taken():
    assert chosen(1.5, probs=torch.full((4, 3), 1 / 3)) == [[[1] * 3, [1] * 3, [0] * 3, [0] * 3]]


def router_of(**options):
    torch.manual_seed(0)
    return create_router(8, preset("ltdr_expert_choice", router_options=options, noise_std=0.0))


@pytest.mark.parametrize(("training", "per_image"), [(True, False), (False, True)])
def test_loads_are_equal(training, per_image):
    router = router_of().train(training)
    tokens = torch.randn(5 * 13, 8) * torch.rand(65, 1).exp()
    plan = router(tokens, TokenContext.all_vision(5, 13))
    mask = plan.dispatch_mask_TE.view(5, 13, 6)
    # 3 * 13 / 6 is 6.5 of an image, 3 * 65 / 6 is 32.5 of the batch
    assert plan.tokens_per_expert_E.tolist() == [35 if per_image else 33] * 6
    assert (mask.sum(1) == 7).all() == per_image
    experts = plan.experts_per_token_T
    assert experts.float().mean() == pytest.approx(3, abs=0.3)
    assert len(experts.unique()) > 2
    assert torch.equal(plan.tail_mask_T, experts > 2)


def test_weights_are_those_of_the_chosen_experts():
    options = {"experts_per_token": 1.5}
    spec = preset("ltdr_expert_choice", num_experts=3, gate="linear", router_options=options)
    router = create_router(3, spec).eval()
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(3))
    plan = router(logits(PROBS), TokenContext.all_vision(1, 4))
    expected = torch.tensor(
        # shared by the chosen, and a single one keeps its probability
        [[2 / 3, 1 / 3, 0], [5 / 9, 0, 4 / 9], [0, 0, 0.6], [0, 0.8, 0]]
    )
    torch.testing.assert_close(plan.combine_weights_TE, expected)


def test_text_competes_with_vision_and_is_never_tail():
    modality = torch.tensor([[Modality.LANGUAGE, Modality.VISION] * 6], dtype=torch.uint8)
    plan = router_of()(torch.randn(12, 8), TokenContext(modality))
    language = plan.of(Modality.LANGUAGE)
    assert plan.experts_per_token_T[language].sum() > 0
    assert not plan.tail_mask_T[language].any()
    assert (plan.experts_per_token_T[language] > 2).any()


def test_what_is_refused():
    for options, message in (
        ({"experts_per_token": 0}, "above 0"),
        ({"scope": "global"}, "scope"),
        ({"padding": "language"}, "has no option"),
    ):
        with pytest.raises(ValueError, match=message):
            router_of(**options)
    with pytest.raises(ValueError, match="equally many tokens"):
        create_router(8, preset("ltdr_expert_choice", capacity_factor=1.5))
