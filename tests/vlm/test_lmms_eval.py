"""The model class for lmms-eval, driven as lmms-eval does, without it; and in lmms-eval itself:

pip install lmms-eval==0.7.3 datasets      # in an environment that has this package
LMMS_EVAL_PYTHON=/path/to/its/python python -m pytest -m slow tests/vlm/test_lmms_eval.py
"""

import json
import os
import subprocess
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


LMMS_EVAL = os.environ.get("LMMS_EVAL_PYTHON", "")
TASK = """\
dataset_path: {folder}/data
dataset_kwargs:
  load_from_disk: True
task: tiny
test_split: test
output_type: generate_until
doc_to_visual: !function tiny.visual
doc_to_text: !function tiny.text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 1
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 0.0
"""
TASK_FUNCTIONS = """\
def visual(doc):
    return [doc["image"].convert("RGB")]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""
# the data sets' format is that library's, so its interpreter writes them
WRITE_DATA = """\
import json, sys
from datasets import Dataset, DatasetDict, Image
folder = sys.argv[1]
rows = json.load(open(f"{folder}/rows.json"))
data = Dataset.from_list(rows).cast_column("image", Image())
DatasetDict({"test": data}).save_to_disk(f"{folder}/data")
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not LMMS_EVAL, reason="LMMS_EVAL_PYTHON names no interpreter with lmms-eval and this package"
)
def test_lmms_eval_itself(folder, tmp_path):
    """Offline, on a task of its own; half of the answers are the model's."""
    from transformers import AutoProcessor

    from gmoe_ltdr.vlm.transformers import LTDRLlavaForConditionalGeneration

    model = LTDRLlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    rows = []
    for number in range(6):
        picture = Image.new("RGB", (20, 20), (40 * number, 50, 90))
        path = tmp_path / f"{number}.png"
        picture.save(path)
        question = f"w05 w{number + 10}"
        inputs = processor(images=[picture], text=f"<image> {question}", return_tensors="pt")
        with torch.no_grad():
            answer = processor.tokenizer.decode(model(**inputs).logits[0, -1].argmax())
        right = number % 2 == 0
        rows.append({
            "image": str(path),
            "question": question,
            "answer": answer if right else f"no {answer}",
        })  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(folder=tmp_path))
    (tmp_path / "tasks" / "tiny.py").write_text(TASK_FUNCTIONS)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}

    def run(*arguments):
        done = subprocess.run(
            [LMMS_EVAL, *arguments], env=environment, cwd=tmp_path, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stderr[-4000:]

    run("-c", WRITE_DATA, str(tmp_path))
    said = run(
        "-m", "lmms_eval", "--model", "ltdr_llava", "--model_args",
        f"pretrained={folder},device=cpu", "--tasks", "tiny", "--include_path",
        str(tmp_path / "tasks"), "--batch_size", "1", "--output_path", str(tmp_path / "results"),
    )  # fmt: skip
    results = next((tmp_path / "results").rglob("*_results.json"), None)
    assert results is not None, said  # its exit status is 0 all the same
    assert json.loads(results.read_text())["results"]["tiny"]["exact_match,none"] == 0.5
