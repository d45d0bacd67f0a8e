"""The distillation loss: worked numbers (TV-C11 of the routing specification), and stability."""

import pytest
import torch
import torch.nn.functional as F

from gmoe_ltdr.distill import bckd_loss, one_versus_rest

TEACHER = torch.tensor([[2.0, -1.0, 0.0]])


def test_worked_numbers():
    student = torch.zeros(1, 2, requires_grad=True)
    loss = bckd_loss(student, TEACHER[:, :2], logits="raw")
    # |.880797 - .5| ln 2 and |.268941 - .5| ln 2
    assert loss.item() == pytest.approx(0.263948 + 0.160158, abs=1e-6)
    loss.backward()
    torch.testing.assert_close(
        student.grad, torch.tensor([[-0.318293, 0.226675]]), atol=1e-6, rtol=0
    )
    student.grad = None
    bckd_loss(student, TEACHER[:, :2], logits="raw", detach_weight=True).backward()
    torch.testing.assert_close(
        student.grad, torch.tensor([[-0.145006, 0.053388]]), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(("beta", "loss"), [(1.0, 0.424106), (2.0, 0.100511 + 0.037006)])
def test_beta(beta, loss):
    found = bckd_loss(torch.zeros(1, 2), TEACHER[:, :2], beta=beta, logits="raw")
    assert found.item() == pytest.approx(loss, abs=1e-6)
    # without the weight: binary cross-entropy of 1/2, for each class
    assert bckd_loss(torch.zeros(1, 2), TEACHER[:, :2], beta=0, logits="raw").item() == (
        pytest.approx(2 * 0.693147, abs=1e-6)
    )


def test_a_constant_on_all_logits():
    zeros = torch.zeros(1, 3)
    assert bckd_loss(zeros, TEACHER, logits="raw").item() == pytest.approx(0.424106, abs=1e-6)
    assert bckd_loss(zeros, TEACHER + 3, logits="raw").item() == pytest.approx(0.919583, abs=1e-6)
    for shift in (0.0, 3.0, -50.0):
        found = bckd_loss(zeros - shift, TEACHER + shift)
        assert found.item() == pytest.approx(0.738333, abs=1e-5)


def test_one_versus_rest_is_the_softmax():
    expected = torch.tensor([[1.686738, -3.126928, -2.048587]])
    torch.testing.assert_close(one_versus_rest(TEACHER), expected, atol=1e-6, rtol=0)
    logits = torch.randn(5, 7, dtype=torch.float64)
    torch.testing.assert_close(one_versus_rest(logits).sigmoid(), logits.softmax(-1))


@pytest.mark.parametrize("logits", ["ovr", "raw"])
def test_equal_models_are_at_rest(logits):
    student = (5 * torch.randn(6, 4, generator=torch.Generator().manual_seed(0))).requires_grad_()
    loss = bckd_loss(student, student.detach().clone(), logits=logits)
    assert loss.item() == 0
    loss.backward()
    assert (student.grad == 0).all()


@pytest.mark.parametrize("logits", ["ovr", "raw"])
def test_following_the_gradient_leads_to_the_teacher(logits):
    torch.manual_seed(0)
    teacher = torch.randn(8, 4)
    student = torch.zeros(8, 4, requires_grad=True)
    optimizer = torch.optim.Adam([student], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        bckd_loss(student, teacher, logits=logits).backward()
        optimizer.step()
    if logits == "raw":
        torch.testing.assert_close(student.detach(), teacher, atol=0.05, rtol=0)
    else:
        torch.testing.assert_close(
            student.softmax(-1).detach(), teacher.softmax(-1), atol=0.01, rtol=0
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_certain_models_in_half_precision(dtype):
    student = torch.tensor([[200.0, -200.0, 0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-200.0, 200.0, 0.0]], dtype=dtype, requires_grad=True)
    loss = bckd_loss(student, teacher)
    assert loss.isfinite()
    assert loss.dtype == torch.float32
    loss.backward()
    assert student.grad.isfinite().all()
    assert teacher.grad is None


def test_mean_over_images_sum_over_classes():
    student, teacher = torch.randn(3, 4), torch.randn(3, 4)
    alone = [bckd_loss(s[None], t[None]).item() for s, t in zip(student, teacher, strict=True)]
    assert bckd_loss(student, teacher).item() == pytest.approx(sum(alone) / 3, rel=1e-5)
    # two classes say the same thing twice: one-versus-rest logits are d and -d
    both = bckd_loss(student[:, :2], teacher[:, :2])
    d_s, d_t = (x[:, 0] - x[:, 1] for x in (student, teacher))
    once = (d_t.sigmoid() - d_s.sigmoid()).abs() * F.binary_cross_entropy_with_logits(
        d_s, d_t.sigmoid(), reduction="none"
    )
    assert both.item() == pytest.approx(2 * once.mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("student", "options", "message"),
    [
        ((2, 3), {}, r"shape \(2, 3\), the teacher's \(2, 4\)"),
        ((2, 4), {"beta": 0.5}, "beta=0.5 must be 0, or at least 1"),
        ((2, 4), {"beta": -1.0}, "beta"),
    ],
)
def test_bad_input(student, options, message):
    with pytest.raises(ValueError, match=message):
        bckd_loss(torch.zeros(student), torch.zeros(2, 4), **options)
    with pytest.raises(ValueError, match="two classes"):
        bckd_loss(torch.zeros(2, 1), torch.zeros(2, 1))
