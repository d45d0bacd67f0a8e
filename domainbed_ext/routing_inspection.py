"""What the routers of a trained model do with the images of each domain, trained on or not."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from domainbed_ext.atomic_files import write_atomically
from domainbed_ext.datasets import get_dataset_class
from domainbed_ext.datasets.base import EnvSplit
from domainbed_ext.datasets.image_cache import use_image_cache
from domainbed_ext.datasets.image_cache_flags import image_cache_options
from domainbed_ext.errors import UsageError
from domainbed_ext.foreground_masks import ForegroundMasks
from domainbed_ext.loaders import EvalBatches
from domainbed_ext.saved_models import MODEL_NAME, load_algorithm, read_model_info
from domainbed_ext.train_args import TrainArgs
from gmoe_ltdr import collect_routing, load_model, moe_layers
from gmoe_ltdr.expert_distance import expert_distances
from gmoe_ltdr.stats import RoutingStats
from gmoe_ltdr.token_stats import rounded

INSPECTION_FILE = "routing.json"
FORMAT = "gmoe-ltdr inspection 1"
ALL = "all"


@dataclass(frozen=True)
class SparseModel:
    """A model with sparse layers, ready to predict.

    Attributes:
        network: What holds the layers.
        predict: Images to logits, in evaluation mode.
        info: What the run's `model.json` says; None for a model that `save_model` wrote.
    """

    network: nn.Module
    predict: Callable[[Tensor], Tensor]
    info: dict[str, Any] | None = None


@dataclass(frozen=True)
class DomainRouting:
    """What routers did with one domain's images.

    Attributes:
        name: Of the domain.
        trained: Whether it was trained on; None if nobody knows.
        stats: Detailed statistics; its groups are the classes, or all images are one group.
    """

    name: str
    trained: bool | None
    stats: RoutingStats


@dataclass(frozen=True)
class Inspection:
    """What was found out about one model on one data set.

    Attributes:
        model: Its folder.
        dataset, split: Which images.
        domains: In the data set's order.
        distances: Between experts, by layer: (E, E), see `expert_distances`.
    """

    model: str
    dataset: str
    split: str
    domains: list[DomainRouting]
    distances: dict[str, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> RoutingStats:
        """All domains together."""
        first = self.domains[0].stats
        total = RoutingStats(first.groups, detailed=first.detailed)
        for domain in self.domains:
            total.merge(domain.stats)
        return total

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: numbers to read, and sums to compute others from."""
        return {
            "format": FORMAT,
            "model": self.model,
            "dataset": self.dataset,
            "split": self.split,
            "expert_distances": {name: rounded(d.tolist()) for name, d in self.distances.items()},
            "domains": [
                {
                    "name": domain.name,
                    "trained": domain.trained,
                    "layers": {
                        layer: domain.stats.of(layer).summary() for layer in domain.stats.layers
                    },
                    "statistics": domain.stats.to_dict(),
                }
                for domain in self.domains
            ],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Inspection:
        return cls(
            model=values["model"],
            dataset=values["dataset"],
            split=values["split"],
            domains=[
                DomainRouting(
                    name=domain["name"],
                    trained=domain["trained"],
                    stats=RoutingStats.from_dict(domain["statistics"]),
                )
                for domain in values["domains"]
            ],
            distances={
                name: torch.tensor(distances)
                for name, distances in values["expert_distances"].items()
            },
        )

    def write(self, folder: Path) -> Path:
        path = folder / INSPECTION_FILE
        write_atomically(path, json.dumps(self.to_dict()) + "\n")
        return path


def read_inspection(path: Path) -> Inspection:
    """What `Inspection.write` wrote."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']!r}")
        return Inspection.from_dict(values)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; run `ltdr inspect` on that model first") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} was not written by this version of `ltdr inspect` ({error}); run it again"
        ) from None


def load_sparse_model(folder: str | Path, *, name: str = MODEL_NAME, device: str) -> SparseModel:
    """A finished run, or what `gmoe_ltdr.save_model` wrote.

    Args:
        folder: Of either.
        name: Which model of a run's folder: "model", or "model_step300".
        device: Where it goes.
    """
    folder = Path(folder)
    if (folder / f"{name}.json").is_file():
        algorithm: Any = load_algorithm(folder, name=name, device=device)
        info = read_model_info(folder, name=name)
        network = getattr(algorithm, "predicting_network", algorithm)
        network = getattr(network, "module", network)  # of averaged weights
        model = SparseModel(network, algorithm.predict, info)
    elif (folder / "config.json").is_file():
        try:
            network = load_model(folder, device=device)
        except ValueError as error:
            raise UsageError(str(error)) from None
        model = SparseModel(network, network)
    else:
        raise UsageError(
            f"{folder} holds no model; give the folder of a finished run ({name}.json and "
            f"{name}.safetensors), or one that save_model wrote (config.json)"
        )
    if not moe_layers(model.network):
        what = model.info["args"]["algorithm"] if model.info else type(model.network).__name__
        raise UsageError(f"{folder} holds {what}, which has no sparse layers to inspect")
    return model


def inspect_model(
    model: SparseModel,
    args: TrainArgs,
    *,
    folder: str,
    split: str,
    device: str,
    batch_size: int = 64,
    max_images: int | None = None,
    by_class: bool = False,
    masks: str | None = None,
    progress: Callable[[str, int, int], None] = lambda domain, done, total: None,
) -> Inspection:
    """Goes through each domain's images once.

    Args:
        model: What to inspect.
        args: Of the run, or such as a run would have: data set, splits, image cache.
        folder: Where the model is from.
        split: "in", "out", or another that the data set has; "all": every image.
        device: Where the model is.
        batch_size: Changes no number.
        max_images: Per domain; the first of the split.
        by_class: Keep the classes apart.
        masks: Folder of foreground masks; see `ForegroundMasks`.
        progress: Called with a domain's name, images done, and images in all.
    """
    dataset = _load_dataset(model, args)
    foreground = None if masks is None else ForegroundMasks(masks, model.network)
    domains = []
    for env in range(len(dataset)):
        images = _split(dataset, env, split, args)
        if max_images is not None:
            images = EnvSplit(images.environment, images.keys[:max_images], images.name)
        stats = RoutingStats(dataset.class_names if by_class else ("all",), detailed=True)
        batches = EvalBatches(
            images,
            batch_size=batch_size,
            transform=dataset.eval_transform,
            num_workers=dataset.N_WORKERS if args.num_workers is None else args.num_workers,
            device=device,
        )
        masks_of = None if foreground is None else foreground.batches(images, batch_size)
        done = 0
        for labels, routings, norms, foreground_BL in _routings(model, batches, masks_of, device):
            stats.add(
                routings,
                labels if by_class else None,
                norm_of=norms,
                foreground_BL=foreground_BL,
            )
            done += len(labels)
            progress(images.environment.name, done, len(images))
        domains.append(
            DomainRouting(images.environment.name, _was_trained(model, args, env), stats)
        )
    layers = moe_layers(model.network)
    return Inspection(
        model=folder,
        dataset=args.dataset,
        split=split,
        domains=domains,
        distances={name: expert_distances(layer).cpu() for name, layer in layers.items()},
    )


def _load_dataset(model: SparseModel, args: TrainArgs) -> Any:
    dataset_class: Any = get_dataset_class(args.dataset)
    hparams = _image_hparams(model)
    dataset = dataset_class(args.data_dir, list(args.test_envs), hparams)
    use_image_cache(dataset, args.dataset, image_cache_options(args), announce=print)
    expected = _input_shape(model)
    if tuple(dataset.input_shape) != expected:
        raise UsageError(
            f"the model takes images of shape {expected}, but those of {args.dataset} have "
            f"{tuple(dataset.input_shape)}; choose a data set like the one it was trained on"
        )
    return dataset


def _image_hparams(model: SparseModel) -> dict[str, Any]:
    if model.info is not None:
        return dict(model.info["model_hparams"])
    size = _input_shape(model)[-1]
    return {"backbone": f"vit_{size}"}  # data sets read the size off the name's end


def _input_shape(model: SparseModel) -> tuple[int, ...]:
    if model.info is not None:
        return tuple(model.info["model_input_shape"])
    embed: Any = model.network.patch_embed
    return (embed.proj.in_channels, *embed.img_size)


def _split(dataset: Any, env: int, split: str, args: TrainArgs) -> EnvSplit:
    environment = dataset[env]
    if split == ALL:
        return EnvSplit(environment, np.arange(len(environment)), f"env{env}")
    splits = dataset.splits(
        env,
        holdout_fraction=args.holdout_fraction,
        trial_seed=args.trial_seed,
        uda_holdout_fraction=args.uda_holdout_fraction,
        test_envs=args.test_envs,
    )
    if split not in splits:
        raise UsageError(
            f"--split {split} is unknown for {args.dataset}; choose among {', '.join(splits)}, "
            f"{ALL}"
        )
    if not len(splits[split]):
        raise UsageError(f"--split {split} of {environment.name} is empty; choose {ALL}")
    return splits[split]


def _was_trained(model: SparseModel, args: TrainArgs, env: int) -> bool | None:
    if model.info is None:
        return None
    run = model.info["args"]
    return args.dataset == run["dataset"] and env not in run["test_envs"]


@torch.inference_mode()
def _routings(
    model: SparseModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    masks: Iterable[Tensor] | None,
    device: str,
) -> Iterator[tuple[Tensor, dict, dict[str, Tensor], Tensor | None]]:
    """For each batch: labels, routings, token norms by layer, and foreground."""
    masks_or_none: Iterable[Tensor | None] = itertools.repeat(None) if masks is None else masks
    for (images, labels), foreground_BL in zip(batches, masks_or_none, strict=False):
        with _token_norms(model.network) as norms, collect_routing(model.network) as routings:
            model.predict(images.to(device))
        if foreground_BL is not None:
            foreground_BL = foreground_BL.to(device)
        yield labels.to(device), routings, norms, foreground_BL


@contextlib.contextmanager
def _token_norms(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """L2 norms (T,) of the residual stream where it enters each sparse layer's branch.

    What the layer itself gets is normalised and has nearly one norm; so its norm layer is asked,
    where the block has timm's name for it.
    """
    norms: dict[str, Tensor] = {}

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            norms[name] = inputs[0].float().norm(dim=-1).reshape(-1)

        return keep

    handles = []
    modules = dict(network.named_modules())
    for name, layer in moe_layers(network).items():
        block, _, _ = name.rpartition(".")
        watched = modules.get(f"{block}.norm2", layer)
        handles.append(watched.register_forward_pre_hook(hook_of(name)))
    try:
        yield norms
    finally:
        for handle in handles:
            handle.remove()


def compare_names(inspections: Sequence[Inspection]) -> list[str]:
    """A short, different name for each model: its folder's, or as much of its path as it takes."""
    paths = [Path(inspection.model).resolve().parts for inspection in inspections]
    for length in range(1, max(len(parts) for parts in paths) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [inspection.model for inspection in inspections]
