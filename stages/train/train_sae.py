"""Trains a JumpReLU SAE on a model's activations, for models that have no published one.

In: a causal LM, token ids of conversations, a site. Out: a folder that SAELens and `load_sae` read, and how well that
SAE does on conversations that it was not trained on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from ...cache.errors import UserError
from ..model.sae import Site, capture_sites, load_sae
from ..scoring.rotary import forget_lengths, frequencies_of
from ..scoring.sae_quality import FitSums, SAEFit
from .checkpoints import check_weights, saving

TokenIds = NDArray[np.int32]

# Activations of neighbouring tokens are alike: batches are drawn from this many, of which half are kept from one
# filling to the next.
_BUFFER_TOKENS = 16_384

# Tokens, padding included, that the model reads at a time.
_FORWARD_TOKENS = 2048


@dataclass(frozen=True)
class SAEQuality(SAEFit):
    """What an SAE does on held-out text.

    Attributes:
        passes: how often training went over its text.
    """

    passes: float


def train_sae(
    model: PreTrainedModel,
    sequences: Sequence[TokenIds],
    *,
    site: Site,
    width: int,
    tokens: int,
    out: Path,
    model_name: str,
    batch_tokens: int = 256,
    target_l0: float = 64.0,
    lr: float = 1e-3,
    seed: int = 0,
    heldout_fraction: float = 0.05,
) -> SAEQuality:
    """Trains an SAE, saves it in SAELens' format and measures what was saved.

    The first position of every sequence (BOS) is left out: its activation is hundreds of times larger than the others
    and carries nothing. The result depends on the arguments alone.

    Args:
        model: the model whose activations are read, in float32.
        sequences: token ids, `[length]` each; gone over again, in another order, when they are fewer than `tokens`.
        site: the activation to train on.
        width: the number of features.
        tokens: how many activations to train on.
        out: the folder to write.
        model_name: written into the metadata.
        batch_tokens: activations in an optimiser step.
        target_l0: how many features should fire per token; more than that and fewer are both penalised.
        lr: learning rate; it warms up over a tenth of the steps and decays to zero over the last third.
        seed: of weights, order and held-out sequences.
        heldout_fraction: the share of the text, at most of `tokens`, that is measured on and never trained on.

    Raises:
        UserError: there are fewer than two sequences with a token after the first, or nothing to train on;
            `out` already holds an SAE.
        FloatingPointError: an activation or, in the end, the SAE is not finite; nothing is written.
    """
    if (out / "cfg.json").exists():
        raise UserError(f"--out: expected a folder without an SAE, found one in {out}; give another")
    if tokens < batch_tokens:
        raise UserError(f"expected at least one batch of {batch_tokens} tokens to train on, got tokens={tokens}")
    train, heldout = _split(sequences, heldout_fraction, tokens, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sae = _new_sae(model, site, width, target_l0, model_name)
        _fit(sae, _batches(model, train, site, batch_tokens, seed), tokens, batch_tokens, lr)
        check_weights(sae.state_dict(), f"SAE after {tokens // batch_tokens} steps")
        sae.fold_W_dec_norm()  # a feature's value is then the length of what it adds to the activation
        with saving(out):
            sae.save_inference_model(out)
        passes = tokens / sum(len(ids) - 1 for ids in train)
        return _measure(load_sae(str(out), device=model.device).sae, model, heldout, site, passes)


def _split(
    sequences: Sequence[TokenIds], fraction: float, tokens: int, seed: int
) -> tuple[list[TokenIds], list[TokenIds]]:
    """Splits the usable sequences, in random order, into training and held-out ones; at least one of each."""
    usable = [ids for ids in sequences if len(ids) > 1]
    if len(usable) < 2:
        raise UserError(f"expected two or more sequences of two or more tokens, got {len(usable)} of {len(sequences)}")
    shuffled = [usable[i] for i in np.random.default_rng(seed).permutation(len(usable))]
    counts = np.cumsum([len(ids) - 1 for ids in shuffled])
    wanted = fraction * min(tokens, int(counts[-1]))
    number = min(int(np.searchsorted(counts, wanted)) + 1, len(shuffled) - 1)
    return shuffled[number:], shuffled[:number]


def _activations(model: PreTrainedModel, sequences: Sequence[TokenIds], site: Site) -> Iterator[Tensor]:
    """Yields `[tokens, d]` in float32: the activations at all positions but the first, some sequences at a time.

    Sequences are padded on the right, which a causal model does not see.
    """
    start = 0
    while start < len(sequences):
        longest, stop = len(sequences[start]), start + 1
        while stop < len(sequences):
            longest = max(longest, len(sequences[stop]))
            if longest * (stop + 1 - start) > _FORWARD_TOKENS:
                break
            if frequencies_of(model, len(sequences[stop])) != frequencies_of(model, len(sequences[start])):
                break  # a batch has the rotary frequencies of its longest sequence
            stop += 1
        group = sequences[start:stop]
        lengths = torch.tensor([len(ids) for ids in group])
        input_ids = torch.zeros(len(group), int(lengths.max()), dtype=torch.int64)
        for row, ids in zip(input_ids, group, strict=True):
            row[: len(ids)] = torch.from_numpy(ids.astype(np.int64))
        position = torch.arange(input_ids.shape[1])
        wanted = (position > 0) & (position < lengths[:, None])
        forget_lengths(model)
        with torch.no_grad(), capture_sites(model, [site]) as captured:
            model.get_decoder()(input_ids=input_ids.to(model.device), use_cache=False)
        acts_BLD = captured[site].float()
        bad = ~(acts_BLD.isfinite().all(-1) | ~wanted.to(model.device)).all(-1)
        if bad.any():
            first = group[int(bad.int().argmax())]
            raise FloatingPointError(
                f"activations at {site.name} are not finite in {int(bad.sum())} of {len(group)} conversations that are "
                f"read together; the first begins with the tokens {' '.join(map(str, first[:12]))}; check the model"
            )
        yield acts_BLD[wanted.to(model.device)]
        start = stop


def _batches(
    model: PreTrainedModel, sequences: list[TokenIds], site: Site, batch_tokens: int, seed: int
) -> Iterator[Tensor]:
    """Yields shuffled activations without end, `[batch_tokens, d]`."""
    from sae_lens.training.mixing_buffer import mixing_buffer

    def stream() -> Iterator[Tensor]:
        order = np.random.default_rng(seed)
        while True:
            yield from _activations(model, [sequences[i] for i in order.permutation(len(sequences))], site)

    available = sum(len(ids) - 1 for ids in sequences)
    yield from mixing_buffer(max(batch_tokens, min(_BUFFER_TOKENS, available)), batch_tokens, stream())


def _new_sae(model: PreTrainedModel, site: Site, width: int, target_l0: float, model_name: str) -> Any:
    from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    config = JumpReLUTrainingSAEConfig(
        d_in=model.config.get_text_config().hidden_size,
        d_sae=width,
        dtype="float32",
        device=str(model.device),
        apply_b_dec_to_input=True,
        normalize_activations="expected_average_only_in",
        jumprelu_sparsity_loss_mode="quadratic",
        target_l0=target_l0,
        jumprelu_bandwidth=0.3,
        decoder_init_norm=0.5,
        metadata=SAEMetadata(model_name=model_name, hook_name=site.name),
    )
    return JumpReLUTrainingSAE(config)


def _fit(sae: Any, batches: Iterator[Tensor], tokens: int, batch_tokens: int, lr: float) -> None:
    """Trains `sae` in place and folds the scale of the activations into its weights."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    steps = tokens // batch_tokens
    config = SAETrainerConfig(
        total_training_samples=steps * batch_tokens,
        train_batch_size_samples=batch_tokens,
        lr=lr,
        lr_end=lr,
        lr_warm_up_steps=steps // 10,
        lr_decay_steps=steps // 3,
        dead_feature_window=max(1, steps // 10),
        n_batches_for_norm_estimate=1,
        device=str(sae.device),
    )
    trainer = SAETrainer(config, sae, batches)
    trainer.activation_scaler.estimate_scaling_factor(sae.cfg.d_in, batches, config.n_batches_for_norm_estimate)
    _start(sae, trainer.activation_scaler(next(batches)))
    trainer.fit()


@torch.no_grad()
def _start(sae: Any, x: Tensor) -> None:
    """Sets the decoder's bias, the thresholds and the decoder's scale from a batch of (scaled) activations.

    SAELens starts with neither, and Adam moves a weight by at most `lr` in a step: in a few hundred steps it would not
    get to the activations' mean, nor from half of the features firing to the wanted few.
    """
    centred = x - x.mean(0)
    hidden = centred @ sae.W_enc
    firing = max(1, round(sae.cfg.target_l0 / sae.cfg.d_sae * len(x)))
    threshold = hidden.topk(firing, dim=0).values[-1].clamp(min=0)
    out = torch.where(hidden >= threshold, hidden, 0.0) @ sae.W_dec
    sae.b_dec.copy_(x.mean(0))
    sae.threshold.copy_(threshold)
    sae.W_dec.mul_((out * centred).sum() / out.square().sum())  # the least-squares scale


def _measure(sae: Any, model: PreTrainedModel, sequences: list[TokenIds], site: Site, passes: float) -> SAEQuality:
    sums = FitSums(sae)
    for x in _activations(model, sequences, site):
        sums.add(x)
    return SAEQuality(**asdict(sums.fit()), passes=passes)
