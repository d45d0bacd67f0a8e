"""`ltdr doctor` says what is there, what is not, and how to get it."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from fake_checkout import MODULES

from domainbed_ext import doctor
from domainbed_ext.datasets import DATASETS
from domainbed_ext.doctor import EXTRAS, examine, main


def test_everything_is_looked_at(tmp_path):
    findings = {item.name: item for item in examine(str(tmp_path))}
    needed = "Python gmoe-ltdr torch torchvision timm tutel domainbed bfloat16".split()
    assert {*needed, *DATASETS, *(f"extra [{extra}]" for extra in EXTRAS)} <= set(findings)
    assert findings["torch"].status == "ok"
    assert findings["RotatedDigits"].detail == "1797 images, embedded"
    assert findings["PACS"].remedy == f"ltdr download PACS --data_dir {tmp_path}"


def test_what_is_missing_comes_with_its_command(monkeypatch):
    real = importlib.util.find_spec
    hidden = ("tutel", "resvg_py")
    monkeypatch.setattr(doctor, "find_spec", lambda n: None if n in hidden else real(n))
    version = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda n: None if n == "timm" else version(n))
    findings = {item.name: item for item in examine()}
    assert findings["timm"].status == "missing"
    assert findings["timm"].remedy == "pip install timm"
    assert findings["extra [emoji]"].remedy == "pip install resvg-py"
    # Tutel's setup imports torch, so the build must see it; and it is on no index.
    assert "--no-build-isolation git+https://github.com/microsoft/tutel" in findings["tutel"].remedy
    assert main([]) == 1


@pytest.mark.parametrize(
    ("active", "off", "modules", "status", "said"),
    [
        (True, False, MODULES, "ok", ", with ERM_ViT, GMOE, "),
        (True, False, {"__init__": ""}, "optional", ", a version that is not known (no domainbed."),
        (False, True, MODULES, "ok", ", nothing added: DOMAINBED_EXT is off"),
        (False, False, MODULES, "optional", ", nothing added: the start-up line is not installed"),
    ],
)
def test_a_checkout_is_named_with_what_it_gets(
    tmp_path, monkeypatch, active, off, modules, status, said
):
    for name, source in modules.items():
        file = tmp_path / "domainbed" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(doctor, "_hook_is_active", lambda: active)
    monkeypatch.setattr(doctor, "is_switched_off", lambda: off)
    monkeypatch.setattr(doctor, "CHECKOUT_NEEDS", {"json": "json"})
    finding = doctor._domainbed()
    assert finding.detail.startswith(f"the checkout at {tmp_path / 'domainbed'}{said}")
    assert finding.status == status
    monkeypatch.setattr(doctor, "CHECKOUT_NEEDS", {"no_such_module": "wilds"})
    finding = doctor._domainbed()
    if active and status == "ok":
        assert finding.detail.endswith("; lacks wilds")
        assert finding.remedy == "pip install --no-deps wilds"


def test_report_is_plain_text_when_it_goes_to_a_file(capsys, tmp_path):
    assert main(["--data_dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["Python", "ok"]
    assert "\x1b" not in "".join(lines)
