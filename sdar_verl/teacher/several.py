"""Several teachers, each with a context of its own (``sdar.context.teachers``): made one, and looked at one by one."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sdar_verl.algorithm.mixture import mixture_log_probs
from sdar_verl.fields import TEACHER_LOG_PROBS, log_probs_of, teacher_pass
from sdar_verl.table import StepTable


def mix(table: StepTable, shares: Mapping[str, float]) -> None:
    """Put the mixture of a row's teachers in the place of the first one's log-probs, for the workers, too.

    Args:
        table: that has been read.
        shares: source -> weight of its teacher; those that a row does not have leave theirs to the others.
    """
    weights = _weights(table, shares)
    if len(weights) < 2:
        return
    table.columns[log_probs_of(teacher_pass(0))] = first = table.columns[TEACHER_LOG_PROBS]
    mixed = mixture_log_probs(_own(table, len(weights)), weights)
    several = ((weights > 0).sum(dim=0) > 1).unsqueeze(-1)
    table.write({TEACHER_LOG_PROBS: torch.where(several, mixed, first)})


def teacher_metrics(table: StepTable, gate: torch.Tensor, shares: Mapping[str, float]) -> dict[str, float]:
    """Gap, gate and share of each teacher, over the distilled tokens of a step; empty where all rows have one teacher.

    A token belongs to its teachers by their parts in its probability, r_k = w_k p_k / sum_j w_j p_j, and wholly to one
    that was chosen.

        gap    mean of log p_k(y_t) - log pi(y_t) over the tokens that the teacher judged, nats
        gate   mean of g_t, weighted with r_k
        share  mean of r_k over all distilled tokens

    Args:
        table: after :func:`mix`.
        gate: (rows, response_length), g_t.
        shares: as of :func:`mix`.
    """
    weights, mask = _weights(table, shares), table.mask
    if not len(weights) or not mask.any():
        return {}
    own, base = _own(table, len(weights)).double(), table.contrast
    gap = own - (table.columns["old_log_probs"] if base is None else base).double()
    scale = (weights / weights.sum(dim=0).clamp(min=torch.finfo(weights.dtype).tiny)).double().unsqueeze(-1)
    part = scale * (own - table.columns[TEACHER_LOG_PROBS].double()).exp()
    metrics = {}
    rows = [() if info is None else tuple(info.teachers) for info in table.infos]  # a list, where it came by the queue
    for name in dict.fromkeys(name for row in rows for name in row):
        places = [[row[number : number + 1] == (name,) for row in rows] for number in range(len(weights))]
        seen = torch.tensor(places).unsqueeze(-1) & mask
        if not seen.any():
            continue
        its, told = part[seen], f"sdar/teachers/{name}"
        metrics[f"{told}/gap"] = gap[seen].mean().item()
        if its.sum() > 0:
            metrics[f"{told}/gate"] = ((its * gate.double().expand_as(part)[seen]).sum() / its.sum()).item()
        metrics[f"{told}/share"] = its.sum().item() / int(mask.sum())
    return metrics


def _weights(table: StepTable, shares: Mapping[str, float]) -> torch.Tensor:
    """(teachers, rows): the weight of a row's first teacher, its second, ...; 0 where it has none."""
    rows = [() if info is None else info.teachers for info in table.infos]
    most = max(map(len, rows), default=0)
    found = [[shares.get(row[number], 1.0) if number < len(row) else 0.0 for row in rows] for number in range(most)]
    return torch.tensor(found)


def _own(table: StepTable, teachers: int) -> torch.Tensor:
    """(teachers, rows, response_length), nats: what each of them says, before it is mixed."""
    first = table.columns.get(log_probs_of(teacher_pass(0)), table.columns[TEACHER_LOG_PROBS])
    others = [table.columns[log_probs_of(teacher_pass(number))] for number in range(1, teachers)]
    return torch.stack([first, *others])
