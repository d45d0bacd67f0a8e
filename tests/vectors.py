"""Token distributions that the hand-worked numbers of several tests share."""

import torch

from gmoe_ltdr.routing import Modality

# uniform, mild, peaked, almost certain
A = [0.25, 0.25, 0.25, 0.25]
B = [0.4, 0.3, 0.2, 0.1]
C = [0.7, 0.1, 0.1, 0.1]
D = [0.97, 0.01, 0.01, 0.01]
ABCD = torch.tensor([A, B, C, D])


def vision(*shape: int) -> torch.Tensor:
    return torch.full(shape, int(Modality.VISION), dtype=torch.uint8)


def logits(probs) -> torch.Tensor:
    """Logits whose softmax is `probs`."""
    return torch.as_tensor(probs, dtype=torch.float32).log()
