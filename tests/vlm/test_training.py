"""Training through transformers' Trainer, accelerate and DistributedDataParallel: what the balance
loss adds is right under gradient accumulation and over ranks."""

import os

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from tests.distributed import run_ranks
from tests.vlm.llavas import questions, sparse_llava, with_labels

LEARNING_RATE = 0.1
BALANCE_WEIGHT = 1.0  # large, so that a factor in the balance loss cannot hide


def rows():
    """Four rows with 6 to 2 targets or so; no two parts of a step weigh the same."""
    found = []
    for number in range(4):
        batch = with_labels(questions(seed=number, padding=None))
        row = {name: value[0] for name, value in batch.items()}
        row["labels"][: 1 + 2 * number] = -100  # transformers 4.57 counts the first one, too
        found.append(row)
    return found


def collate(some_rows):
    return {name: torch.stack([row[name] for row in some_rows]) for name in some_rows[0]}


def num_targets(batch):
    return (batch["labels"][..., 1:] != -100).sum()


def model_to_train():
    model = sparse_llava(balance_weight=BALANCE_WEIGHT).train()
    model.model.vision_tower.requires_grad_(False)  # its last layer is never used
    return model


def one_step_by_hand(parts):
    """Parameters after one step on sum_i (cross-entropy_i + balance_i) * share_i."""
    model = model_to_train()
    total = sum(num_targets(part) for part in parts)
    for part in parts:
        output = model(**part)  # a mean over the part's targets
        (output.loss * num_targets(part) / total).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= LEARNING_RATE * parameter.grad
    return dict(model.named_parameters())


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_accumulates_gradients(batch_size, checkpointing, tmp_path):
    data = rows()
    parts = [collate(data[i : i + batch_size]) for i in range(0, 4, batch_size)]
    expected = one_step_by_hand(parts)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=1, report_to="none", save_strategy="no",
        per_device_train_batch_size=batch_size, gradient_accumulation_steps=4 // batch_size,
        optim="sgd", learning_rate=LEARNING_RATE, lr_scheduler_type="constant", max_grad_norm=0.0,
        gradient_checkpointing=checkpointing, disable_tqdm=True, remove_unused_columns=False,
        dataloader_pin_memory=False,
    )  # fmt: skip

    class InOrder(Trainer):
        def _get_train_sampler(self, *_args):
            return None

    model = model_to_train()
    trainer = InOrder(model, arguments, data_collator=collate, train_dataset=data)
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=1e-5, msg=name)
    moved = model.model.language_model.layers[0].mlp.router.gate.weight
    start = model_to_train().model.language_model.layers[0].mlp.router.gate.weight
    assert (moved - start).abs().max() > 1e-3


def trainer_of(model, folder, data, *, compute_loss_func=None, **options):
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, max_steps=1, report_to="none", save_strategy="no",
        per_device_train_batch_size=len(data), optim="sgd", learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant", max_grad_norm=0.0, disable_tqdm=True,
        remove_unused_columns=False, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    return Trainer(
        model, arguments, data_collator=collate, train_dataset=data,
        compute_loss_func=compute_loss_func,
    )  # fmt: skip


def test_without_labels_the_balance_loss_is_handed_out_and_said_to_be_in_no_loss(tmp_path):
    """Trainer takes labels away where it, or the user, makes the loss."""
    model = model_to_train()
    batch = collate(rows())
    expected = model(**batch)
    labels = batch.pop("labels")
    with pytest.warns(UserWarning, match="training without labels: .* Pass labels="):
        found = model(**batch)
    assert found.loss is None
    assert torch.equal(found.aux_loss, expected.aux_loss)
    logits = found.logits[:, :-1].flatten(0, 1)
    cross_entropy = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    torch.testing.assert_close(cross_entropy + found.aux_loss, expected.loss)
    with pytest.warns(UserWarning, match="label_smoothing_factor"):
        trainer_of(model, tmp_path, rows(), label_smoothing_factor=0.1).train()


def test_nothing_is_said_where_there_is_nothing_to_add(recwarn):
    batch = collate(rows())
    del batch["labels"]
    for nothing in ({"balance": "none"}, {"balance_weight": 0.0}):
        sparse_llava(**nothing).train()(**batch)
    with torch.no_grad():
        model_to_train()(**batch)
    model_to_train().eval()(**batch)
    assert not [w for w in recwarn if "labels" in str(w.message)]


def test_a_loss_function_of_the_users_own_can_add_the_balance_loss(tmp_path):
    def loss_of(output, labels, num_items_in_batch=None):
        logits = output.logits[:, :-1].flatten(0, 1)
        targets = labels[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits, targets) + output.aux_loss

    expected = one_step_by_hand([collate(rows())])
    model = model_to_train()
    with pytest.warns(UserWarning, match="compute_loss_func, which can add it"):
        trainer_of(model, tmp_path, rows(), compute_loss_func=loss_of).train()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=1e-5, msg=name)


def ranks_gradients():
    """One rank's half of a step, as Trainer scales it; the gradients by name."""
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    data = rows()
    parallel = DistributedDataParallel(model_to_train())
    total = sum(num_targets(collate([row])) for row in data)
    mine = collate(data[2 * rank : 2 * rank + 2])
    loss = parallel(**mine, num_items_in_batch=total).loss * num_ranks
    loss.backward()
    return {n: p.grad for n, p in parallel.module.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_ranks_agree_with_one_process():
    data = rows()
    model = model_to_train()
    parts = [collate(data[:2]), collate(data[2:])]
    total = sum(num_targets(part) for part in parts)
    for part in parts:
        (model(**part).loss * num_targets(part) / total).backward()
    found = run_ranks(ranks_gradients, 2)
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        assert torch.equal(found[0][name], found[1][name]), name
        torch.testing.assert_close(found[0][name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


def accelerated_parameters(rank_of):
    """Two accumulated parts per rank with accelerate, which divides by their number."""
    from accelerate import Accelerator

    rank = torch.distributed.get_rank()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.num_processes == 2
    model = model_to_train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)
    model, optimizer = accelerator.prepare(model, optimizer)
    data = rows()
    for number in rank_of[rank]:
        with accelerator.accumulate(model):
            accelerator.backward(model(**collate([data[number]])).loss)
            optimizer.step()
            optimizer.zero_grad()
    return {n: p.detach() for n, p in accelerator.unwrap_model(model).named_parameters()}


@pytest.mark.slow
def test_accelerate_on_two_ranks():
    model = model_to_train()
    for row in rows():
        (model(**collate([row])).loss / 4).backward()
    found = run_ranks(accelerated_parameters, 2, [[0, 1], [2, 3]])
    for name, parameter in model.named_parameters():
        assert torch.equal(found[0][name], found[1][name]), name
        expected = parameter.detach()
        if parameter.grad is not None:
            expected = expected - LEARNING_RATE * parameter.grad
        torch.testing.assert_close(found[0][name], expected, atol=1e-6, rtol=1e-4, msg=name)
