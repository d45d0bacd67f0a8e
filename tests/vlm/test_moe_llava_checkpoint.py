"""MoE-LLaVA checkpoints converted for transformers: the logits of MoE-LLaVA's own code."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from gmoe_ltdr import collect_routing, moe_layers
from gmoe_ltdr.losses import load_balancing_loss
from gmoe_ltdr.routing import Modality
from gmoe_ltdr.tail import TailRule
from gmoe_ltdr.vlm.moe_llava_checkpoint import from_moe_llava
from gmoe_ltdr.vlm.moe_llava_config import feature_strategy, num_features, vision_config_of
from gmoe_ltdr.vlm.transformers import LTDRLlavaForConditionalGeneration
from tests.vlm import moe_llava_references
from tests.vlm.goldens import golden, write_checkpoint, write_tower
from tests.vlm.llavas import FAMILIES, IMAGE, dense_llava, questions
from tests.vlm.llavas import VOCABULARY as VOCABULARY_OF_FAMILIES

ATOL = 1e-5
VOCABULARY = 128


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The golden checkpoint, converted as MoE-LLaVA routes."""
    folder = tmp_path_factory.mktemp("moe_llava")
    source = write_checkpoint(folder / "source", shards=3)
    tower = write_tower(folder / "clip")
    return from_moe_llava(source, folder / "converted", vision_tower=tower)


def golden_inputs(image_token_id):
    """The golden batch with one id per image feature, at the places of its spliced layout."""
    g = golden()
    ids = torch.zeros_like(g.modality, dtype=torch.long)
    ids[g.modality == int(Modality.VISION)] = image_token_id
    for row in range(len(ids)):
        words = g.input_ids[row][g.attention_mask[row] & (g.input_ids[row] != -200)]
        ids[row][g.modality[row] == int(Modality.LANGUAGE)] = words
    return {
        "input_ids": ids,
        "attention_mask": g.real.long(),
        "pixel_values": torch.stack(g.images),
    }


def load(folder, **spec_changes):
    model = LTDRLlavaForConditionalGeneration.from_pretrained(folder)
    for layer in moe_layers(model).values():
        layer.spec = layer.router.spec = type(layer.spec)(**{**vars(layer.spec), **spec_changes})
    return model.eval()


def test_logits_of_moe_llava_itself(converted):
    """Across torch 2.0.1 to today's, transformers 4.37 to today's."""
    model, info = LTDRLlavaForConditionalGeneration.from_pretrained(
        converted, output_loading_info=True
    )
    assert not any(info.values()), info
    assert model.config.image_token_id == VOCABULARY
    assert model.config.spec.layers == (0, 2)
    with torch.no_grad(), collect_routing(model) as routings:
        logits = model(**golden_inputs(VOCABULARY)).logits[..., :VOCABULARY]
    g = golden()
    torch.testing.assert_close(logits[g.real], g.logits[g.real], atol=ATOL, rtol=0)
    for routing in routings.values():
        assert torch.equal(routing.modality_T.view(routing.shape_BL), g.modality)


def test_ltdr_as_the_prototype_computed_it(converted):
    """The same weights, routed by LTDR with the batch's threshold; and its balance losses."""
    # the tail rule lives in the router, so it can be switched on in a loaded model
    model = load(converted, tail_rule=TailRule(eval_scope="batch"))
    for layer in moe_layers(model).values():
        assert layer.router.spec.activates_tail
    with torch.no_grad(), collect_routing(model) as routings:
        logits = model(**golden_inputs(VOCABULARY)).logits[..., :VOCABULARY]
    g = golden()
    torch.testing.assert_close(logits[g.real], g.ltdr_logits[g.real], atol=ATOL, rtol=0)
    for routing, expected in zip(routings.values(), g.ltdr_aux, strict=True):
        found = load_balancing_loss(routing, routing.of(Modality.LANGUAGE))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert (logits - g.logits).abs().max() > 1e-2  # the tail rule does something here


OLD_NAMES = (
    ("model.vision_tower.", "model.image_tower.image_tower.vision_model."),
    ("model.multi_modal_projector.linear_1.", "model.mm_projector.image_spatial_proj.0."),
    ("model.multi_modal_projector.linear_2.", "model.mm_projector.image_spatial_proj.2."),
    ("model.language_model.", "model."),
    ("lm_head.", "lm_head."),
)


def as_moe_llava(dense, folder, family):
    """A dense LLaVA as a MoE-LLaVA checkpoint whose experts are equal copies."""
    state = {}
    for name, value in dense.state_dict().items():
        new, old = next(pair for pair in OLD_NAMES if name.startswith(pair[0]))
        old_name = (old + name.removeprefix(new)).replace(
            "vision_model.vision_model.", "vision_model."
        )
        layer, mlp, part = old_name.partition(".mlp.")
        if mlp and layer in ("model.layers.1", "model.layers.3"):
            for e in range(4):
                state[f"{layer}.mlp.deepspeed_moe.experts.deepspeed_experts.{e}.{part}"] = value
            state[f"{layer}.mlp.deepspeed_moe.gate.wg.weight"] = torch.randn(4, 32)
        else:
            state[old_name] = value
    text = dense.config.text_config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act")
    config = {name: getattr(text, name) for name in names}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
    own = {
        "stablelm": {"norm_eps": 1e-5, "rope_pct": 0.25, "use_qkv_bias": False},
        "qwen2": {"rms_norm_eps": 1e-6},
        "phi": {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    }[family]
    kind = {"stablelm": "stablelm", "qwen2": "qwen1_5", "phi": "phi"}[family]
    moe = {"moe_layers_idx": [1, 3], "num_experts": [4], "top_k_experts": 2}
    config.update(heads, **own, rope_theta=10000.0, bos_token_id=1, eos_token_id=None)
    config.update(model_type=f"moe_llava_{kind}", moe=moe, image_projector_type="mlp2x_gelu")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "mm_image_tower": "clip"}))
    torch.save(state, folder / "pytorch_model.bin")
    dense.config.vision_config.save_pretrained(folder / "clip")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_right_names_and_numbers(family, tmp_path):
    """Equal experts compute what the dense network does: a hand-made checkpoint of each family."""
    dense, batch = dense_llava(family), questions()
    with torch.no_grad():
        expected = dense(**batch).logits
    out = from_moe_llava(as_moe_llava(dense, tmp_path / "s", family), tmp_path / "out")
    model, info = LTDRLlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    batch["input_ids"][batch["input_ids"] == IMAGE] = VOCABULARY_OF_FAMILIES
    with torch.no_grad():
        logits = model(**batch).logits[..., :VOCABULARY_OF_FAMILIES]
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], atol=ATOL, rtol=0)


@pytest.mark.moe_llava
@pytest.mark.skipif(
    bool(moe_llava_references.why_not()), reason=moe_llava_references.why_not() or "it is there"
)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("family", ["stablelm", "phi", "qwen1_5"])
def test_the_logits_of_moe_llava_at_its_pins(family, k, tmp_path):
    """Every family, as the golden file has it for one."""
    expected = moe_llava_references.references()[family, k, False]
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(expected["config"]))
    torch.save(expected["state"], source / "pytorch_model.bin")
    out = from_moe_llava(source, tmp_path / "out", vision_tower=write_tower(tmp_path / "clip"))
    model = LTDRLlavaForConditionalGeneration.from_pretrained(out).eval()
    with torch.no_grad():
        logits = model(**golden_inputs(VOCABULARY)).logits[..., :VOCABULARY]
    real = golden().real
    torch.testing.assert_close(logits[real], expected["logits"][real], atol=ATOL, rtol=0)


def test_the_preset_is_written_down(tmp_path):
    source = write_checkpoint(tmp_path / "source")
    tower = write_tower(tmp_path / "clip")
    folder = from_moe_llava(source, tmp_path / "out", preset="ltdr", vision_tower=tower)
    model = LTDRLlavaForConditionalGeneration.from_pretrained(folder)
    spec = model.config.spec
    assert spec.activates_tail
    assert (spec.num_experts, spec.top_k, spec.balance_weight) == (4, 2, 0.01)
    generated = model.generate(**golden_inputs(VOCABULARY), max_new_tokens=4, do_sample=False)
    assert (generated[:, -4:] != VOCABULARY).all()


def weights(folder):
    return LTDRLlavaForConditionalGeneration.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("way", ["pickled", "small files", "tower apart", "tower whole"])
def test_every_layout_of_files_gives_the_same_weights(converted, tmp_path, way):
    options, drop = {}, ()
    if way == "small files":
        options["max_shard_bytes"] = 300_000
    if way.startswith("tower"):
        drop = ("model.image_tower.",)
    source = write_checkpoint(tmp_path / "s", shards=2, pickled=way == "pickled", drop=drop)
    tower = write_tower(tmp_path / "clip", weights=bool(drop))
    if way == "tower whole":  # a CLIP with its text half
        config = {"model_type": "clip", "vision_config": golden().clip}
        (tower / "config.json").write_text(json.dumps(config))
    out = from_moe_llava(source, tmp_path / "out", vision_tower=tower, **options)
    if way == "small files":
        sizes = [path.stat().st_size for path in out.glob("*.safetensors")]
        assert len(sizes) > 3
        assert max(sizes) < 330_000
    found = weights(out)
    for name, value in weights(converted).items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("aspect", ["pad", None])
def test_a_tokenizer_brings_the_image_token_and_a_processor(tmp_path, aspect):
    from PIL import Image
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoProcessor, PreTrainedTokenizerFast

    words = {"<pad>": 0, "what": 1, "is": 2, "this": 3, "?": 4, "<unk>": 5}
    plain = Tokenizer(WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>", model_max_length=256,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    tokenizer.save_pretrained(tmp_path / "words")
    more = {"tokenizer_padding_side": "left", "image_aspect_ratio": aspect}
    source = write_checkpoint(tmp_path / "s", **more)
    tower = write_tower(tmp_path / "c")
    settings = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (tower / "preprocessor_config.json").write_text(json.dumps(settings))
    out = from_moe_llava(source, tmp_path / "out", vision_tower=tower, tokenizer=tmp_path / "words")
    model = LTDRLlavaForConditionalGeneration.from_pretrained(out)
    assert model.config.image_token_id == 6  # a row of the embeddings that no word uses
    assert model.lm_head.weight.shape == (VOCABULARY, 64)
    processor = AutoProcessor.from_pretrained(out)
    text = ["<image> what is this ?", "<image> what ?"]
    images = [Image.new("RGB", (16, 32), "white")] * 2
    inputs = processor(images=images, text=text, padding=True, return_tensors="pt")
    assert (inputs["input_ids"] == 6).sum(1).tolist() == [16, 16]
    assert inputs["attention_mask"][1].tolist() == [0, 0] + [1] * 18
    # white is (1 - .5) / .25 = 2; padded to a square, the sides are grey, which is about 0
    pixels = inputs["pixel_values"]
    assert pixels.shape == (2, 3, 16, 16)
    torch.testing.assert_close(pixels[:, :, :, 8], torch.full((2, 3, 16), 2.0), atol=0.1, rtol=0)
    expected = torch.full((2, 3, 16), 0.0 if aspect == "pad" else 2.0)
    torch.testing.assert_close(pixels[:, :, :, 0], expected, atol=0.1, rtol=0)
    with torch.no_grad(), collect_routing(model) as routings:
        model(**inputs)
    first = next(iter(routings.values()))
    assert int(first.of(Modality.VISION).sum()) == 32
    assert int(first.of(Modality.PADDING).sum()) == 2


MOE = golden().config["moe"]


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"model_type": "moe_llava_qwen"}, ValueError, "Qwen-1 and MiniCPM"),
        ({"moe": {}}, ValueError, "no MoE layer"),
        ({"moe": {**MOE, "ep_size": 2}}, NotImplementedError, "ep_size=2 ranks"),
        ({"moe": {**MOE, "use_tutel": True}}, NotImplementedError, "use_tutel=False"),
        ({"moe": {**MOE, "use_residual": True}}, ValueError, "convert_moe_llava"),
        ({"moe": {**MOE, "num_experts": [4, 2]}}, ValueError, r"\[4, 2\]"),
        ({"moe": {**MOE, "num_experts": [3, 3]}}, ValueError, r"\(4, 64\), but its config .* \(3,"),
        ({"moe": {**MOE, "top_k_experts": 9}}, ValueError, "top_k=9 must lie between 1"),
        ({"moe": {**MOE, "moe_layers_idx": [0]}}, ValueError, r"nothing for .*layers\.2\.mlp"),
        ({"moe": {**MOE, "moe_layers_idx": [0, 7]}}, ValueError, "blocks 0 to 3"),
        ({"image_projector_type": "linear"}, ValueError, "'linear' has no counterpart"),
        ({"intermediate_size": 64}, ValueError, "but its config says"),
        ({"num_hidden_layers": 5}, ValueError, r"nothing for .*layers\.4"),
    ],
)
def test_what_has_no_counterpart_is_refused(config, error, message, tmp_path):
    source = write_checkpoint(tmp_path / "s", **config)
    with pytest.raises(error, match=message):
        from_moe_llava(source, tmp_path / "out", vision_tower=write_tower(tmp_path / "clip"))
    assert not list((tmp_path / "out").rglob("*")), "half a model was left behind"


def test_the_tower_of_the_published_models_is_known(tmp_path):
    """CLIP-L/14 at 336 pixels: 24 by 24 features, and the class token where it is kept."""
    old = {"mm_image_tower": "openai/clip-vit-large-patch14-336"}
    vision = vision_config_of(old, tmp_path, None)
    assert num_features(vision, old) == 576
    with_class = {**old, "mm_vision_select_feature": "cls_patch"}
    assert feature_strategy(with_class) == "full"
    assert num_features(vision, with_class) == 577


def test_files_that_are_not_there(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"no readable config\.json"):
        from_moe_llava(tmp_path, out)
    source = write_checkpoint(tmp_path / "s", drop=("model.image_tower.",))
    with pytest.raises(ValueError, match="'openai/clip-tiny'; pass vision_tower="):
        from_moe_llava(source, out)
    with pytest.raises(ValueError, match=r"holds no config\.json of a CLIP"):
        from_moe_llava(source, out, vision_tower=tmp_path)
    config_alone = write_tower(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"neither \*\.safetensors nor"):
        from_moe_llava(source, out, vision_tower=config_alone)
    # its configuration can be found beside the checkpoint, but there are no weights
    write_tower(source / "openai" / "clip-tiny")
    with pytest.raises(ValueError, match="saved without its image tower"):
        from_moe_llava(source, out)
    for folder, message in (("nowhere", "'nowhere' is no folder"), (tmp_path, "cannot be loaded")):
        with pytest.raises(ValueError, match=message):
            from_moe_llava(source, out, vision_tower=config_alone, tokenizer=folder)
    (source / "model-0.safetensors").unlink()
    with pytest.raises(ValueError, match=r"neither \*\.safetensors nor"):
        from_moe_llava(source, out, vision_tower=config_alone)


def test_nothing_is_left_over_silently(tmp_path):
    from safetensors.torch import save_file

    source = write_checkpoint(tmp_path / "s")
    names = ("model.video_tower.x", "model.layers.0.self_attn.rotary_emb.inv_freq", "model.q.r")
    save_file({name: torch.zeros(2) for name in names}, source / "more.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors .* have no place .*: model\.q\.r$"):
        from_moe_llava(source, tmp_path / "out", vision_tower=write_tower(tmp_path / "clip"))


def test_adapters_are_to_be_merged_first(tmp_path):
    from safetensors.torch import save_file

    source = write_checkpoint(tmp_path / "s")
    extra = {"model.layers.0.mlp.up_proj.lora_A.default.weight": torch.zeros(2, 2)}
    save_file(extra, source / "adapter.safetensors")
    with pytest.raises(ValueError, match="merge them"):
        from_moe_llava(source, tmp_path / "out", vision_tower=write_tower(tmp_path / "clip"))
