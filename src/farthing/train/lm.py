"""Next-token prediction, shared by pretraining and fine-tuning.

A step takes one packed batch through the network in as many passes as memory requires, each weighted by its tokens,
so the cut changes only rounding. It includes the losses of DeepSeek-V3 (arXiv:2412.19437): multi-token prediction
(section 2.2), the sequence-wise balance loss and the routing biases (section 2.1.2).

Shapes: N tokens of a pass, M of them with a target, C model width, V vocabulary, E experts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farthing.base.device import Ranks
from farthing.cost.flops import forward_flops, mtp_flops
from farthing.cost.memory import code_of, precision_of, tokens_per_pass
from farthing.cost.meter import Meter
from farthing.data.corpus import Corpus
from farthing.data.packing import NO_LOSS, PackedBatch, validation_batches
from farthing.model import Decoder, Segments
from farthing.model.moe import Routing, routers, update_biases
from farthing.recipe import Pretrain, Sft
from farthing.train.loop import Progress, check_norm, train
from farthing.train.losses import next_token_losses
from farthing.train.optim import MasterWeights, learning_rate


@dataclass
class Step:
    """Sums over the passes of one step; losses are means over the tokens that have a target, in nats."""

    loss: float = 0.0
    targets: int = 0
    mtp_losses: list[float] = field(default_factory=list)  # by module
    loads: dict[int, Tensor] = field(default_factory=dict)  # tokens of each expert, [E], by layer
    flops: int = 0

    def add_loads(self, routing: Routing) -> None:
        """Add the experts' tokens of a pass."""
        for layer, load in routing.loads.items():
            self.loads[layer] = self.loads[layer] + load if layer in self.loads else load

    def imbalance(self) -> dict[str, float]:
        """Load of a layer's busiest expert over the mean load: of the worst layer, and on average."""
        ratios = [float(load.max() / load.float().mean()) for load in self.loads.values()]
        return {"load_worst": max(ratios), "load_mean": sum(ratios) / len(ratios)} if ratios else {}


def lm_step(
    decoder: Decoder,
    batch: PackedBatch,
    hf_config: dict[str, Any],
    tokens_at_once: int,
    *,
    mtp_weight: float = 0.0,
    balance: float = 0.0,
    ranks: Ranks,
) -> Step:
    """Forward and backward over this rank's rows of a batch; gradients are left where backward puts them.

    Each rank's losses are its part of the means over the whole batch: their sum over the ranks, like that of the
    gradients, is the batch's.

    Args:
        tokens_at_once: most tokens in a pass, which holds at least one row.
        mtp_weight: of the mean over the modules of their losses (lambda, arXiv:2412.19437 eq. 25).
        balance: of the sequence-wise balance loss (alpha, eq. 17).
    """
    out = Step(
        targets=ranks.total(batch.loss_tokens), mtp_losses=[0.0] * len(decoder.mtp) if mtp_weight else []
    )
    ahead = [ranks.total(int((further(batch, k)[1] != NO_LOSS).sum())) for k in range(len(out.mtp_losses))]
    rows = ranks.total(batch.rows)
    for part in passes(batch, tokens_at_once):
        routing = Routing(lengths=part.row_lengths, balance=balance)
        hidden, losses, segments = _forward(decoder, part, routing)
        total = losses.sum() / max(1, out.targets)
        out.loss += float(total.detach())
        tokens, pairs = len(part.ids_N), segments.pairs(decoder.config.windows)
        work = forward_flops(hf_config, tokens, pairs, len(losses))
        for k in range(len(out.mtp_losses)):
            hidden, losses = _look_further(decoder, part, k, hidden, segments, routing)
            loss = losses.sum() / max(1, ahead[k])
            out.mtp_losses[k] += float(loss.detach())
            total = total + loss * (mtp_weight / len(out.mtp_losses))
        if out.mtp_losses:
            work += mtp_flops(hf_config, tokens, pairs, len(losses))
        if routing.loss is not None:  # a mean over its rows
            total = total + routing.loss * (part.rows / rows)
        total.backward()
        out.add_loads(routing)
        out.flops += 3 * work
    out.loads = {layer: ranks.total(load) for layer, load in out.loads.items()}
    return out


def passes(batch: PackedBatch, tokens_at_once: int) -> Iterator[PackedBatch]:
    """The batch's rows in passes of at most `tokens_at_once` tokens, or one row."""
    start, held = 0, 0
    for row, length in enumerate(batch.row_lengths):
        if held and held + length > tokens_at_once:
            yield batch.slice_rows(start, row)
            start, held = row, 0
        held += length
    yield batch.slice_rows(start, batch.rows)


def further(batch: PackedBatch, module: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of module `module` (from 0): for each token the id module + 1 after it, and the
    target of that place, [N] both. Where the document ends before, the id is 0 and there is no target."""
    shift = module + 1
    ids, targets = batch.ids_N.roll(-shift), batch.targets_N.roll(-shift)
    same = batch.documents_N.roll(-shift) == batch.documents_N
    same[-shift:] = False
    return ids.masked_fill(~same, 0), targets.masked_fill(~same, NO_LOSS)


def _forward(
    decoder: Decoder, batch: PackedBatch, routing: Routing | None
) -> tuple[Tensor, Tensor, Segments]:
    """Hidden states [N, C], the loss of each token with a target [M], and who attended to whom."""
    device = decoder.embed.weight.device
    segments = Segments([(length, ()) for length in batch.segments])
    hidden = decoder.hidden(batch.ids_N.to(device), segments.positions().to(device), segments, routing)
    return hidden, _losses(decoder, hidden, batch.targets_N.to(device)), segments


def _look_further(
    decoder: Decoder, batch: PackedBatch, module: int, hidden: Tensor, segments: Segments, routing: Routing
) -> tuple[Tensor, Tensor]:
    device = hidden.device
    ids, targets = (tensor.to(device) for tensor in further(batch, module))
    positions = segments.positions().to(device)
    hidden = decoder.mtp_hidden(module, ids, hidden, positions, segments, routing)
    return hidden, _losses(decoder, hidden, targets)


def _losses(decoder: Decoder, hidden_NC: Tensor, targets_N: Tensor) -> Tensor:
    at = (targets_N != NO_LOSS).nonzero()[:, 0]
    rows, softcap = hidden_NC.index_select(0, at), decoder.config.logit_softcap
    return next_token_losses(rows, decoder.head.weight, targets_N[at], softcap)


@torch.no_grad()
def bits_per_byte(
    decoder: Decoder,
    corpus: Corpus,
    length: int,
    tokens_at_once: int,
    hf_config: dict[str, Any],
    ranks: Ranks,
) -> tuple[float, int, int]:
    """Bits per byte of UTF-8 in predicting a corpus, comparable across tokenizers.

    Returns:
        bits per byte; the tokens it took; their FLOPs.
    """
    batches = validation_batches(corpus, length, tokens_at_once)
    nats, _, tokens, flops = _nats(decoder, batches, hf_config, ranks)
    return nats / (math.log(2) * corpus.bytes), tokens, flops


@torch.no_grad()
def mean_loss(
    decoder: Decoder, batch: PackedBatch, tokens_at_once: int, hf_config: dict[str, Any], ranks: Ranks
) -> tuple[float, int, int]:
    """The mean loss of the tokens that have a target, in nats; the tokens it took; their FLOPs."""
    nats, targets, tokens, flops = _nats(decoder, passes(batch, tokens_at_once), hf_config, ranks)
    return nats / targets, tokens, flops


def _nats(
    decoder: Decoder, batches: Iterable[PackedBatch], hf_config: dict[str, Any], ranks: Ranks
) -> tuple[float, int, int, int]:
    """Nats of all targets, the targets, the tokens, and their FLOPs."""
    nats, targets, tokens, flops = 0.0, 0, 0, 0
    for batch in batches:
        own = ranks.share(batch.rows)
        if own.start == own.stop:
            continue
        part = batch.slice_rows(own.start, own.stop)
        _, losses, segments = _forward(decoder, part, None)
        nats += float(losses.double().sum())
        targets += len(losses)
        tokens += len(part.ids_N)
        pairs = segments.pairs(decoder.config.windows)
        flops += forward_flops(hf_config, len(part.ids_N), pairs, len(losses))
    return ranks.total(nats), ranks.total(targets), ranks.total(tokens), ranks.total(flops)


def train_lm(
    stage: Pretrain | Sft,
    decoder: Decoder,
    hf_config: dict[str, Any],
    folder: Path,
    *,
    steps: int,
    lr: float,
    warmup: int,
    mtp_weight: Callable[[int], float],
    next_batch: Callable[[int], tuple[PackedBatch, int]],
    validation: Corpus | PackedBatch | None,
    validate_every: int,
    meter: Meter,
    ranks: Ranks,
    progress: Progress,
) -> None:
    """Train the network in place; metrics and checkpoints go to `folder`. A killed run continues from its
    checkpoint and ends with the same weights.

    Args:
        mtp_weight: by step.
        next_batch: the batch at a cursor, and the cursor after it.
        validation: text, measured in bits per byte, or rows of conversations, in nats a token that is learnt.

    Raises:
        Diverged: when the gradient says that training is broken.
    """
    weights = MasterWeights(decoder, stage.optimizer, lr, stage.betas, stage.weight_decay)
    weight = decoder.embed.weight
    at_once = tokens_per_pass(
        hf_config,
        stage.memory_gb,
        length=stage.length,
        precision=precision_of(weight.dtype),
        code=code_of(weight.device.type),
        lora=stage.lora_rank,
    )
    state = {"cursor": 0, "tokens": 0}
    biases = {f"bias.{r.layer}": r.bias for r in routers(decoder) if r.bias is not None}

    def one_step(step: int) -> dict[str, Any]:
        started, before, cpu = time.monotonic(), dict(meter.totals().seconds), time.process_time()
        rate = learning_rate(step, steps, lr, warmup, stage.schedule)
        with meter.span("train", step=step) as span:
            batch, state["cursor"] = next_batch(state["cursor"])
            own = ranks.share(batch.rows)
            done = lm_step(
                decoder,
                batch.slice_rows(own.start, own.stop),
                hf_config,
                at_once,
                mtp_weight=mtp_weight(step),
                balance=stage.balance,
                ranks=ranks,
            )
            weights.sum_gradients(ranks)
            norm = weights.clip(stage.grad_clip)
            check_norm(norm, stage.max_grad_norm)
            weights.step(rate)
            update_biases(decoder, done.loads, stage.bias_rate)
            flops = ranks.total(done.flops)
            span.flops += flops
            span.tokens_in += len(batch.ids_N)
        seconds = time.monotonic() - started
        cpu = time.process_time() - cpu
        state["tokens"] += len(batch.ids_N)
        line = {
            "step": step + 1,
            "loss": ranks.total(done.loss),
            "tokens": state["tokens"],
            "lr": rate,
            "grad_norm": norm,
            **(
                {"mtp_loss": ranks.total(sum(done.mtp_losses)) / len(done.mtp_losses)}
                if done.mtp_losses
                else {}
            ),
            **done.imbalance(),
            "tokens_per_second": len(batch.ids_N) / seconds,
            "flops": flops,
            "cores_had": cpu / seconds,
        }
        if validation is not None and ((step + 1) % validate_every == 0 or step + 1 == steps):
            with meter.span("evaluate", step=step) as span:
                if isinstance(validation, Corpus):
                    line["val_bits_per_byte"], span.tokens_in, span.flops = bits_per_byte(
                        decoder, validation, stage.length, at_once, hf_config, ranks
                    )
                else:
                    line["val_loss"], span.tokens_in, span.flops = mean_loss(
                        decoder, validation, at_once, hf_config, ranks
                    )
        totals = meter.totals()
        spent = {name: value - before.get(name, 0.0) for name, value in totals.seconds.items()}
        return line | {
            "seconds": time.monotonic() - started,
            "seconds_by_activity": {name: value for name, value in spent.items() if value > 0},
            "usd_so_far": totals.usd,
            "cursor": state["cursor"],
        }

    train(
        folder,
        steps,
        weights,
        state,
        one_step,
        meter=meter,
        checkpoint_every=stage.checkpoint_every,
        progress=progress,
        buffers=biases,
    )
