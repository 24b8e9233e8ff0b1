"""What a step costs: memory of the device, disk and time, from the model's shape and the data's amount.

In: a `Task`. Out: bytes and seconds. Left out are loading, tokenising, saving, and the copy of a cache that training
decodes into the user's folder.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from ...stages.scoring import features, logprobs
from ...stages.scoring.attention import PACKED
from ...stages.scoring.flex import FLEX
from ..config import RunConfig
from .amounts import Data
from .rates import Rates
from .shapes import Shape

# A process without a model: imports, and on a GPU its context.
PROCESS_BYTES = 0.75e9

# Chunks of logits or of features (fp32) that exist at once: themselves, their softmax or mask, and gradients.
CHUNKS = 4

# A cache on disk, as measured: what is left of 4 bytes a token, and of 2 + 4 bytes a feature, when compressed.
TOKEN_SHARE, FEATURE_SHARE = 0.4, 0.8

# Share of an SAE's features that fire somewhere in a response, as measured; what `keep_features: all` keeps.
NONZERO_SHARE = 0.45

# Width of an SAE whose name does not say it.
ASSUMED_WIDTH = 16_384

# Bytes a generated token takes in `samples.jsonl`, and kept checkpoints of a run.
SAMPLE_BYTES, CHECKPOINTS = 6, 2


@dataclass(frozen=True)
class Cost:
    """What a step takes.

    Attributes:
        memory: peak of the device, bytes.
        disk: what it leaves, bytes.
        seconds: its time, alone on its share of the device.
    """

    memory: float = 0.0
    disk: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Task:
    """A step with what its costs follow from.

    Attributes:
        config: its configuration.
        shape: of the model.
        data: what it goes over once.
        widths: of its SAEs.
        rates: of the device.
    """

    config: RunConfig
    shape: Shape
    data: Data
    widths: tuple[int, ...]
    rates: Rates

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the compute recipe."""
        return 2 if self.config.dtype == "bf16" else 4

    @property
    def attention(self) -> str:
        """The implementation that `attentions_to_try` begins with."""
        if self.config.attention != "auto":
            return self.config.attention
        if self.rates.cuda and self.shape.flex:
            return FLEX
        return PACKED if self.shape.sdpa else "eager"

    @property
    def row(self) -> int:
        """Tokens of the longest row: the budget, or a pair or conversation of the greatest length."""
        longest = self.config.max_length
        if self.data.sides == 2:
            longest = round(2 * longest - min(self.data.prompt, self.config.max_prompt_length))
        return max(self.config.token_budget, longest)

    @property
    def weights(self) -> float:
        """Bytes of a model that computes: fp32 weights, and autocast's copies of them."""
        return self.shape.parameters * (4 + (2 if self.config.dtype == "bf16" else 0))

    @property
    def layer(self) -> float:
        """Bytes of one layer's activations for the longest row."""
        return self.shape.layer_bytes(self.row, self.itemsize, self.attention == "eager")

    @property
    def chunks(self) -> float:
        """Bytes of the chunks of logits or of features."""
        device = torch.device("cuda" if self.rates.cuda else "cpu")
        logits = logprobs.chunk_tokens(self.shape.vocabulary, device) * self.shape.vocabulary
        return CHUNKS * 4 * max(logits, features.CHUNK_ENTRIES)

    @property
    def saes(self) -> float:
        """Bytes of the SAEs, encoder and decoder in fp32."""
        return sum(4 * 2 * self.shape.hidden * width for width in self.widths)


@dataclass(frozen=True)
class Work:
    """What a device has to compute.

    Attributes:
        layers: FLOPs below the head.
        head: FLOPs of the head.
        saes: FLOPs of encoding, in fp32: 2 · hidden · width a response token and site.
        passes: how often a layer runs.
    """

    layers: float
    head: float
    saes: float
    passes: float

    def seconds(self, task: Task, utilisation: float) -> float:
        """Time at a share of the device's rate; below it lies the time to start a layer's kernels."""
        rates = task.rates
        computed = (self.layers + self.head) / rates.of(task.config.dtype) + self.saes / rates.fp32
        return computed / utilisation + self.passes * rates.layer_seconds


def forward(task: Task, data: Data) -> Work:
    """One forward pass over data, packed into rows.

    Flex attention computes what is attended to; the others compute a whole row for every token.
    """
    shape = task.shape
    together = max(1, int(task.config.token_budget // data.tokens))
    attended = data.attended if task.attention == FLEX else data.tokens**2 * together
    answered = data.count * data.answered
    return Work(
        layers=shape.layer_flops(data.count * data.tokens, data.count * attended),
        head=shape.head_flops(answered),
        saes=sum(2 * shape.hidden * width * answered for width in task.widths),
        passes=math.ceil(data.count / together) * shape.layers,
    )


def precompute_cost(task: Task) -> Cost:
    """Of stage one: a forward pass with every SAE."""
    config, data = task.config, task.data
    most = math.inf if config.keep_features == "all" else config.keep_features
    kept = sum(min(most, NONZERO_SHARE * width) for width in task.widths)
    a_pair = TOKEN_SHARE * 4 * data.tokens + FEATURE_SHARE * 6 * 2 * kept
    memory = PROCESS_BYTES + task.weights + task.saes + task.layer + task.chunks
    return Cost(memory, data.count * a_pair, forward(task, data).seconds(task, task.rates.inference))


def training_steps(config: RunConfig, count: float) -> int:
    """Optimiser steps of a training on so many pairs or conversations."""
    return config.max_steps or math.ceil(config.epochs * math.ceil(count / config.batch_size))


def training_cost(task: Task) -> Cost:
    """Of a training.

    Time: a forward and two backward passes (one, where only an adapter is trained), one forward more with activation
    checkpointing; the head's logits are computed again in backward; a live reference runs forward, its head twice.

    Memory: 4 bytes a weight and 2 of autocast's copy; 4 of gradient and 8 (Adam) or 4 (RMSprop) of optimiser a trained
    one; activations of the longest row, of all layers, or with checkpointing of one layer, of those that are not
    checkpointed and the inputs of those that are; the head's gradient as it is added up; the SAEs; 4 bytes a weight of
    a live reference.
    """
    config, shape, data = task.config, task.shape, task.data
    steps = training_steps(config, data.count)
    seen = config.max_steps * config.batch_size if config.max_steps else config.epochs * data.count
    once = forward(task, replace(data, count=seen))
    adapter = config.lora_r is not None
    again = 1 / config.checkpoint_every if config.activation_checkpointing else 0  # share of the layers
    live = int(config.reference is not None)
    times = (2 if adapter else 3) + again
    work = Work(
        layers=once.layers * (times + live),
        head=once.head * ((3 if adapter else 4) + 2 * live),
        saes=once.saes,
        passes=once.passes * (times + live),
    )
    trained = shape.linear_edges * config.lora_r if config.lora_r else shape.parameters
    optimiser = {"adam": 8, "rmsprop": 4}[config.optimizer]
    head = (0 if adapter else 8) * shape.head
    inputs = again * shape.layers * task.row * shape.hidden * 4
    whole = (1 - again) * shape.layers * task.layer
    kept = whole + inputs + max(task.layer, head) if again else whole + head
    memory = PROCESS_BYTES + task.weights + trained * (4 + optimiser) + 4 * shape.parameters * live
    memory += kept + task.saes + task.chunks
    saved = trained if adapter else shape.parameters
    result = shape.parameters if config.merge else saved
    checkpoints = min(CHECKPOINTS, math.ceil(steps / config.save_steps)) * (4 * saved + optimiser * trained)
    snapshots = (steps - 1) // config.snapshot_steps if config.snapshot_steps else 0
    return Cost(memory, 4 * (result + saved * snapshots) + checkpoints, work.seconds(task, task.rates.training))


def evaluation_cost(task: Task) -> Cost:
    """Of measuring a policy: pairs, beside a live reference; then answers, and scoring them.

    An answer is counted with its greatest length. A token of a batch costs its FLOPs, or the reading of all weights
    where that takes longer.
    """
    config, shape, rates = task.config, task.shape, task.rates
    own = forward(task, task.data)
    live = 0 if config.reference is None else 1
    pairs = Work(own.layers * (1 + live), own.head * (1 + live), own.saes, own.passes * (1 + live))
    seconds = pairs.seconds(task, rates.inference)
    other = 4 * shape.parameters if live and config.reference != config.model else 0
    memory = task.layer + task.chunks + other
    if not config.prompts:
        return Cost(PROCESS_BYTES + task.weights + task.saes + memory, 0.0, seconds)
    answers, batch = config.prompts * config.samples, config.generation_batch
    prompt, new = task.data.prompt, config.max_new_tokens
    scored = forward(task, Data(math.ceil(config.samples / 2) * config.prompts, prompt, new, 2, ""))
    asked = shape.layer_flops(answers * prompt, answers * prompt**2 / 2)
    seconds += Work(scored.layers + asked, scored.head, 0, scored.passes).seconds(task, rates.inference)
    context = shape.layer_flops(batch, batch * (prompt + new / 2)) + shape.head_flops(batch)
    a_token = max(
        context / rates.of(config.dtype) / rates.inference, task.itemsize * shape.parameters / rates.bandwidth
    )
    seconds += math.ceil(answers / batch) * new * (a_token + shape.layers * rates.layer_seconds)
    cached = shape.kv_bytes(batch * (config.max_prompt_length + new), task.itemsize)
    memory = max(memory, cached + CHUNKS * 4 * batch * shape.vocabulary)
    return Cost(PROCESS_BYTES + task.weights + task.saes + memory, SAMPLE_BYTES * answers * new, seconds)


def sae_training_cost(task: Task) -> Cost:
    """Of training an SAE: a forward pass below the head, and forward and backward through the SAE's two matrices."""
    config, shape = task.config, task.shape
    weights = 2 * shape.hidden * config.width
    read = shape.layer_flops(config.tokens, config.tokens * task.data.tokens / 2)
    passes = shape.layers * config.tokens / task.row
    seconds = Work(read, 0, 3 * 2 * weights * config.tokens, passes).seconds(task, task.rates.training)
    memory = PROCESS_BYTES + task.weights + task.layer + 16 * weights + task.chunks
    return Cost(memory, 4 * weights, seconds)


COSTS: Mapping[str, Callable[[Task], Cost]] = {
    "precompute": precompute_cost,
    "sft": training_cost,
    "align": training_cost,
    "evaluate": evaluation_cost,
    "train-sae": sae_training_cost,
}
