"""TASK: the tasks of images as labels of experts, as pairs, and as the choice itself."""

import pytest
import torch

from gmoe_ltdr import MoESpec, TokenContext, preset
from gmoe_ltdr.routers import create_router
from gmoe_ltdr.routers.task import contrastive_task_loss, supervised_task_loss
from gmoe_ltdr.routing import Modality

P, V = int(Modality.PADDING), int(Modality.VISION)


def router_of(mode, dim=4, *, num_experts=4, **options):
    torch.manual_seed(0)
    spec = preset("gmoe_dar", router=f"task_{mode}", num_experts=num_experts, noise_std=0.0)
    return create_router(dim, MoESpec(**{**vars(spec), "router_options": options}))


def images(length, tasks=None, batch=None):
    batch = len(tasks) if batch is None else batch
    domains = None if tasks is None else torch.tensor(tasks)
    return TokenContext(torch.full((batch, length), V, dtype=torch.uint8), domain_B=domains)


def test_the_task_is_a_label_of_every_token():  # TV-C1
    logits = torch.tensor([[2.0, 0, 0], [0, 1, 0]])
    real = torch.ones(2, 1).bool()
    # log(e^2 + 2) - 2 = .239545, log(e + 2) - 0 = 1.551445
    loss = supervised_task_loss(logits, torch.tensor([0, 2]), real)
    assert loss.item() == pytest.approx(0.895495, abs=1e-6)
    # with more tasks than experts they wrap
    wrapped = supervised_task_loss(logits, torch.tensor([3, 5]), real)
    assert wrapped.item() == pytest.approx(0.895495, abs=1e-6)
    only_first = supervised_task_loss(logits, torch.tensor([0, 2]), torch.tensor([[True], [False]]))
    assert only_first.item() == pytest.approx(0.239545, abs=1e-6)
    assert supervised_task_loss(logits, torch.tensor([0, 2]), ~real).item() == 0


def test_images_of_one_task_attract_each_other():  # TV-C1b
    features = torch.tensor([[1.0, 0], [0.6, 0.8], [0, 1]])
    loss = contrastive_task_loss(features, torch.tensor([0, 0, 1]))
    # ordered pairs (0, 1) and (1, 0): .437488, .798139
    assert loss.item() == pytest.approx(0.617813, abs=1e-6)
    longer = contrastive_task_loss(
        features * torch.tensor([[5.0], [2], [1]]), torch.tensor([0, 0, 1])
    )
    assert longer.item() == pytest.approx(0.617813, abs=1e-6)
    # cosines .6 and .8 over a temperature of .5
    sharper = contrastive_task_loss(features, torch.tensor([0, 0, 1]), temperature=0.5)
    first = torch.tensor([1.2, 0.0]).log_softmax(0)[0]
    second = torch.tensor([1.2, 1.6]).log_softmax(0)[0]
    assert sharper.item() == pytest.approx(-(first + second).item() / 2, abs=1e-6)


@pytest.mark.parametrize("tasks", [[0, 1, 2], [0], []])
def test_without_pairs_there_is_nothing_to_attract(tasks):
    features = torch.randn(len(tasks), 3, requires_grad=True)
    loss = contrastive_task_loss(features, torch.tensor(tasks, dtype=torch.int64))
    assert loss.item() == 0
    loss.backward()
    assert not features.grad.any()


@pytest.mark.parametrize("mode", ["supervised", "contrastive"])
def test_routing_itself_is_token_choice(mode):
    router, plain = router_of(mode), router_of("supervised")
    plain.load_state_dict({n: v for n, v in router.state_dict().items() if "projection" not in n})
    tokens = torch.randn(8, 4)
    training = router(tokens, images(2, [0, 0, 1, 1]))
    evaluation = plain.eval()(tokens, images(2, batch=4))
    assert torch.equal(training.combine_weights_TE, evaluation.combine_weights_TE)
    assert not evaluation.router_losses
    assert list(training.router_losses) == ["task_loss"]


@pytest.mark.parametrize("mode", ["supervised", "contrastive"])
def test_the_loss_trains_the_gate(mode):
    router = router_of(mode, task_weight=0.5)
    tokens, context = torch.randn(16, 4), images(4, [0, 0, 1, 1])
    loss = router(tokens, context).router_losses["task_loss"]
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in router.parameters())
    weaker = router_of(mode, task_weight=0.05)(tokens, context).router_losses["task_loss"]
    assert weaker.item() == pytest.approx(loss.item() / 10, rel=1e-5)
    steps = torch.optim.SGD(router.parameters(), lr=1.0)
    for _ in range(50):
        steps.zero_grad()
        now = router(tokens, context).router_losses["task_loss"]
        now.backward()
        steps.step()
    assert now < 0.7 * loss


def test_supervision_is_what_the_loss_says():
    router = router_of("supervised")
    modality = torch.tensor([[V, V], [V, P]], dtype=torch.uint8)
    context = TokenContext(modality, domain_B=torch.tensor([1, 6]))
    plan = router(torch.randn(4, 4), context)
    log_probs = plan.logits_TE.log_softmax(-1)
    expected = -0.01 * (log_probs[0, 1] + log_probs[1, 1] + log_probs[2, 6 % 4]) / 3
    torch.testing.assert_close(plan.router_losses["task_loss"], expected)


@pytest.mark.parametrize("mode", ["supervised", "contrastive", "hard"])
def test_tasks_have_to_be_told_in_training(mode):
    router = router_of(mode, **({"num_tasks": 3} if mode == "hard" else {}))
    with pytest.raises(ValueError, match=rf"'task_{mode}' has to know .* domain_B=\.\.\."):
        router(torch.randn(4, 4), images(2, batch=2))
    router.eval()(torch.randn(4, 4), images(2, batch=2))


def test_hard_sends_an_image_to_the_expert_of_its_task():
    router = router_of("hard", num_tasks=6)
    plan = router(torch.randn(6, 4), images(2, [2, 5, 0]))
    chosen = plan.dispatch_mask_TE.int().argmax(1)
    assert chosen.tolist() == [2, 2, 1, 1, 0, 0]  # task 5 is expert 5 mod 4
    assert torch.equal(plan.combine_weights_TE, plan.dispatch_mask_TE.float())
    torch.testing.assert_close(plan.probs_TE, plan.dispatch_mask_TE.float(), atol=1e-30, rtol=0)
    assert plan.max_experts_per_token == 1
    # known in evaluation too, it decides there as well
    assert torch.equal(
        router.eval()(torch.randn(2, 4), images(1, [2, 5])).combine_weights_TE,
        torch.eye(4)[[2, 1]],
    )
    assert not list(router.parameters())


def test_hard_experts_without_a_task_are_closed_and_not_dead():
    router = router_of("hard", num_tasks=3)
    plan = router(torch.randn(6, 4), images(2, [0, 1, 2]))
    assert plan.open_TE.tolist() == [[True, True, True, False]] * 6
    assert plan.logits_TE.isfinite().all()
    with pytest.raises(ValueError, match=r"an image is of task 3, and .* knows tasks 0 to 2"):
        router.eval()(torch.randn(2, 4), images(2, [3]))


def test_hard_of_an_unseen_domain_mixes_the_trained_experts():  # TV-C1c
    plan = router_of("hard", num_tasks=3).eval()(torch.randn(2, 4), images(2, batch=1))
    expected = torch.tensor([1 / 3, 1 / 3, 1 / 3, 0])
    torch.testing.assert_close(plan.combine_weights_TE, expected.expand(2, 4))
    assert plan.experts_per_token_T.tolist() == [3, 3]
    assert plan.max_experts_per_token == 3
    wrapped = router_of("hard", num_tasks=5).eval()(torch.randn(1, 4), images(1, batch=1))
    assert wrapped.combine_weights_TE.tolist() == [[0.25] * 4]


def test_hard_nearest_follows_the_prototypes():
    router = router_of("hard", dim=2, num_tasks=3, unseen="nearest")
    # images of two tokens each; means [1, 0], [3, 0] of task 0 and [0, 2] of task 2
    tokens = torch.tensor([[1.0, 1], [1, -1], [3, 0], [3, 0], [0, 2], [0, 2]])
    router(tokens, images(2, [0, 0, 2]))
    assert router.prototypes.tolist() == [[2, 0], [0, 0], [0, 2]]
    router(tokens[4:], images(2, [0]))  # task 0 alone: .99 * [2, 0] + .01 * [0, 2]
    torch.testing.assert_close(router.prototypes[0], torch.tensor([1.98, 0.02]))
    assert router.prototypes[2].tolist() == [0, 2]
    assert router.num_updates.tolist() == [2, 0, 1]

    router.eval()
    before = router.prototypes.clone()
    unseen = torch.tensor([[9.0, 1], [9, 1], [-0.1, 0.2], [-0.1, 0.2], [-1, -1], [-1, -1]])
    plan = router(unseen, images(2, batch=3))
    # the last one is opposite to both; task 1, which nobody showed, would have cosine 0
    assert plan.dispatch_mask_TE.int().argmax(1)[::2].tolist() == [0, 2, 2]
    assert plan.experts_per_token_T.tolist() == [1] * 6
    assert torch.equal(router.prototypes, before)


def test_padding_is_in_no_prototype():
    router = router_of("hard", dim=1, num_tasks=2, unseen="nearest")
    modality = torch.tensor([[V, P], [P, P]], dtype=torch.uint8)
    tokens = torch.tensor([[3.0], [100], [100], [100]])
    router(tokens, TokenContext(modality, domain_B=torch.tensor([1, 0])))
    assert router.prototypes.tolist() == [[0], [3]]
    assert router.num_updates.tolist() == [0, 1]


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="num_tasks"):
        router_of("hard")
    with pytest.raises(ValueError, match=r"'unseen'.*not one of"):
        router_of("hard", num_tasks=3, unseen="oldest")
    with pytest.raises(ValueError, match="task_temperature=0"):
        router_of("contrastive", task_temperature=0)
    with pytest.raises(ValueError, match="has no option 'task_temperature'"):
        router_of("supervised", task_temperature=1)
