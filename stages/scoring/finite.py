"""Errors for numbers that are not finite.

In: names of pairs with what is not finite of each, or weights. Out: nothing, or a `FloatingPointError` of one line.

In a packed row attention multiplies what is masked by 0, and 0 · NaN is NaN: one pair's NaN can make every pair of its
row NaN, so that an error names pairs of the row, of which one may be the cause.
"""

from collections.abc import Mapping

from torch import Tensor

# How many pairs a message names; it counts the others.
NAMED = 3


def not_finite(faults: Mapping[str, str], noun: str = "pair") -> FloatingPointError:
    """The error that says what is wrong with the first of `faults`, names a few others and counts the rest.

    Args:
        faults: what is not finite, by the name of the pair (or conversation); at least one.
        noun: what the names are names of.
    """
    first, *others = faults
    also = ""
    if others:
        more = len(others) - (NAMED - 1)
        also = f"; also {noun}s {', '.join(others[: NAMED - 1])}{f' and {more} more' if more > 0 else ''}"
    return FloatingPointError(f"{noun} {first}: {faults[first]}{also}")


def check_weights(weights: Mapping[str, Tensor], when: str) -> None:
    """Checks weights that are about to be saved.

    Args:
        weights: by name.
        when: the step, for the message.

    Raises:
        FloatingPointError: one is not finite.
    """
    bad = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if bad:
        raise FloatingPointError(
            f"{when}: {bad[0]} and {len(bad) - 1} more of {len(weights)} weights are not finite and are not saved; "
            "lower --lr, or raise --warmup-steps, and start again"
        )
