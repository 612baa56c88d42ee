"""A joint model for torch.export and AOTInductor: tensors in, a plain tuple of tensors out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from elang.dispatch import capacity
from elang.joint import JointClassifier


class Exportable(nn.Module):
    """`joint` as one graph: `capacity` dispatch, no output class, no attributes, nothing counted.

    What is exported runs where there are torch and the library of the ops, `elang.backend.LIBRARY`, and neither elang
    nor transformers: `torch.ops.load_library(path)`, then load the package. The threshold is a buffer of the program.

    Returns of a call with the models' keyword inputs: (logits [N, C], score [N] float32, order [N] int64,
    n_routed [1] int32, overflow [1] int32), as in `elang.dispatch.Routing`.

    Raises:
        RuntimeError: Swift or Super is in training mode.
        ValueError: the joint model has no `capacity`, or catches errors of Super, which a graph cannot.
    """

    def __init__(self, joint: JointClassifier) -> None:
        super().__init__()
        joint.check_eval()
        if joint.plan.capacity is None:
            raise ValueError("joint: got no capacity, wanted one, with dispatch='capacity' or 'auto'")
        if joint.plan.super_.guarded:
            raise ValueError("joint: got on_super_error='swift' or a super_timeout: a graph cannot catch")
        self.joint = joint
        self.plan = replace(joint.plan, counts=None)

    def forward(
        self,
        input_ids: Tensor | None = None,  # [N, M]
        attention_mask: Tensor | None = None,  # [N, M]
        token_type_ids: Tensor | None = None,  # [N, M]
        position_ids: Tensor | None = None,  # [N, M] or [1, M]
        inputs_embeds: Tensor | None = None,  # [N, M, H]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        inputs: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
        with torch.no_grad():
            route = self.joint.decide(inputs)
            answer = capacity(route, inputs, self.plan)
        assert answer.overflow is not None
        return answer.logits.to(self.joint.dtype), route.score, route.order, route.n_routed, answer.overflow
