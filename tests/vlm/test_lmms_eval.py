"""The model class for lmms-eval, driven as lmms-eval does, without it."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from PIL import Image

from tests.vlm.llavas import IMAGE, PAD, VOCABULARY, sparse_llava


@pytest.fixture
def model_class(monkeypatch):
    """With a base class in place of lmms-eval's."""
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))

    class Base:
        def __init__(self):
            self.task_dict = {}

    sys.modules["lmms_eval.api.model"].lmms = Base
    monkeypatch.delitem(sys.modules, "gmoe_ltdr.vlm.lmms_eval_model", raising=False)
    from gmoe_ltdr.vlm.lmms_eval_model import LTDRLlavaModel

    yield LTDRLlavaModel
    sys.modules.pop("gmoe_ltdr.vlm.lmms_eval_model", None)


@pytest.fixture
def folder(tmp_path):
    """A model and a processor whose words are w00, w01, ... and <image>."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = {f"w{i:02}": i for i in range(VOCABULARY) if i != IMAGE} | {"<image>": IMAGE}
    plain = Tokenizer(WordLevel(words, unk_token="w02"))
    plain.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token=f"w{PAD:02}", unk_token="w02",
        additional_special_tokens=["<image>"], model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=8, image_token="<image>",
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    ).save_pretrained(tmp_path)  # fmt: skip
    sparse_llava().save_pretrained(tmp_path)
    return tmp_path


def request(*arguments):
    return SimpleNamespace(args=arguments)


def test_answers_and_likelihoods(model_class, folder):
    model = model_class(pretrained=str(folder), device="cpu", max_new_tokens="3")
    picture = Image.new("RGB", (20, 24), "red")
    model.task_dict = {"task": {"test": [{"image": picture, "answer": "w09 w08"}, {}]}}

    def visual(doc):
        return [doc["image"]] if doc else []

    place = (visual, 0, "task", "test")
    (free,) = model.generate_until([request("w05 w06", {}, *place)])
    words = free.split()
    assert len(words) == 3
    # where the picture stands may be said, and stop strings cut
    options = {"until": [words[1]], "temperature": 0}
    first, second, text = model.generate_until([
        request("<image> w05 w06", {}, *place),
        request("w05 w06", options, *place),
        request("w05 w06", {}, visual, 1, "task", "test"),
    ])  # fmt: skip
    assert first == free
    assert second == free.split(words[1])[0].strip()
    assert len(text.split()) == 3  # without a picture
    asked = [
        request("w05 w06", free, *place),
        request("w05 w06", lambda doc: doc["answer"], *place),
    ]
    (greedy, is_greedy), (other, is_other) = model.loglikelihood(asked)
    assert is_greedy
    assert not is_other
    assert other < greedy < 0
    # by hand, one token at a time
    inputs = model._inputs("w05 w06", [picture])
    total = 0.0
    with torch.no_grad():
        for word in (9, 8):
            logits = model.model(**inputs).logits[0, -1].log_softmax(-1)
            total += float(logits[word])
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[word]])], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    assert other == pytest.approx(total, abs=1e-4)


def test_refusals(model_class, folder):
    with pytest.raises(ValueError, match="knows no argument revision; it has pretrained"):
        model_class(pretrained=str(folder), revision="main")
    model = model_class(pretrained=str(folder), device="cpu")
    with pytest.raises(NotImplementedError, match="one round"):
        model.generate_until_multi_round([])


def test_without_lmms_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.delitem(sys.modules, "gmoe_ltdr.vlm.lmms_eval_model", raising=False)
    with pytest.raises(ImportError, match="pip install lmms-eval"):
        __import__("gmoe_ltdr.vlm.lmms_eval_model")
