"""What training on several ranks needs: batches that are shared out, FSDP as it has to be, weights made whole.

In: a sampler and the place of a rank; counts; the accelerator; a model that may be sharded. Out: the rank's part of
each batch, as indices; the counts of all ranks; one line that says what cannot be; whole weights, each once.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import BatchSampler, DataLoader, Sampler

from ...cache.errors import UserError


class ShareOfBatches(BatchSampler):
    """Batches of all ranks, of which it yields one rank's share: perhaps fewer items than another's, perhaps none.

    (accelerate's shares repeat items until all ranks have as many, and a pair that is trained on twice counts twice.)
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, drop_last: bool, rank: int, world_size: int) -> None:
        super().__init__(sampler, batch_size * world_size, drop_last)
        self._rank, self._world_size = rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            yield batch[self._rank :: self._world_size]


def share_of_batches(
    dataset: Any, collate: Callable[[Any], Any], sampler: Any, batch_size: int, args: Any, accelerator: Any
) -> Any:
    """The loader of a rank's share of the batches.

    Args:
        dataset: what is loaded.
        collate: makes a batch of items.
        sampler: the order of items, the same on every rank.
        batch_size: items of a batch and rank.
        args: the Trainer's settings.
        accelerator: the Trainer's.
    """
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=ShareOfBatches(
            sampler, batch_size, args.dataloader_drop_last, args.process_index, args.world_size
        ),
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",  # there is nothing to copy to
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    return prepare_data_loader(
        loader,
        args.device,
        num_processes=1,  # it is a share already
        put_on_device=True,
        use_seedable_sampler=accelerator.use_seedable_sampler,
        non_blocking=accelerator.non_blocking,
    )


def counts_of_ranks(counts: Sequence[int], group: Any) -> Tensor:
    """What every rank counted, int64 [ranks, counts], on the CPU: no rank waits for its GPU.

    Args:
        counts: of this rank, as many on each.
        group: a process group of CPUs; None where there is one rank alone.
    """
    mine = torch.tensor(counts)
    if group is None:
        return mine[None]
    gathered = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(gathered, mine, group=group)
    return torch.stack(gathered)


def check_fsdp(accelerator: Any) -> Any:
    """Accelerate's FSDP plugin, None where there is none.

    Raises:
        UserError: if accelerate would ignore it; if it is version 1; if the weights are to be loaded by one rank only,
            or saved in pieces.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise UserError("FSDP: expected GPUs, found none, where accelerate runs DDP instead; leave FSDP out")
        return None
    found = {
        "fsdp_version": (plugin.fsdp_version, 2),
        "fsdp_cpu_ram_efficient_loading": (bool(plugin.cpu_ram_efficient_loading), False),
        "fsdp_state_dict_type": (plugin.state_dict_type.name, "FULL_STATE_DICT"),
    }
    for name, (value, expected) in found.items():
        if value != expected:
            raise UserError(f"FSDP: expected {name}: {expected}, found {value}; set it in accelerate's configuration")
    return plugin


def gather_weights(model: nn.Module) -> dict[str, Any] | None:
    """A sharded model's weights, whole on the first rank, on the CPU; None where FSDP does not hold them."""
    if not isinstance(model, FSDPModule):
        return None
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    forget_ties(model, weights)
    return weights


def forget_ties(model: Any, weights: dict[str, Any]) -> None:
    """Takes out of a sharded model's gathered weights those that are another's under a second name."""
    for name in getattr(model, "all_tied_weights_keys", None) or ():
        weights.pop(name, None)
