"""Running a model over judgements, and what each kind of judgement is measured by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vision_rewards.training import metrics
from vision_rewards.training.features import FeatureSource
from vision_rewards.training.heads import Prediction
from vision_rewards.training.objective import LOGISTIC, Objective, preference
from vision_rewards.training.table import Batch, chunks


@dataclass(frozen=True)
class Model:
    """Head, loss and features of one training."""

    head: nn.Module
    objective: Objective
    source: FeatureSource

    def predict(self, batch: Batch) -> Prediction:
        """Scores ``(B * K,)`` of the cells of a batch, by the annotator of each sample."""
        width = batch.cells.shape[1]
        user = batch.user.repeat_interleave(width)
        return self.head(self.source(batch.cells.flatten()), user)  # type: ignore[no-any-return]

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch, a scalar."""
        return self.objective(self.predict(batch), batch)  # type: ignore[no-any-return]


@torch.no_grad()
def predict_all(model: Model, data: Batch, batch_size: int) -> tuple[Prediction, float]:
    """Predictions for all cells of all samples, and the mean loss.

    The loss of cross-prompt pairs is over the pairs within each chunk.
    """
    model.head.eval()
    values, stds, total = [], [], 0.0
    for batch in chunks(data, batch_size):
        prediction = model.predict(batch)
        total += float(model.objective(prediction, batch)) * len(batch)
        values.append(prediction.value)
        stds += [] if prediction.std is None else [prediction.std]
    std = torch.cat(stds) if stds else None
    return Prediction(torch.cat(values), std), total / max(len(data), 1)


def evaluate(
    model: Model, data: Batch, kind: str, groups: metrics.Groups, batch_size: int
) -> dict[str, Any]:
    """Measures of a data set, as plain data.

    Args:
        groups: of the samples, for intervals; ``None`` where only the values are wanted.

    Returns:
        ``loss``, ``samples``, ``main`` (the name of the measure to look at first) and by kind:
        pairs and rankings: ``accuracy``; labels: ``auroc``, ``accuracy``; ratings: ``spearman``,
        ``pearson``, ``rmse``. ``calibration`` where the loss makes probabilities.
    """
    if not len(data):
        return {"samples": 0}
    prediction, loss = predict_all(model, data, batch_size)
    value = prediction.value.view(data.cells.shape)
    measure = {"pairs": _pairs, "rankings": _rankings, "labels": _labels, "ratings": _ratings}
    found = measure[kind](model.objective, value, prediction.std, data, groups)
    return {"samples": len(data), "loss": loss, **found}


def _chosen(groups: metrics.Groups, rows: metrics.Array) -> metrics.Groups:
    return None if groups is None else [groups[i] for i in rows.tolist()]


def _array(tensor: Tensor) -> metrics.Array:
    array: metrics.Array = tensor.detach().double().cpu().numpy()
    return array


def _pairs(
    objective: Objective, value: Tensor, std: Tensor | None, data: Batch, groups: metrics.Groups
) -> dict[str, Any]:
    d = _array(objective.logit(value, std))
    lead = _array(2 * preference(data.target) - 1)
    told = np.flatnonzero(lead)
    correct = metrics.pair_correct(d[told], lead[told])
    found: dict[str, Any] = {
        "main": "accuracy",
        "accuracy": metrics.proportion(correct, _chosen(groups, told)),
        "ties": int(len(d) - len(told)),
    }
    outcomes = objective.outcomes(value, std)
    if objective.name in ("davidson", "rao_kupper"):
        right = _array((outcomes.argmax(-1) == data.target.argmax(-1)).float())
        found["accuracy_with_ties"] = metrics.proportion(right, groups)
    if objective.name in LOGISTIC:
        # Among pairs that were decided: the chance that the predicted winner wins.
        win = _array(outcomes[:, 0] / (outcomes[:, 0] + outcomes[:, 2]))[told]
        q = _array(preference(data.target))[told]
        agrees = np.where(win >= 0.5, q, 1 - q)
        found["calibration"] = metrics.reliability(np.maximum(win, 1 - win), agrees, low=0.5)
    return found


def _rankings(
    objective: Objective, value: Tensor, std: Tensor | None, data: Batch, groups: metrics.Groups
) -> dict[str, Any]:
    scores, ranks = _array(value), _array(data.target)
    first, second = np.triu_indices(scores.shape[1], 1)
    lead = ranks[:, second] - ranks[:, first]
    told = ~np.isnan(lead) & (lead != 0)
    row = np.nonzero(told)[0]
    d = (scores[:, first] - scores[:, second])[told]
    correct = metrics.pair_correct(d, lead[told])
    share = metrics.proportion(correct, _chosen(groups, row))
    return {"main": "accuracy", "accuracy": share}


def _labels(
    objective: Objective, value: Tensor, std: Tensor | None, data: Batch, groups: metrics.Groups
) -> dict[str, Any]:
    score, y = _array(value[:, 0]), _array(data.target[:, 0])
    positive = y > 0.5
    low, high = metrics.cluster_bootstrap(
        lambda rows: metrics.auroc(score[rows], positive[rows]), groups
    )
    area = {"value": metrics.auroc(score, positive), "n": len(y), "bootstrap": [low, high]}
    found: dict[str, Any] = {"main": "auroc", "auroc": area}
    if objective.name in LOGISTIC:
        correct = ((score > 0) == positive).astype(float)
        found["accuracy"] = metrics.proportion(correct, groups)
        found["calibration"] = metrics.reliability(_array(value[:, 0].sigmoid()), y)
    return found


def _ratings(
    objective: Objective, value: Tensor, std: Tensor | None, data: Batch, groups: metrics.Groups
) -> dict[str, Any]:
    score, rating = _array(value[:, 0]), _array(data.target[:, 0])
    rank, low, high = metrics.spearman(score, rating)
    spread = np.ptp(score) > 0 and np.ptp(rating) > 0
    return {
        "main": "spearman",
        "spearman": {"value": rank, "n": len(score), "interval": [low, high]},
        "pearson": float(np.corrcoef(score, rating)[0, 1]) if spread else float("nan"),
        "rmse": float(np.sqrt(((score - rating) ** 2).mean())),
    }
