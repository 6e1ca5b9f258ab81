"""All of a training step in sight, from moelab's public names alone; to the same bits as `moelab train` on a CPU.

    python examples/minimal_loop.py train/tiny_moe train.steps=20 run_dir=unused

For an idea that the trainer has no place for: another optimizer, a second loss, gradients to look at. What it leaves
out is what surrounds a step: logs, checkpoints, observers, alarms, micro-batches and a GPU.
"""

from __future__ import annotations

import sys

import torch

import moelab


def train(config: moelab.RunConfig) -> tuple[torch.nn.Module, list[float]]:
    """-> the trained model, and the loss of each step."""
    run = moelab.prepare(config)  # data, model, optimizer, balance losses; `config` itself stays as it was written
    model, optimizer = run.model, run.optimizer
    assert run.step_settings.micro_batch_size == config.train.batch_size, "one micro-batch a step"
    losses = []
    for step in range(config.train.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.lr * moelab.learning_rate_factor(config.schedule, step, config.train.steps)
        batch = run.batches.batch(step)  # input_ids, targets, document_id, domain_id: all [B, S]
        model.train()
        optimizer.zero_grad()

        # Routers and plugins draw from streams that are keyed by what for and by the step, never by what came before.
        torch.manual_seed(moelab.derive_seed(config.seed, "step", step))
        noise = moelab.generator(config.seed, "routing noise", step, 0)
        tokens = moelab.TokenContext(batch.document_id, batch.domain_id, noise)
        with run.step_settings.precision.autocast():
            output = model(batch.input_ids, targets=batch.targets, tokens=tokens)
        assert output.token_loss is not None

        # The loss of the language model is a mean over tokens; each balance loss sees how every layer routed them.
        terms = [output.token_loss.sum() / int((batch.targets >= 0).sum())]
        routed = moelab.BatchStatistics(run.balance_losses)
        routed.add(output.records)
        for balance in run.balance_losses:
            terms.append(balance(output.records, routed.context(balance)) * balance.weight_at(step))
        loss = torch.stack(terms).sum()
        loss.backward()

        if config.train.grad_clip:
            torch.nn.utils.clip_grad_norm_(run.learner.parameters(), config.train.grad_clip)
        optimizer.step()
        routed.after_step(run.blocks, step)  # routers that balance without a loss move their biases here
        for balance in run.balance_losses:
            balance.after_step(routed.context(balance))
        losses.append(loss.item())
    return model, losses


if __name__ == "__main__":
    _, losses = train(moelab.load_config(*sys.argv[1:]))
    print(*(f"step {step}: loss {loss:.4f}" for step, loss in enumerate(losses, 1)), sep="\n")
