"""Supervised fine-tuning: the model that both stages start from.

In: conversations whose assistant turns are to be learnt, and a causal LM. Out: a `transformers.Trainer` that minimises
the mean negative log-likelihood of the learnt tokens, over packed rows and without the logits ever being whole.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from ..data.conversations import Conversations
from ..data.tokenize import Conversation
from ..model.anatomy import causal_lm
from ..model.tokenizer import check_tokens
from ..scoring.batches import ConversationCollator
from ..scoring.forward import RowScores, row_layout
from ..scoring.packing import PackedRow
from .config import RowConfig
from .trainer import RowTrainer


class SFTTrainer(RowTrainer):
    """Fine-tunes a model on conversations; the loss is a mean over the learnt tokens of a step, nats.

    Args:
        model: a causal LM, weights in fp32.
        args: the settings; `per_device_train_batch_size` counts conversations.
        conversations: what to learn.
        processing_class: the tokenizer that is saved beside the weights.
        callbacks: as the Trainer's.

    Raises:
        UserError: as `RowTrainer`.
    """

    noun = "conversation"

    def __init__(
        self,
        model: nn.Module,
        args: RowConfig,
        conversations: Conversations | Sequence[Conversation],
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if isinstance(conversations, Conversations):
            name, token = conversations.largest_token()
            check_tokens(causal_lm(model), [(name, [token])], processing_class)
        else:
            check_tokens(
                causal_lm(model),
                ((f"conversation {number}", one.ids) for number, one in enumerate(conversations)),
                processing_class,
            )
        super().__init__(
            model,
            args,
            data_collator=ConversationCollator(args.token_budget, row_layout(model)),
            train_dataset=conversations,
            processing_class=processing_class,
            callbacks=callbacks,
        )

    def facts(self) -> dict[str, str]:
        """The conversations."""
        found = {"method": "sft", "data": f"{len(self.train_dataset)} conversations"}  # type: ignore[arg-type]
        if isinstance(self.train_dataset, Conversations):
            found["data"] += f", SHA-256 {self.train_dataset.sha256[:12]}"
        return found

    def score(self, model: nn.Module, row: PackedRow) -> RowScores:
        """Scores one row, inside the forward of what wraps the model."""
        return model(packed=row, saes=(), recipe=self.args.recipe)  # type: ignore[no-any-return]

    def row_loss(self, model: nn.Module, row: PackedRow) -> Tensor:
        """Negative log-likelihood of a row's learnt tokens, summed."""
        return -self.score(model, row).logps_R.sum()

    def row_items(self, row: PackedRow) -> int:
        """Learnt tokens."""
        return row.targets_T.numel()
