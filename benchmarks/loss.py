"""Time and memory of the distillation loss with its output layer, forward and backward: fused, dense and gathered.

    python -m benchmarks.loss

1,024 tokens x hidden size 1,024 x vocabulary 151,936 in bfloat16, k = 64. `dense` is LLaVA-MoD's formula: softmax of
the teacher's whole logits, log-softmax of the student's, -(p_T * log p_S).sum over the vocabulary. `gather` is the
log-softmax of the student's whole logits at the kept ids. Each way has its own process, and the processes measure in
turn; seconds are medians over the turns. Peak memory is the highest resident set (VmHWM, reset before) of the first
turn, less what was resident before it (weights and inputs) and less the weight's gradient. `grad_error_vs_twin` is the
distance of the fused gradients from float64's, divided by the distance of autograd's gradients on whole bfloat16
logits, for the same loss on 128 tokens: the larger of the ratios for hidden states and for the weight.
"""

import ctypes
import json
import os
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor

from benchmarks.memory import reset_peak, status_mib
from tests.support import reference_unfused as unfused
from train.loss.functional import RowLogits, distillation_loss
from train.loss.fused_output import gather_logits, to_row_logits

NUM_TOKENS, HIDDEN, VOCAB_SIZE, TOP_K = 1024, 1024, 151_936, 64
WAYS = ("fused", "dense", "gather")
NUM_TURNS = 3
NUM_COMPARED_TOKENS = 128


def main() -> None:
    """Prints one JSON line."""
    command = [sys.executable, "-m", "benchmarks.loss"]
    error = float(subprocess.run([*command, "error"], check=True, capture_output=True, text=True).stdout)
    children = {
        way: subprocess.Popen([*command, way], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for way in WAYS
    }
    readings: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(NUM_TURNS):
        for way, child in children.items():
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write("\n")
            child.stdin.flush()
            seconds, mib = child.stdout.readline().split()
            readings[way].append((float(seconds), float(mib)))
    for child in children.values():
        child.communicate()
    median_seconds = {way: statistics.median(seconds for seconds, _ in turns) for way, turns in readings.items()}
    peak = {way: turns[0][1] for way, turns in readings.items()}
    result = {
        "speedup_vs_dense": round(median_seconds["dense"] / median_seconds["fused"], 2),
        "speedup_vs_gather": round(median_seconds["gather"] / median_seconds["fused"], 2),
        "peak_vs_dense": round(peak["fused"] / peak["dense"], 4),
        "grad_error_vs_twin": round(error, 3),
        "seconds": {way: round(value, 2) for way, value in median_seconds.items()},
        "peak_mib": {way: round(value, 1) for way, value in peak.items()},
        "threads": len(os.sched_getaffinity(0)),
    }
    print(json.dumps(result))


def _measure_on_request(way: str) -> None:
    """Measures once for each line on stdin, and prints seconds and MiB."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    # Libraries allocate memory at their first call, which is not to count as the loss's.
    small = LossProblem(8, 32, 512)
    small.loss(way).backward()
    problem = LossProblem(NUM_TOKENS, HIDDEN, VOCAB_SIZE)
    for _ in sys.stdin:
        problem.hidden_RH.grad = problem.weight_VH.grad = None
        # Memory that the allocator keeps from earlier work would hide what the loss allocates.
        ctypes.CDLL(None).malloc_trim(0)
        resting_mib = reset_peak()
        started = time.perf_counter()
        problem.loss(way).backward()
        seconds = time.perf_counter() - started
        peak_mib = status_mib("VmHWM") - resting_mib - problem.weight_VH.nbytes / 2**20
        print(seconds, peak_mib, flush=True)


class LossProblem:
    """Random operands of the output layer; the kept entries are the best of the teacher's whole logits.

    R tokens, V vocabulary, H hidden size, K kept entries; hidden states, weight and teacher's logits are bfloat16.
    """

    def __init__(self, num_tokens: int, hidden: int, vocab_size: int, device: str = "cpu") -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        self.hidden_RH = normal(num_tokens, hidden).bfloat16().requires_grad_()
        self.weight_VH = normal(vocab_size, hidden).mul_(2 / hidden**0.5).bfloat16().requires_grad_()
        self.teacher_RV = normal(num_tokens, vocab_size).mul_(3).bfloat16()
        best = [row.float().log_softmax(0).topk(min(TOP_K, vocab_size)) for row in self.teacher_RV]
        self.topk_logprobs_RK = torch.stack([row.values for row in best])
        self.ids_RK = torch.stack([row.indices for row in best])
        self.rest_R = 1 - self.topk_logprobs_RK.exp().sum(1)
        self.vocab_size = vocab_size

    @property
    def operands(self) -> tuple[Tensor, Tensor]:
        """Returns hidden states [R, H] and weight [V, H], which take gradients."""
        return self.hidden_RH, self.weight_VH

    @property
    def kept(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the teacher's kept ids [R, K], their log-probs [R, K] and the rest mass [R]."""
        return self.ids_RK, self.topk_logprobs_RK, self.rest_R

    def loss(self, way: str) -> Tensor:
        """Returns the mean loss over the tokens."""
        if way == "fused":
            return self.fused().mean()
        logits_RV = self.hidden_RH @ self.weight_VH.T
        logprobs_RV = logits_RV.log_softmax(-1, dtype=torch.float32)
        if way == "gather":
            return -(self.topk_logprobs_RK.exp() * logprobs_RV.gather(1, self.ids_RK)).sum(-1).mean()
        assert way == "dense"
        teacher_RV = self.teacher_RV.softmax(-1, dtype=torch.float32)
        return -(teacher_RV * logprobs_RV).sum(-1).mean()

    def fused(self, chunk_ids: int | None = None) -> Tensor:
        """Returns the loss [R] of the stages of distillation."""
        rows = self.fused_rows(chunk_ids)
        return distillation_loss(rows, self.topk_logprobs_RK, self.rest_R, vocab_size=self.vocab_size)

    def fused_rows(self, chunk_ids: int | None = None) -> RowLogits:
        """Returns what the losses need of the logits: the kept ids, and the best id as the scored token."""
        own_R1 = self.ids_RK[:, :1]
        ids_RJ = torch.cat([self.ids_RK, own_R1], 1)
        masked_RJ = torch.cat([torch.ones_like(self.ids_RK), torch.zeros_like(own_R1)], 1).bool()
        picked_RJ1 = gather_logits(
            self.hidden_RH, self.weight_VH, None, ids_RJ, masked_RJ, vocab_size=self.vocab_size, chunk_ids=chunk_ids
        )
        return to_row_logits(picked_RJ1, masked_RJ)


def _gradient_error() -> float:
    """Returns `grad_error_vs_twin` of the module's docstring."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    problem = LossProblem(NUM_COMPARED_TOKENS, HIDDEN, VOCAB_SIZE)
    operands = problem.operands
    exact_operands = [operand.detach().double().requires_grad_() for operand in operands]

    def unfused_loss(hidden_RH: Tensor, weight_VH: Tensor) -> Tensor:
        return unfused.distillation_loss(hidden_RH @ weight_VH.T, *problem.kept, vocab_size=VOCAB_SIZE).mean()

    exact = torch.autograd.grad(unfused_loss(*exact_operands), exact_operands)
    unfused_bf16 = torch.autograd.grad(unfused_loss(*operands), operands)
    fused = torch.autograd.grad(problem.fused().mean(), operands)

    def distance(found: Tensor, truth: Tensor) -> float:
        return float((found.double() - truth).norm())

    return max(distance(f, e) / distance(u, e) for f, u, e in zip(fused, unfused_bf16, exact, strict=True))


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            main()
        case ["error"]:
            print(_gradient_error())
        case [way]:
            _measure_on_request(way)
