"""Which token is what, and that MoE layers of a decoder route by it."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gmoe_ltdr import MoE, TokenContext, balance_loss, collect_routing, moe_layers, preset
from gmoe_ltdr.image_info import set_image_info
from gmoe_ltdr.routing import Modality
from gmoe_ltdr.vlm import TokenModality, modality_map, spliced_modality_map

L, V, P = Modality.LANGUAGE, Modality.VISION, Modality.PADDING
LETTER = {"T": L, "V": V, ".": P}
IMAGE = 9


def letters(text: str) -> torch.Tensor:
    """ "TV." a row, rows apart by blanks."""
    return torch.tensor([[int(LETTER[c]) for c in row] for row in text.split()], dtype=torch.uint8)


class TestSplicedMap:
    """TV-V1: three rows, four entries of two features each, of which row 1 uses up a dummy."""

    ids = torch.tensor([[1, -200, 7, 8, 9], [1, 2, 0, 0, 0], [-200, 3, -200, 4, 5]])
    attention = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])

    @pytest.mark.parametrize(
        ("side", "max_length", "expected"),
        [
            ("right", 6, "TVVTT. TT.... VVTVVT"),
            ("left", 6, ".TVVTT ....TT VVTVVT"),
            ("right", None, "TVVTT.. TT..... VVTVVTT"),
            ("right", 4, "TVVT TT.. VVTV"),  # the last row is cut inside its second image
        ],
    )
    def test_rows(self, side, max_length, expected):
        found = spliced_modality_map(
            self.ids, self.attention, [2] * 4, max_length=max_length, padding_side=side
        )
        assert torch.equal(found, letters(expected))
        if max_length == 6:
            counts = [int((found == m).sum()) for m in (V, L, P)]
            assert counts == [6, 7, 5]
        if max_length is None:
            assert [int((found == m).sum()) for m in (V, L, P)] == [6, 8, 7]

    def test_no_mask_means_no_padding_and_images_may_differ_in_size(self):
        found = spliced_modality_map(torch.tensor([[5, -200, 6], [-200, 7, 7]]), None, [3, 1])
        assert torch.equal(found, letters("TVVVT VTT.."))

    @pytest.mark.parametrize("entries", [3, 5])
    def test_entries_that_do_not_fit(self, entries):
        with pytest.raises(ValueError, match=f"use up 4 images .* there are {entries}"):
            spliced_modality_map(self.ids, self.attention, [2] * entries)

    def test_a_side_that_is_none(self):
        with pytest.raises(ValueError, match="'middle' is neither"):
            spliced_modality_map(self.ids, None, [2] * 4, padding_side="middle")


class TestMap:
    def test_ids_and_padding(self):
        ids = torch.tensor([[1, IMAGE, IMAGE, 2], [0, 0, 3, 4]])
        mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
        assert torch.equal(modality_map(ids, IMAGE, mask), letters("TVVT ..TT"))
        assert torch.equal(modality_map(ids, IMAGE), letters("TVVT TTTT"))

    def test_a_generated_image_token_is_a_word(self):
        ids = torch.tensor([[IMAGE, 2]])
        assert torch.equal(modality_map(ids, IMAGE, has_images=False), letters("TT"))

    def test_a_cache_makes_the_mask_longer_than_the_tokens(self):
        mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 1]])
        ids = torch.tensor([[5, 6], [7, 8]])
        assert torch.equal(modality_map(ids, IMAGE, mask), letters("TT .T"))

    def test_a_given_mask_wins_over_ids(self):
        ids = torch.full((1, 3), IMAGE)
        vision = torch.tensor([[False, True, False]])
        assert torch.equal(modality_map(ids, IMAGE, vision_mask=vision), letters("TVT"))

    def test_shapes_that_do_not_fit(self):
        ids = torch.zeros(2, 3, dtype=torch.long)
        with pytest.raises(ValueError, match=r"vision_mask has shape \(2, 4\)"):
            modality_map(ids, IMAGE, vision_mask=torch.zeros(2, 4))
        with pytest.raises(ValueError, match="covers 2 tokens, but there are 3"):
            modality_map(ids, IMAGE, torch.ones(2, 2))
        with pytest.raises(ValueError, match=r"with the 2 rows"):
            modality_map(ids, IMAGE, torch.ones(1, 3))


class Decoder(nn.Module):
    """Layers that know nothing but hidden states, as those of a language model."""

    def __init__(self, spec, depth=2, dim=16):
        super().__init__()
        torch.manual_seed(0)
        self.modality = TokenModality()
        self.layers = nn.ModuleList(
            MoE(dim, 2 * dim, spec, gated=True, act_layer=nn.SiLU, context_of=self.modality)
            for _ in range(depth)
        )
        self.checkpointed = False

    def forward(self, x, tokens):
        with self.modality.using(tokens):
            for layer in self.layers:
                if self.checkpointed:
                    context_fn = self.modality.checkpoint_context
                    x = x + checkpoint(layer, x, use_reentrant=False, context_fn=context_fn)
                else:
                    x = x + layer(x)
            return x


def llm_spec(name="ltdr", **overrides):
    quiet = {"gate": "linear", "num_experts": 4, "noise_std": 0.0, "expert_dropout": 0.0}
    return preset(name, **{**quiet, **overrides})


def test_outside_of_a_forward_nothing_is_routed():
    decoder = Decoder(llm_spec())
    x = torch.randn(1, 3, 16)
    decoder(x, letters("TVT"))
    with pytest.raises(RuntimeError, match=r"nothing is known of these \(1, 3\) tokens"):
        decoder.layers[0](x)
    with pytest.raises(RuntimeError, match=r"announced as \(1, 3\), but are \(2, 3\)"):
        decoder(torch.randn(2, 3, 16), letters("TVT"))
    assert decoder.modality.current is None  # also after an error


def test_decoding_is_plain_top_k():
    """TV-V2: one token per row is language, whether it was announced or not."""
    decoder, plain = Decoder(llm_spec()).eval(), Decoder(llm_spec("baseline")).eval()
    x = torch.randn(3, 1, 16)
    with collect_routing(decoder) as routings:
        out = decoder.layers[0](x)
        decoder.layers[1](x)
    for routing in routings.values():
        assert routing.experts_per_token_T.tolist() == [2, 2, 2]
        assert not routing.tail_mask_T.any()
    assert torch.isfinite(balance_loss(routings, llm_spec()))
    assert torch.equal(out, plain.layers[0](x))


def test_pure_text_equals_the_baseline_bit_for_bit():
    """TV-V3: output and balance loss, with the same gate and weighting."""
    found = []
    for name in ("ltdr", "baseline"):
        decoder = Decoder(llm_spec(name))
        x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
        with collect_routing(decoder) as routings:
            out = decoder(x, letters("TTTTT TTT.."))
        found.append((out, balance_loss(routings, llm_spec(name))))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_text_never_moves_the_tail_and_vision_never_moves_the_loss():
    """TV-V4, with other hidden states in the places of one modality."""
    decoder = Decoder(llm_spec(), depth=1)
    tokens = letters("TVVVVVVT TTVVVV..")
    x = torch.randn(2, 8, 16)

    def run(x):
        with collect_routing(decoder) as routings:
            decoder(x, tokens)
        (routing,) = routings.values()
        return routing.tail_mask_T, balance_loss(routings, llm_spec())

    tail, loss = run(x)
    assert tail.any()
    noise = 5 * torch.randn_like(x)
    text_changed = torch.where((tokens == V).unsqueeze(-1), x, noise)
    vision_changed = torch.where((tokens == L).unsqueeze(-1), x, noise)
    assert torch.equal(run(text_changed)[0], tail)
    assert torch.equal(run(vision_changed)[1], loss)
    assert not torch.equal(run(vision_changed)[0], tail)
    assert not torch.equal(run(text_changed)[1], loss)


def test_the_balance_loss_has_no_gradient_on_vision_and_padding():
    """TV-D4c, TV-D4d through a layer: exactly zero, not merely small."""
    decoder = Decoder(llm_spec(), depth=1)
    tokens = letters("TVVVT. VVTT..")
    x = torch.randn(2, 6, 16, requires_grad=True)
    with collect_routing(decoder) as routings:
        decoder(x, tokens)
    balance_loss(routings, llm_spec()).backward()
    is_text = tokens == L
    assert (x.grad[~is_text] == 0).all()
    assert (x.grad[is_text].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("text", ["VVVV VVVV", "TTTT TTTT", ".... ....", "VVVV ...."])
def test_one_modality_alone(text):
    """TV-D4b and the edges: no text, no vision, nothing at all."""
    decoder = Decoder(llm_spec()).train()
    x = torch.randn(2, 4, 16, requires_grad=True)
    with collect_routing(decoder) as routings:
        out = decoder(x, letters(text))
    loss = balance_loss(routings, llm_spec())
    (out.sum() + loss).backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(out).all()
    if "T" not in text:
        assert loss == 0
    padding = letters(text) == P
    assert torch.equal(out[padding], x[padding])  # only the residual stream goes on


def gradients(decoder, x, tokens, between=None):
    """Of one forward and backward; `between` them another forward may run."""
    decoder.zero_grad()
    with collect_routing(decoder) as routings:
        out = decoder(x, tokens)
    if between is not None:
        between()
    (out.square().sum() + balance_loss(routings, decoder.layers[0].spec)).backward()
    return {name: p.grad.clone() for name, p in decoder.named_parameters()}


@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_recomputing_sees_the_tokens_of_its_own_forward(backend):
    """TV-V5: checkpointing changes nothing, also when another forward comes in between."""
    from gmoe_ltdr import use_expert_backend

    decoder = use_expert_backend(Decoder(llm_spec()), backend)
    x, other = torch.randn(2, 7, 16), torch.randn(3, 5, 16)
    tokens, other_tokens = letters("TVVVVVT VVVVTTT"), letters("VVVVV TTTTT TVVV.")
    expected = gradients(decoder, x, tokens)
    decoder.checkpointed = True

    def between():
        decoder(other, other_tokens)
        decoder(x, letters("TTTTTTT VVVVVVV"))  # the same shape

    for way in (None, between):
        for name, grad in gradients(decoder, x, tokens, way).items():
            assert torch.equal(grad, expected[name]), name


def test_a_retained_graph_recomputes_twice():
    decoder = Decoder(llm_spec())
    decoder.checkpointed = True
    x = torch.randn(1, 6, 16, requires_grad=True)
    loss = decoder(x, letters("TVVVVT")).square().sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)


def test_checkpointing_that_forgets_the_tokens_is_refused():
    decoder = Decoder(llm_spec())
    x = torch.randn(1, 4, 16, requires_grad=True)
    with decoder.modality.using(letters("TVVT")):
        out = checkpoint(decoder.layers[0], x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="context_fn=modality"):
        out.sum().backward()


def test_a_copy_has_a_modality_of_its_own_which_its_layers_share():
    decoder = Decoder(llm_spec())
    x, tokens = torch.randn(1, 4, 16), letters("TVVT")
    out = decoder(x, tokens)
    out.sum().backward()
    twin = copy.deepcopy(decoder)
    owners = {id(layer.context_of) for layer in moe_layers(twin).values()}
    assert owners == {id(twin.modality)}
    assert id(decoder.modality) not in owners
    assert torch.equal(twin(x, tokens), out)
    assert set(decoder.state_dict()) == set(twin.state_dict())


def test_more_than_modality_can_be_known():
    decoder = Decoder(llm_spec(tail_rule=preset("ltdr").tail_rule))
    set_image_info(decoder, domain_B=torch.tensor([3, 4]))
    with decoder.modality.using(TokenContext(letters("TV VT"))):
        context = decoder.layers[0].context_of(torch.randn(2, 2, 16))
    assert context.domain_B.tolist() == [3, 4]
