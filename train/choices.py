"""The values that settings of training can take, each defined once. Imports nothing, so that every module may use it.

Choices that capturing shares are in common: `AspectRatio` in `common.data.images`, `ScoredTokens` in
`common.data.chat_encoding`.
"""

from typing import Literal, get_args

Stage = Literal["init", "dense-to-dense", "dense-to-sparse", "preference", "sft"]

# Parts of a student that are trained or frozen together; see train.model.student.
ParameterGroup = Literal["vision_tower", "adapter", "language_model", "experts", "router"]
PARAMETER_GROUPS: frozenset[ParameterGroup] = frozenset(get_args(ParameterGroup))

# Adapters between the vision tower and the language model of a composed student; see train.model.adapter.
AdapterType = Literal["mlp", "linear", "attention"]

# Layers of a dense student that become sparse.
SparsePattern = Literal["every-second", "sparse", "first-half", "second-half", "all"]

# The distillation loss: how two distributions are compared, and what becomes of the teacher's mass outside its kept
# entries.
Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon", "total_variation"]
Tail = Literal["bucket", "renormalise", "ignore"]

PreferenceLossType = Literal["sigmoid", "ipo", "hinge", "kto_pair"]

Precision = Literal["bf16", "fp32"]

# Stages of ZeRO: DeepSpeed divides optimiser state (1), gradients too (2), weights too (3) among ranks.
ZeroStage = Literal[0, 1, 2, 3]
