"""Win rates from a judge's preferences (method.md section 6).

In: for each question how far a judge prefers one model's answer to another's, from 0 to 1, and the answers' lengths.
Out: the raw win rate, the length-controlled one of AlpacaEval 2 (Dubois et al. 2024), Bradley–Terry strengths of
Arena-Hard (Li et al. 2024), each with its error or interval.

Legend: Q questions, B battles, M models, R resamples.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_expit

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RESAMPLES = 1000
LEVEL = 0.95
NORMAL = 1.959964  # the standard normal distribution's quantile of (1 + LEVEL) / 2
# Coefficients end here where the likelihood has no maximum, as when one model always wins.
LARGEST = 30.0


@dataclass(frozen=True)
class Rate:
    """A mean over questions, such as a rate from 0 to 1.

    Attributes:
        mean: over questions.
        error: its standard error over questions; NaN for one question.
        low: lower end of the 95 % interval, by resampling questions.
        high: its upper end.
    """

    mean: float
    error: float
    low: float
    high: float


def mean_rate(preference_Q: Floats) -> Rate:
    """The mean over questions, such as AlpacaEval's `win_rate` of preferences."""
    size = preference_Q.size
    error = float(np.std(preference_Q, ddof=1) / np.sqrt(size)) if size > 1 else float("nan")
    return Rate(float(preference_Q.mean()), error, *resampled(lambda chosen: float(preference_Q[chosen].mean()), size))


def length_controlled(preference_Q: Floats, longer_Q: Floats, difficulty_Q: Floats | None = None) -> Rate:
    """The win rate that a logistic regression predicts for answers of equal length.

    P(win) = σ(θ + φ tanh(Δ / sd(Δ)) + ψ difficulty), read at Δ = 0. Without difficulties it is AlpacaEval's form
    `length_controlled_minimal`, without that one's penalty on the coefficients. The error is that of a normal
    distribution with the same interval: the whole regression is repeated for every resample.

    Args:
        preference_Q: how far the judge prefers our answer.
        longer_Q: by how many characters our answer is longer.
        difficulty_Q: of each instruction for the other model, as the benchmark publishes it.
    """

    def rate(chosen: Ints) -> float:
        longer, spread = longer_Q[chosen], longer_Q[chosen].std(ddof=1) if chosen.size > 1 else 0.0
        columns = [np.ones(chosen.size), np.tanh(longer / spread) if spread > 0 else np.zeros(chosen.size)]
        columns += [] if difficulty_Q is None else [difficulty_Q[chosen]]
        features = np.stack(columns, axis=1)
        weights = fit_logistic(features, preference_Q[chosen])
        features[:, 1] = 0
        return float(expit(features @ weights).mean())

    size = preference_Q.size
    low, high = resampled(rate, size)
    return Rate(rate(np.arange(size)), (high - low) / (2 * NORMAL) if size > 1 else float("nan"), low, high)


@dataclass(frozen=True, eq=False)
class Battles:
    """Verdicts between models, two answers to one question each.

    Attributes:
        first_B: int64, the model whose answer is the first.
        second_B: int64, the other.
        outcome_B: 1 if the first won, 0 if the second did, one half for a tie.
        weight_B: how often the battle counts; Arena-Hard counts a clear verdict three times.
        question_B: int64, from 0.
    """

    first_B: Ints
    second_B: Ints
    outcome_B: Floats
    weight_B: Floats
    question_B: Ints

    def of(self, questions: Ints) -> "Battles":
        """The battles of some questions, those of a question that comes twice twice."""
        times_Q = np.bincount(questions, minlength=int(self.question_B.max()) + 1)
        return replace(self, weight_B=self.weight_B * times_Q[self.question_B])


def strengths(battles: Battles, models: int) -> Floats:
    """Bradley–Terry: the log-odds of models by maximum likelihood, the first model's 0.

    Where a model always wins, the likelihood has no maximum; its strength is then `LARGEST`.
    """
    features = np.zeros((battles.first_B.size, models))
    rows = np.arange(battles.first_B.size)
    features[rows, battles.first_B] += 1
    features[rows, battles.second_B] -= 1
    return np.concatenate([[0.0], fit_logistic(features[:, 1:], battles.outcome_B, battles.weight_B)])


def arena_rates(battles: Battles, models: int) -> list[Rate]:
    """The win rate of each model against the first, as Arena-Hard's table; intervals by resampling questions."""

    def rates(chosen: Ints) -> Floats:
        return np.asarray(expit(strengths(battles.of(chosen), models)))

    questions = int(battles.question_B.max()) + 1
    rng = np.random.default_rng(0)
    found_RM = np.array([rates(rng.integers(0, questions, questions)) for _ in range(RESAMPLES)])
    low_M, high_M = np.quantile(found_RM, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return [
        Rate(float(mean), float(error), float(low), float(high))
        for mean, error, low, high in zip(
            rates(np.arange(questions)), found_RM.std(0, ddof=1), low_M, high_M, strict=True
        )
    ]


def fit_logistic(features: Floats, outcome: Floats, weight: Floats | None = None) -> Floats:
    """Coefficients of a logistic regression whose outcomes may lie between 0 and 1, by maximum likelihood.

    Args:
        features: [observations, coefficients].
        outcome: from 0 to 1, one an observation.
        weight: of each observation.
    """
    from scipy.optimize import minimize

    weight = np.ones(outcome.size) if weight is None else weight

    def loss(coefficients: Floats) -> tuple[float, Floats]:
        scores = features @ coefficients
        likelihood = outcome * log_expit(scores) + (1 - outcome) * log_expit(-scores)
        slope = features.T @ (weight * (expit(scores) - outcome))
        return -float(weight @ likelihood) / weight.sum(), slope / weight.sum()

    size = features.shape[1]
    options = {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 1000}
    bounds = [(-LARGEST, LARGEST)] * size
    found = minimize(loss, np.zeros(size), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return np.asarray(found.x)


def resampled(statistic: Callable[[Ints], float], questions: int, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a statistic of questions, by resampling them."""
    rng = np.random.default_rng(seed)
    found_R = [statistic(rng.integers(0, questions, questions)) for _ in range(RESAMPLES)]
    low, high = np.quantile(found_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
