"""The Triton kernels against the dense reference: on a GPU, or in Triton's interpreter on a CPU.

TRITON_INTERPRET=1 python -m pytest tests/test_triton_experts.py
"""

import pytest
import torch

from gmoe_ltdr.kernels import triton_available, triton_interprets
from tests.expert_cases import (
    StaticRows,
    check_dropout,
    random_case,
    results_of,
    revealing_experts,
)

pytestmark = pytest.mark.skipif(
    not triton_available(), reason="needs a GPU, or TRITON_INTERPRET=1 from the start"
)
DEVICE = "cpu" if triton_interprets() else "cuda"


@pytest.mark.parametrize(
    ("tokens", "experts", "density"), [(70, 6, 0.4), (33, 3, 1.0), (5, 4, 0.2), (1, 1, 1.0)]
)
def test_any_plan_matches_the_reference(tokens, experts, density):
    # 24 and 40 leave every tile partly empty
    layer, *case = random_case(
        tokens, experts, density, 2, torch.float32, dim=24, hidden=40, device=DEVICE
    )
    expected = results_of(layer, *case, None)
    layer.backend = "triton"
    most = int(case[2].sum(1).max())
    found = results_of(layer, *case, StaticRows(triton=True), most)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)


def test_without_any_row():
    layer, *case = random_case(7, 3, 0.0, 0, torch.float32, device=DEVICE)
    layer.backend = "triton"
    found = results_of(layer, *case, StaticRows(triton=True))
    assert all((value == 0).all() for value in found.values())


def test_without_biases():
    layer, *case = random_case(20, 3, 0.5, 0, torch.float32, device=DEVICE)
    with torch.no_grad():
        layer.fc1_bias.zero_()
        layer.fc2_bias.zero_()
    expected = results_of(layer, *case, None)
    layer.fc1_bias = layer.fc2_bias = None
    layer.backend = "triton"
    found = results_of(layer, *case, StaticRows(triton=True))
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5)


def test_dropout_is_the_same_in_backward():
    check_dropout(revealing_experts("triton", 0.25, device=DEVICE), device=DEVICE)
