"""A package `domainbed` with the names and manners of the real one, and next to nothing in it."""

from __future__ import annotations

from pathlib import Path

MODULES = {
    "__init__": "",
    "scripts/__init__": "",
    "algorithms": """
ALGORITHMS = ["ERM", "Fish"]

def get_algorithm_class(name):
    if name not in globals():
        raise NotImplementedError(f"Algorithm not found: {name}")
    return globals()[name]

class ERM:
    pass
""",
    "hparams_registry": """
def _hparams(algorithm, dataset, random_seed):
    return {"lr": (5e-5, random_seed / 7), "asked": (algorithm, dataset)}

def default_hparams(algorithm, dataset):
    return {name: pair[0] for name, pair in _hparams(algorithm, dataset, 0).items()}

def random_hparams(algorithm, dataset, seed):
    return {name: pair[1] for name, pair in _hparams(algorithm, dataset, seed).items()}
""",
    "datasets": """
DATASETS = ["Debug28", "PACS"]

class Debug28:
    ENVIRONMENTS = ["0", "1", "2"]
    N_STEPS = 17

def get_dataset_class(name):
    if name not in globals():
        raise NotImplementedError(f"Dataset not found: {name}")
    return globals()[name]
""",
    "networks": """
def Featurizer(input_shape, hparams):
    if input_shape[1:3] == (28, 28):
        return "a network for digits"
    raise NotImplementedError
""",
    "command_launchers": """
def local_launcher(commands):
    pass

REGISTRY = {"local": local_launcher}
""",
    "scripts/show": """
import json
from domainbed import datasets, hparams_registry, algorithms, command_launchers
print(json.dumps({
    "algorithms": algorithms.ALGORITHMS,
    "datasets": datasets.DATASETS,
    "launchers": sorted(command_launchers.REGISTRY),
    "LTDR": hparams_registry.default_hparams("LTDR", "Debug28"),
    "named": sorted(name for name in vars(datasets) if ":" in name),
}))
""",
}


def write_checkout(root: Path, **changed: str) -> Path:
    """Writes the package below `root`; `changed` replaces modules' source. Returns `root`."""
    for name, source in {**MODULES, **changed}.items():
        file = root / "domainbed" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    for script in ("train", "sweep", "collect_results"):
        target = root / "domainbed" / "scripts" / f"{script}.py"
        target.write_text(MODULES["scripts/show"])
    return root
